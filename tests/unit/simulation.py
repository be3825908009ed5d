"""A simulated world around the controller: ranks, a front end and its requests, in virtual time, from one seed.

`run(seed)` plays one random schedule of faults and checks the invariants after each event. A rank may answer promptly,
late, twice or never, may die or hang at any step, and old processes may go on talking; its death may be reported late.
The machine may stand still, also between a decision of the controller and what it leads to.
In some worlds a rank or a request is poison: no step with it succeeds, and nobody dies of it.
The world keeps books of its own about who is dead, parked or regrouped, and never asks the controller for them.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from functools import cache
from typing import Any

from elastic_daemon import protocol as p
from elastic_daemon.control.control_state import Phase
from elastic_daemon.control.gpu_pool import GpuPool
from elastic_daemon.control.policy import Policy
from elastic_daemon.placement import EMPTY, Placement, initial, slots_per_rank
from elastic_daemon.processes.rank_messages import RankAction
from tests.unit.invariants import SERVING, Books, Process
from tests.unit.poison import Poison
from tests.unit.simulated_faults import HORIZON, Faults
from tests.unit.simulated_serving import STEP, Serving, SimulatedFrontend

SETTLE = 120.0  # this much after the last fault has begun all must be quiet


class SimulationError(AssertionError):
    """An invariant does not hold. The message has the seed, and with `trace` all that happened."""


def run(seed: int, *, trace: bool = False) -> World:
    """Play one schedule to its end. Raises SimulationError."""
    world = World(seed)
    try:
        world.play()
    except Exception as error:
        story = "\n".join(f"{at:9.3f}  {what}" for at, what in world.trace) + "\n" if trace else ""
        replay = f"SIM_SEED={seed} pytest tests/unit/test_simulation.py"
        raise SimulationError(f"{story}seed {seed}, t={world.now:.3f}: {error!r}\nreplay: {replay}") from error
    return world


@cache
def first_placement(experts: int, layers: int, ranks: tuple[int, ...], slots: int) -> Placement:
    return initial(experts, layers, ranks, slots)


class World(Books):
    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.trace: list[tuple[float, Any]] = []
        ranks = rng.randint(2, 6)
        experts = rng.randint(2, 10)
        slots = slots_per_rank(experts, ranks, max(rng.randrange(ranks), rng.randrange(ranks)))
        self.layers = rng.randint(1, 2)
        policy = Policy(
            ranks, experts, slots, start_timeout_s=3.0, restart_backoff_s=0.1, max_backoff_s=1.0, fault_grace_s=0.2,
            fence_timeout_s=1.0, regroup_timeout_s=1.0, sync_timeout_s=1.0, hold_timeout_s=5.0,
            frontend_start_timeout_s=3.0, max_vain_faults=4, restore=rng.random() < 0.5,
            max_ranks=ranks + 2, respread=rng.random() < 0.7, host_copies=rng.random() < 0.7, spread_timeout_s=2.0,
            drain_timeout_s=2.0,
        )  # fmt: skip
        uuids = [f"GPU-{index}" for index in range(ranks + rng.randint(0, 2))] if rng.random() < 0.5 else []
        self.gpus = dict.fromkeys(uuids, True)  # whether it is fit
        pool = GpuPool(uuids or None, 1, 0.3)
        self.unlisted = not uuids and seed % 3 == 0  # which GPUs there are is said later, by ranks and the watchdog
        if self.unlisted:
            self.gpus = {f"GPU-{rank}": True for rank in range(ranks + 2)}
        super().__init__(policy, pool, sloppy=rng.choice((0.0, 0.0, 0.01, 0.04)), poison=Poison(rng))
        self.faults = Faults(self)

        self.queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.sequence = 0
        self.background = 0  # queued, but not worth waiting for: steps
        self.serving = Serving(self)
        self.stalled_s = 0.0  # the controller has not been told of it yet
        self.said: list[Any] = []  # what ranks said so far: material for zombies

    def play(self) -> None:
        self.faults.schedule()
        self.later(STEP, self.serving.step)
        self.background += 1
        self.carry_out(self.controller.start(0.0))
        lag = 0.0
        while self.exit is None and not self.quiet():
            if self.stalled_s:
                stalled_s, self.stalled_s = self.stalled_s, 0.0
                self.tell(p.Stalled(stalled_s))
                continue
            deadline = self.controller.next_deadline()
            if deadline is not None and (not self.queue or deadline + lag <= self.queue[0][0]):
                self.now = max(self.now, deadline + lag)
                self.tell(p.Tick())
                lag = self.rng.choice((0.0, 0.0, 0.05))
            else:
                at, _, call, arguments = heapq.heappop(self.queue)
                self.now = max(self.now, at)  # it was due while the machine stood still
                call(*arguments)
            assert self.now < HORIZON + SETTLE, f"never settles: {self.controller.describe()}"
        self.check_end()

    def quiet(self) -> bool:
        idle = len(self.queue) == self.background and self.controller.next_deadline() is None
        return (idle and not self.poison_acts()) or self.poison_stays()

    def poison_stays(self) -> bool:
        """A rank that spoils every step cannot be spared: nothing more will come of it."""
        if self.now < HORIZON + SETTLE / 2:
            return False
        members = self.members.get(self.epoch, ())
        serves = self.controller.phase is Phase.SERVING and not self.recovering
        group = [self.process_of(identity) for identity in members]
        steps = all(peer and peer.works and peer.mode == "stepping" for peer in group)
        starting = any(q.identity not in members and q.identity not in self.dead for q in self.processes.values())
        return serves and steps and not starting and self.poison.rank in members

    def poison_acts(self) -> bool:
        """Whether there is poison in the group that the controller can get rid of."""
        members = self.members.get(self.epoch, ())
        frontend = self.serving.frontend
        if self.controller.status not in SERVING or frontend is None or not frontend.ready:
            return False
        can_do_without = (len(members) - 1) * self.policy.slots >= self.policy.experts
        return (can_do_without and self.poison.rank in members) or self.poison.request in frontend.owner

    def later(self, delay: float, call: Callable[..., None], *arguments: Any) -> None:
        self.sequence += 1
        heapq.heappush(self.queue, (self.now + delay, self.sequence, call, arguments))

    def stand_still(self, seconds: float) -> None:
        self.trace.append((self.now, f"all stands still for {seconds:.3f} s"))
        self.now += seconds
        self.stalled_s += seconds

    def soon(self) -> float:
        return self.rng.uniform(0.001, 0.03)

    def happens(self, weight: float = 1.0) -> bool:
        """Whether something goes wrong here."""
        return self.now < HORIZON and self.rng.random() < self.sloppy * weight

    def tell(self, event: p.Event, *, true: bool = False) -> None:
        """The controller hears `event`, and what it wants is done. `true`: a rank's own words, as things were then."""
        if self.exit is not None:
            return
        self.trace.append((self.now, event))
        lost, epoch = self.lost_members(), self.epoch
        self.note(event, true)
        actions = self.controller.handle(event, self.now)
        self.faults.stall_between()
        self.carry_out(actions)
        if self.exit is None and len(self.lost_members(epoch)) > len(lost):
            assert self.epoch > epoch, "lost a member, and stays in its epoch"

    def hear(self, event: Any) -> None:
        self.said.append(event)
        self.tell(event, true=True)

    def say(self, process: Process, event: p.Event) -> None:
        """It says so promptly, late, twice, or hangs before it can."""
        if not process.works:
            return
        if self.happens():
            return self.hang(process)
        self.later(self.rng.uniform(0.3, 3.0) if self.happens(2) else self.soon(), self.hear, event)
        if self.happens(3):
            self.later(self.rng.uniform(0.0, 2.0), self.hear, event)

    def carry_out(self, actions: tuple[p.Action, ...]) -> None:
        for action in actions:
            self.trace.append((self.now, action))
            assert self.exit is None, "acts after its exit"
            self.check_action(action)
            match action:
                case p.StartRank():
                    self.start_rank(action)
                case p.KillRank():
                    self.dead.add((action.rank, action.incarnation))
                    delay = self.rng.uniform(0.5, 3.0) if self.happens(5) else self.soon()
                    self.later(delay, self.kill, self.processes[action.rank], "killed", self.rng.random() < 0.8)
                case p.Quiesce() | p.Fence() | p.Regroup() | p.Resume() | p.Respread() | p.StoreExperts():
                    process = self.processes[action.rank]
                    self.faults.spring_trap(type(action).__name__, process)
                    self.later(self.soon(), self.receive, process, action)
                case p.Publish():
                    self.serving.on_publish(action.membership)
                case p.StartFrontend():
                    self.serving.frontend = SimulatedFrontend()
                    if not self.happens(2):
                        self.later(self.rng.uniform(0.05, 0.5), self.serving.on_frontend_up, self.serving.frontend)
                case p.KillFrontend():
                    self.serving.frontend_dies()
                case p.Exit():
                    self.exit = action
        self.check_state()

    def start_rank(self, action: p.StartRank) -> None:
        old = self.processes.get(action.rank)
        assert old is None or old.identity in self.dead, "starts a rank twice"
        assert action.incarnation > self.last_incarnation, "an incarnation is used again"
        self.last_incarnation = action.incarnation
        assert action.gpu is None or self.gpus[action.gpu], f"starts on {action.gpu}, which is not fit"
        gpu = action.gpu or (f"GPU-{action.rank}" if self.unlisted else None)
        others = {other.gpu for other in self.processes.values() if other.identity not in self.dead}
        assert gpu is None or gpu not in others, f"starts on {gpu}, where another rank is"
        plan = first_placement(self.policy.experts, self.layers, action.members, action.slots)
        process = Process(action.rank, action.incarnation, plan.columns[action.rank].tolist(), gpu=gpu)
        self.processes[action.rank] = process
        self.faults.spring_trap("StartRank", process)
        if self.happens(5):
            self.later(self.rng.uniform(0.0, 0.5), self.kill, process, "died while starting")
        self.later(self.rng.uniform(0.1, 0.6), self.on_constructed, process)

    def on_constructed(self, process: Process) -> None:
        if process.works:
            process.mode = "parked"
            self.say(process, p.RankReady(*process.identity, self.layers, process.frozen_column, process.gpu))

    def receive(self, process: Process, action: RankAction) -> None:
        match action:
            case p.Quiesce():
                self.on_quiesce(process, action)
            case p.Fence():
                self.on_fence(process, action)
            case p.Regroup():
                self.on_regroup(process, action)
            case p.Resume():
                self.on_resume(process, action)
            case p.Respread():
                if process.works and process.mode == "stepping" and process.epoch == action.epoch:
                    process.move = action
            case p.StoreExperts():
                self.on_store(process, action)

    def on_quiesce(self, process: Process, action: p.Quiesce) -> None:
        """The last of them to be told lets all stand still, after a step that all have made."""
        if not process.works or process.mode != "stepping" or process.epoch != action.epoch:
            return
        process.told_to_quiesce = True
        group = [self.process_of(identity) for identity in self.members[action.epoch]]
        if all(peer and peer.works and peer.mode == "stepping" and peer.told_to_quiesce for peer in group):
            for peer in group:
                assert peer is not None
                peer.mode = "quiet"
                self.say(peer, p.RankQuiesced(*peer.identity, action.epoch))

    def on_store(self, process: Process, action: p.StoreExperts) -> None:
        """What a slot does not hold any more is passed over."""
        held = [(la, e) for la, slot, e in action.experts if process.column[la][slot] == e]
        if process.works and process.mode == "stepping" and process.epoch == action.epoch and held:
            self.stored |= set(held)
            self.say(process, p.RankStored(*process.identity, action.epoch, tuple(held), 0.01, 1))

    def on_fence(self, process: Process, action: p.Fence) -> None:
        if not process.works or action.epoch <= process.epoch:
            return
        if process.mode == "grouping" and process.loads and self.rng.random() < 0.5:
            # Caught half-way: some loads done, one slot overwritten by half.
            done = self.rng.randrange(len(process.loads))
            for load in process.loads[:done]:
                process.column[load.layer][load.slot] = load.expert
            torn = process.loads[done]
            process.column[torn.layer][torn.slot] = EMPTY
        process.mode, process.epoch, process.loads, process.move = "parked", action.epoch, (), None
        self.say(process, p.RankFenced(*process.identity, action.epoch, process.frozen_column))

    def on_regroup(self, process: Process, action: p.Regroup) -> None:
        if not process.works or process.mode != "parked" or action.epoch < process.epoch:
            return
        process.mode, process.epoch, process.loads = "grouping", action.epoch, action.loads
        group = [self.process_of(identity) for identity in self.members[action.epoch]]
        if all(peer and peer.works and peer.mode == "grouping" and peer.epoch == action.epoch for peer in group):
            for peer in group:
                self.later(self.soon(), self.on_group_built, peer, action.epoch)

    def on_group_built(self, process: Process, epoch: int) -> None:
        if not process.works or process.mode != "grouping" or process.epoch != epoch:
            return
        if self.happens():
            process.mode, process.loads = "faulted", ()
            return self.say(process, p.RegroupFailed(*process.identity, epoch, "no luck"))
        for load in process.loads:
            process.column[load.layer][load.slot] = load.expert
        process.mode, process.loads = "grouped", ()
        self.say(process, p.RankRegrouped(*process.identity, epoch, {"group": 0.01, "repair": self.soon()}))

    def on_resume(self, process: Process, action: p.Resume) -> None:
        if process.mode == "grouped" and process.epoch == action.epoch:
            process.mode, process.told_to_quiesce = "stepping", False
            if process.hung:
                self.watch(process)

    def kill(self, process: Process, status: str, reported: bool = True) -> None:
        if not process.alive:
            return
        self.trace.append((self.now, f"rank {process.rank} ({process.incarnation}) dies: {status}"))
        process.alive = False
        if reported or process.identity not in self.dead:  # one stuck in the driver is never reaped
            delay = self.rng.uniform(0.1, 3.0) if self.rng.random() < 0.2 else self.soon()
            self.later(delay, self.tell, p.RankExited(*process.identity, status))
        group = self.members.get(process.epoch, ())
        if process.mode in ("grouping", "stepping") and process.identity in group:
            place = group.index(process.identity)
            for neighbour in {group[place - 1], group[(place + 1) % len(group)]}:
                peer = self.process_of(neighbour)
                if peer and peer.epoch == process.epoch and self.rng.random() < 0.8:
                    self.fault(peer, "connection closed by peer")

    def fault(self, process: Process, error: str) -> None:
        """A collective fails in it."""
        if process.works and process.mode in ("grouping", "stepping"):
            kind = p.RankFault if process.mode == "stepping" else p.RegroupFailed
            process.mode, process.loads = "faulted", ()
            self.say(process, kind(*process.identity, process.epoch, error))

    def hang(self, process: Process) -> None:
        self.trace.append((self.now, f"rank {process.rank} ({process.incarnation}) hangs, {process.mode}"))
        process.hung = True
        if process.mode in ("stepping", "faulted"):
            self.watch(process)

    def watch(self, process: Process) -> None:
        """Whoever hangs while the controller waits for nothing from it is found by the watchdog."""
        self.later(self.rng.uniform(1.0, 3.0), self.kill, process, "hung, killed by the watchdog")
