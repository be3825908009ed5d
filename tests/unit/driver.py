"""Drives a controller by hand, for the tests that look at one rule at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from elastic_daemon import protocol as p
from elastic_daemon.control.control_state import Phase
from elastic_daemon.control.gpu_pool import GpuPool
from elastic_daemon.control.policy import Policy
from elastic_daemon.controller import Controller
from elastic_daemon.membership import IN_GROUP, MEMBERS, RankState, Status
from elastic_daemon.placement import Placement, initial

A = TypeVar("A")

LAYERS = 2
POLICY = Policy(target=4, experts=16, slots=8, start_timeout_s=100.0, restart_backoff_s=1.0)
SYNCED = (3, 1, 0, 0)


class Shell:
    """Drives a controller by hand: what a rank holds, which incarnation it is, and all actions so far."""

    def __init__(self, policy: Policy = POLICY, gpus: GpuPool | None = None) -> None:
        self.policy = policy
        self.now = 0.0
        self.controller = Controller(policy, self.now, gpus)
        self.actions = list(self.controller.start(self.now))
        self.columns = dict(self.first_placement().columns)
        self.orders = 0
        self.quiesces = True  # members that are asked to end their step do so at once
        self.heeded: set[object] = set()  # draining ranks, moves and stores that were answered

    def first_placement(self) -> Placement:
        return initial(self.policy.experts, LAYERS, range(self.policy.target), self.policy.slots)

    def start_of(self, rank: int) -> p.StartRank:
        """Its newest one."""
        return [action for action in of(p.StartRank, self.actions) if action.rank == rank][-1]

    def column(self, rank: int) -> p.Column:
        return tuple(map(tuple, self.columns[rank].tolist()))

    def incarnation(self, rank: int) -> int:
        return self.start_of(rank).incarnation

    def identity(self, rank: int) -> p.Identity:
        return rank, self.incarnation(rank)

    def send(self, *events: p.Event, after: float = 0.0) -> list[p.Action]:
        """What these events lead to; the first comes `after` seconds from now."""
        self.now += after
        actions = [action for event in events for action in self.controller.handle(event, self.now)]
        self.actions += actions
        stopping = of(p.Quiesce, actions) if self.quiesces else []
        return actions + (self.quiesced(*(order.rank for order in stopping)) if stopping else [])

    def tick(self) -> list[p.Action]:
        """At the next deadline."""
        deadline = self.controller.next_deadline()
        assert deadline is not None
        return self.send(p.Tick(), after=deadline - self.now)

    # What ranks say:

    def ready(self, *ranks: int) -> list[p.Action]:
        """Each holds the experts that it was started for."""
        for rank in ranks:
            members = self.start_of(rank).members
            self.columns[rank] = initial(self.policy.experts, LAYERS, members, self.policy.slots).columns[rank]
        return self.send(*(p.RankReady(r, self.incarnation(r), LAYERS, self.column(r)) for r in ranks))

    def exited(self, *ranks: int) -> list[p.Action]:
        return self.send(*(p.RankExited(r, self.incarnation(r), "signal 9") for r in ranks))

    def fault(self, rank: int) -> list[p.Action]:
        return self.send(p.RankFault(rank, self.incarnation(rank), self.controller.epoch, "peer is gone"))

    def quiesced(self, *ranks: int) -> list[p.Action]:
        return self.send(*(p.RankQuiesced(r, self.incarnation(r), self.controller.epoch) for r in ranks))

    def fenced(self, *ranks: int, epoch: int | None = None) -> list[p.Action]:
        epoch = self.controller.epoch if epoch is None else epoch
        return self.send(*(p.RankFenced(r, self.incarnation(r), epoch, self.column(r)) for r in ranks))

    def regrouped(self, *ranks: int, epoch: int | None = None, repair: float = 0.0) -> list[p.Action]:
        """And what is due at once then: without a front end, the recovery is over."""
        epoch = self.controller.epoch if epoch is None else epoch
        seconds = {"group": 0.0, "repair": repair}
        for regroup in of(p.Regroup, self.actions):
            if regroup.epoch == epoch and regroup.rank in ranks:
                self.columns[regroup.rank] = regroup.placement.columns[regroup.rank]
        actions = self.send(*(p.RankRegrouped(r, self.incarnation(r), epoch, seconds) for r in ranks))
        return actions + (self.tick() if self.controller.next_deadline() == self.now else [])

    def regroup_failed(self, rank: int) -> list[p.Action]:
        return self.send(p.RegroupFailed(rank, self.incarnation(rank), self.controller.epoch, "no route"))

    def synced(self, delivered: int = 0) -> list[p.Action]:
        return self.send(p.FrontendSynced(self.controller.epoch, *SYNCED, delivered))

    def moved(self) -> list[p.Action]:
        """No request is on the draining ranks any more."""
        view = published(self.actions)
        return self.send(p.FrontendMoved(view.epoch, tuple(incarnation for _, incarnation in view.draining)))

    def respread(self, *ranks: int) -> list[p.Action]:
        """Their parts of the newest move are done."""
        actions = []
        for rank in ranks:
            move = of(p.Respread, self.actions)[-1]
            self.columns[rank] = move.placement.columns[rank]
            column = self.column(rank)
            actions += self.send(p.RankRespread(*self.identity(rank), move.epoch, move.serial, column, 0.1, 10))
        return actions

    def stored(self, store: p.StoreExperts) -> list[p.Action]:
        experts = tuple((layer, expert) for layer, _, expert in store.experts)
        return self.send(p.RankStored(*self.identity(store.rank), store.epoch, experts, 0.1, 10))

    # What operators and the watchdog say:

    def scale(self, target: int, retire: tuple[int, ...] | None = None, timeout_s: float = 60.0) -> list[p.Action]:
        self.orders += 1
        return self.send(p.ScaleOrder(f"op-{self.orders}", target, retire, timeout_s))

    def order(self, deed: p.RankDeed, rank: int, timeout_s: float = 60.0) -> list[p.Action]:
        self.orders += 1
        return self.send(p.RankOrder(f"op-{self.orders}", rank, deed, timeout_s))

    def see(self, *uuids: str, **unfit: str) -> list[p.Action]:
        """All GPUs there are: fit ones, and others with the reason; '_' in a keyword stands for '-'."""
        gpus = [p.GpuSeen(uuid, True) for uuid in uuids]
        gpus += [p.GpuSeen(uuid.replace("_", "-"), False, why) for uuid, why in unfit.items()]
        return self.send(p.GpusSeen(tuple(gpus)))

    # Ways to somewhere:

    def serve(self) -> Shell:
        everybody = range(self.policy.target)
        self.ready(*everybody)
        self.regrouped(*everybody)
        self.send(p.FrontendReady())
        assert self.controller.status is Status.OK
        return self

    def recover(self, *survivors: int, serving: bool = True) -> Shell:
        self.fenced(*survivors)
        self.regrouped(*survivors)
        self.synced()
        assert not serving or self.controller.phase is Phase.SERVING
        return self

    def join(self, *members: int) -> Shell:
        """The pause before a join is over, and the group with the newcomers serves."""
        self.tick()
        return self.recover(*members)

    def settle(self, *, failing: Collection[int] = (), unjoinable: Collection[int] = ()) -> Shell:
        """Everybody does at once what is asked, until nothing is waited for any more.

        Ranks that are `failing` die whenever they start; no group can be built with those that are `unjoinable`.
        """
        for _ in range(300):
            if not self._obey(set(failing), set(unjoinable)):
                if self.controller.next_deadline() is None:
                    return self
                self.tick()
        raise AssertionError(f"never settles: {self.controller.describe()}")

    def _obey(self, failing: set[int], unjoinable: set[int]) -> bool:
        """Do one thing that is waited for; whether there was any."""
        ranks = self.controller.snapshot(self.now).ranks
        members = [row.rank for row in ranks if row.state in MEMBERS]
        starting = [row.rank for row in ranks if row.state is RankState.STARTING]
        draining = published(self.actions).draining if of(p.Publish, self.actions) else ()
        moves = [move for move in of(p.Respread, self.actions)[-1:] if move.epoch == self.controller.epoch]
        if starting:
            self.exited(*(rank for rank in starting if rank in failing))
            self.ready(*(rank for rank in starting if rank not in failing))
        elif self.controller.phase is Phase.FENCING:
            self.fenced(*members)
        elif self.controller.phase is Phase.REGROUPING and unjoinable.intersection(members):
            self.regroup_failed(min(members))
        elif self.controller.phase is Phase.REGROUPING:
            self.regrouped(*members)
        elif self.controller.phase is Phase.RESUMING:
            self.synced()
        elif draining and (self.controller.epoch, draining) not in self.heeded:
            self.heeded.add((self.controller.epoch, draining))
            self.moved()
        elif moves and moves[0].serial not in self.heeded:
            self.heeded.add(moves[0].serial)
            self.respread(*members)
        elif stores := [s for s in of(p.StoreExperts, self.actions) if s not in self.heeded]:
            self.heeded.add(stores[0])
            self.stored(stores[0])
        else:
            return False
        return True

    @property
    def serving(self) -> list[int]:
        """The ranks of the group."""
        return [row.rank for row in self.controller.snapshot(self.now).ranks if row.state in IN_GROUP]

    def state(self, rank: int) -> RankState:
        return {row.rank: row.state for row in self.controller.snapshot(self.now).ranks}[rank]

    def report(self) -> p.OperationReport:
        """The newest word on the newest operation."""
        return [a.report for a in of(p.OperationChanged, self.actions) if a.report.operation == f"op-{self.orders}"][-1]

    def states(self) -> list[RankState]:
        return [rank.state for rank in self.controller.snapshot(self.now).ranks]


def of(kind: type[A], actions: Iterable[object]) -> list[A]:
    return [action for action in actions if isinstance(action, kind)]


def published(actions: Iterable[p.Action]) -> p.Snapshot:
    return of(p.Publish, actions)[-1].membership


def events(name: str, actions: Iterable[p.Action]) -> list[Mapping[str, Any]]:
    """Fields of the events of this name."""
    return [event.fields for event in of(p.RecordEvent, actions) if event.name == name]


def too_few() -> Shell:
    """16 experts, and one rank of 8 slots left."""
    shell = Shell().serve()
    for rank in (1, 2, 3):
        shell.exited(rank)
    shell.fenced(0)
    return shell
