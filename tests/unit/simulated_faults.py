"""What goes wrong in a simulated world: deaths, hangs, stalls, failed collectives, verdicts, orders, zombies."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from elastic_daemon import protocol as p
from tests.unit.invariants import Process

if TYPE_CHECKING:
    from tests.unit.simulation import World

HORIZON = 8.0  # no fault begins after this


class Faults:
    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = rng = world.rng
        self.traps = {rng.choice(("StartRank", "Fence", "Regroup", "Resume")): rng.randint(1, 8) for _ in range(2)}
        self.stalls_s: list[float] = []  # each of them after the controller's next decision

    def schedule(self) -> None:
        world = self.world
        kinds = (
            self.break_rank, self.break_rank, self.fault_only, self.zombie, self.zombie, world.serving.frontend_dies,
            self.verdict, self.verdict, self.order, self.order, self.gpus_change,
        )  # fmt: skip
        at = 0.0
        for _ in range(self.rng.randint(0, 6)):
            close = at and self.rng.random() < 0.5
            at = min(at + self.rng.uniform(0.0, 0.08), HORIZON) if close else self.rng.uniform(0.1, HORIZON)
            world.later(at, self.rng.choice(kinds))
        for _ in range(max(0, self.rng.randint(-3, 2))):
            seconds = self.rng.uniform(0.5, 4.0)
            strike = self.rng.choice((world.stand_still, self.stalls_s.append))
            world.later(self.rng.uniform(0.0, HORIZON), strike, seconds)
        if world.unlisted:
            world.later(self.rng.uniform(0.0, HORIZON), self.gpus_change)
        if self.rng.random() < 0.05:
            world.later(self.rng.uniform(0.0, HORIZON), self.poison_links)
        if self.rng.random() < 0.1:
            world.later(self.rng.uniform(0.0, HORIZON), world.tell, p.StopRequested(self.rng.uniform(0.0, 3.0)))
        if self.rng.random() < 0.02:
            for _ in range(8):
                world.later(self.rng.uniform(0.0, HORIZON), world.serving.frontend_dies)

    def stall_between(self) -> None:
        """Between a decision and what it leads to."""
        if self.stalls_s:
            self.world.stand_still(self.stalls_s.pop())

    def spring_trap(self, name: str, process: Process) -> None:
        """Dies or hangs at a step chosen in advance."""
        world = self.world
        if name in self.traps and world.now < HORIZON:
            self.traps[name] -= 1
            if self.traps[name] == 0:
                strike = self.rng.choice((world.kill, self.hang_trapped))
                world.later(self.rng.uniform(0.0, 0.05), strike, process, "trapped")

    def hang_trapped(self, process: Process, _: str) -> None:
        if process.works:
            self.world.hang(process)

    def break_rank(self) -> None:
        world = self.world
        process = self.rng.choice(world.processes)
        if self.rng.random() < 0.7:
            world.kill(process, "signal 9")
        elif process.works:
            world.hang(process)

    def fault_only(self) -> None:
        self.world.fault(self.rng.choice(self.world.processes), "a collective failed")

    def verdict(self) -> None:
        """The watchdog accuses or clears a GPU with one or two ranks, right or wrong, or an older incarnation."""
        world = self.world
        rng = self.rng
        accused = rng.sample(list(world.processes.values()), min(len(world.processes), rng.choice((1, 1, 1, 2))))
        ranks = tuple((process.rank, process.incarnation - (rng.random() < 0.1)) for process in accused)
        kind, act = rng.choice(list(p.VerdictKind)), rng.random() < 0.7
        epoch, before = world.epoch, set(world.dead)
        world.accused |= set(ranks) if act and kind.acts else set()
        world.tell(p.TelemetryVerdict(f"gpu {ranks[0][0]}", ranks, kind, act, "telemetry", world.now - rng.random()))
        group = set(world.members.get(epoch, ()))
        if group & (world.dead - before):
            left = len(group - world.dead)
            assert left * world.policy.slots >= world.policy.experts, f"telemetry leaves {left} ranks"
        if rng.random() < 0.3:
            world.later(rng.uniform(0.0, 1.0), self.verdict)

    def order(self) -> None:
        """An operator wants something, sensible or not."""
        world = self.world
        rng, policy = self.rng, world.policy
        world.orders += 1
        timeout_s = rng.choice((0.5, 3.0, 10.0))
        if rng.random() < 0.1:
            return world.tell(p.AutomationSwitched(rng.random() < 0.7))
        if rng.random() < 0.5:
            retire = tuple(rng.sample(range(policy.target), rng.randint(0, 2))) if rng.random() < 0.2 else None
            target = rng.randint(1, policy.max_ranks + 1)
            world.tell(p.ScaleOrder(f"order-{world.orders}", target, retire, timeout_s))
        else:
            deed = rng.choice(list(p.RankDeed))
            world.tell(p.RankOrder(f"order-{world.orders}", rng.randrange(policy.target + 1), deed, timeout_s))
        if rng.random() < 0.4:
            world.later(rng.uniform(0.0, 1.0), self.order)

    def gpus_change(self) -> None:
        """A GPU goes, comes back, or a new one appears; the watchdog says so."""
        world = self.world
        if not world.gpus:
            return
        kind = self.rng.choice(("unfit", "fit", "gone", "new"))
        uuid = self.rng.choice(list(world.gpus))
        if kind == "new":
            world.gpus[f"GPU-{len(world.gpus) + 10}"] = True
        else:
            world.gpus[uuid] = kind == "fit"
        seen = (p.GpuSeen(uuid, fit, "" if fit else "bad") for uuid, fit in world.gpus.items())
        world.tell(p.GpusSeen(tuple(gpu for gpu in seen if kind != "gone" or gpu.uuid != uuid)))
        if self.rng.random() < 0.5:
            world.later(self.rng.uniform(0.0, 2.0), self.gpus_change)

    def poison_links(self) -> None:
        """From now on one rank breaks every step that it is in."""
        self.world.poison.rank = self.rng.choice(self.world.processes).identity

    def zombie(self) -> None:
        """Somebody repeats himself, or speaks for another time."""
        if not self.world.said:
            return
        event = self.rng.choice(self.world.said[-20:])
        if self.rng.random() < 0.5:
            event = replace(event, incarnation=event.incarnation - self.rng.randint(1, 3))
            if hasattr(event, "epoch"):
                event = replace(event, epoch=self.world.epoch)
        elif hasattr(event, "epoch"):
            event = replace(event, epoch=self.world.epoch - self.rng.randint(1, 2))
        self.world.tell(event)
