"""What must hold after each event, checked against books that the simulated world keeps itself."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from elastic_daemon import protocol as p
from elastic_daemon.control.control_state import Phase
from elastic_daemon.control.deadlines import Wait
from elastic_daemon.control.gpu_pool import GpuPool
from elastic_daemon.control.policy import Policy
from elastic_daemon.controller import Controller
from elastic_daemon.membership import Status
from elastic_daemon.placement import Placement, Source
from tests.unit.poison import Poison

SERVING = (Status.OK, Status.DEGRADED)
WAITING = (Phase.STARTING, Phase.FENCING, Phase.REGROUPING, Phase.RESUMING, Phase.STOPPING)


@dataclass(eq=False)
class Process:
    """One incarnation of a rank."""

    rank: int
    incarnation: int
    column: list[list[int]]
    mode: str = "starting"  # parked, grouping, grouped, stepping, quiet, or faulted: parked unasked
    epoch: int = 0  # the last one it was fenced or regrouped in
    alive: bool = True
    hung: bool = False  # answers nothing until it is killed
    loads: tuple[Any, ...] = ()
    requests: set[int] = field(default_factory=set)
    move: p.Respread | None = None  # to be made
    told_to_quiesce: bool = False
    gpu: str | None = None

    @property
    def identity(self) -> tuple[int, int]:
        return self.rank, self.incarnation

    @property
    def works(self) -> bool:
        return self.alive and not self.hung

    @property
    def frozen_column(self) -> p.Column:
        return tuple(tuple(row) for row in self.column)


class Books:
    """Who is dead, parked or regrouped, by what was really said; never by asking the controller."""

    def __init__(self, policy: Policy, gpus: GpuPool, sloppy: float, poison: Poison) -> None:
        self.now = 0.0
        self.policy = policy
        self.controller = Controller(policy, 0.0, gpus)
        self.orders = 0  # of operators
        self.running: set[str] = set()  # operations
        self.ended: set[str] = set()
        self.target = policy.target  # as the last order that was done wants it
        self.stored: set[tuple[int, int]] = set()  # (layer, expert) in host memory
        self.sloppy = sloppy  # how often an answer goes wrong
        self.poison = poison
        self.processes: dict[int, Process] = {}  # the current one of each rank
        self.epoch = self.last_incarnation = 0
        self.dead: set[p.Identity] = set()  # reported dead, or given up
        self.accused: set[p.Identity] = set()  # to be removed, as the watchdog said
        self.members: dict[int, tuple[p.Identity, ...]] = {}  # by epoch, as regrouped
        self.planned: dict[int, Placement] = {}
        self.fenced: defaultdict[int, set[p.Identity]] = defaultdict(set)  # by epoch: who really said so
        self.regrouped: defaultdict[int, set[p.Identity]] = defaultdict(set)
        self.ready: set[p.Identity] = set()  # who has said that it is built
        self.served: set[p.Identity] = set()  # who has been told to step
        self.left_out: set[int] = set()  # ranks that are not started again
        self.published: p.Snapshot | None = None
        self.synced: set[int] = set()  # epochs the front end said it is in step with
        self.recovering = False
        self.recoveries: list[p.RecoveryReport] = []
        self.frontend_exits = 0
        self.frontend_reported = False  # ready, as far as the controller was told
        self.stop_requested = False
        self.exit: p.Exit | None = None

    def process_of(self, identity: p.Identity) -> Process | None:
        process = self.processes.get(identity[0])
        return process if process and process.identity == identity else None

    def lost_members(self, epoch: int | None = None) -> set[p.Identity]:
        """Of the current epoch, or an older one."""
        return self.dead & set(self.members.get(self.epoch if epoch is None else epoch, ()))

    def note(self, event: p.Event, true: bool) -> None:
        """Keep the books; about who has parked and regrouped only by what is true."""
        match event:
            case p.RankExited(rank, incarnation):
                self.dead.add((rank, incarnation))
            case p.RankReady(rank, incarnation) if true:
                self.ready.add((rank, incarnation))
            case p.RankFenced(rank, incarnation, epoch) if true:
                self.fenced[epoch].add((rank, incarnation))
            case p.RankRegrouped(rank, incarnation, epoch) if true:
                self.regrouped[epoch].add((rank, incarnation))
            case p.FrontendSynced(epoch):
                self.synced.add(epoch)
            case p.StopRequested():
                self.stop_requested = True
            case p.FrontendReady():
                self.frontend_reported = True
            case p.FrontendExited():
                self.frontend_exits += 1
                self.frontend_reported = False

    def check_action(self, action: p.Action) -> None:
        epoch = self.controller.epoch
        match action:
            case p.Fence() | p.Regroup() | p.Resume():
                identity = self.processes[action.rank].identity
                view = self.published
                assert epoch == 1 or (view and view.epoch == epoch), "the front end is told too late"
                assert identity not in self.dead, f"talks to {identity}, which is excluded"
                assert action.epoch == epoch, f"talks about epoch {action.epoch} in {epoch}"
                if isinstance(action, p.Regroup):
                    self.check_regroup(action)
                elif isinstance(action, p.Resume):
                    missing = set(self.members[epoch]) - self.regrouped[epoch]
                    assert not missing, f"resumes epoch {epoch} before {missing} regrouped"
                    assert identity in self.members[epoch]
                    self.served.add(identity)
                    assert view and view.epoch == epoch and view.status is self.controller.status
            case p.Publish(view) if view.status in SERVING:
                assert set(view.active) == set(self.members[epoch]), "publishes others than it regrouped"
                assert not set(view.active) & self.dead, "publishes an excluded rank as active"
                assert set(view.active) <= self.regrouped[epoch], "publishes a rank that has not regrouped"
            case p.RecordEvent("rank_left_out", fields):
                self.left_out.add(fields["rank"])
            case p.OperationChanged(report):
                self.check_operation(report)
            case p.RecordEvent("recovery_started"):
                assert not self.recovering, "two recoveries at once"
                self.recovering = True
            case p.KillRank() if not self.sloppy and not self.poison.has_acted:
                # Where everybody who can answer does, only the dead, the hung, the accused and who fails to
                # join may be given up.
                process = self.processes[action.rank]
                ordered = self.orders and ("operator" in action.reason or action.reason == "not wanted any more")
                excused = ordered or process.identity in self.accused or process.identity not in self.served
                assert excused or not process.works, f"gives up a healthy rank: {action}"
            case p.RecoveryDone(report):
                assert report.requests is None or report.epoch in self.synced, "counts requests of another epoch"
                assert self.recovering, "a recovery ends that never began"
                self.recovering = False
                self.recoveries.append(report)
                phases = [seconds for phase, seconds in report.seconds.items() if phase != "total"]
                assert min(phases) >= 0
                assert abs(sum(phases) - report.seconds["total"]) < 1e-6, f"phases do not add up: {report}"
            case p.Exit(code):
                allowed = {0: self.stop_requested, 3: self.epoch == 0, 4: self.frontend_exits > 5}
                assert allowed[code], f"exits for no reason: {action}"

    def check_operation(self, report: p.OperationReport) -> None:
        name = report.operation
        assert name not in self.ended, f"{name} changes after its end"
        if not report.state.ended:
            self.running.add(name)
            assert self.running == {name}, "two operations at once"
            return
        self.running.discard(name)
        self.ended.add(name)
        if report.state is p.OperationState.DONE and report.kind is p.OperationKind.SCALE:
            self.target = report.target
            assert len(self.members[self.epoch]) == report.target, "done, with another number of ranks"
        assert self.running or self.controller.target == self.target, f"{report} leaves {self.controller.target} wanted"

    def check_regroup(self, action: p.Regroup) -> None:
        epoch, placement = action.epoch, action.placement
        processes = [self.processes[rank] for rank in action.members]
        identities = tuple(process.identity for process in processes)
        if self.planned.get(epoch) is not placement:  # once an epoch
            assert epoch not in self.planned, "two plans in one epoch"
            assert not set(identities) & self.dead
            if epoch > 1:
                assert set(identities) <= self.fenced[epoch], "regroups ranks that may still be stepping"
            assert placement.ranks == action.members
            table = placement.physical_to_logical().tolist()
            assert all(set(row) >= set(range(self.policy.experts)) for row in table), "an expert has no place"
            self.members[epoch], self.planned[epoch] = identities, placement
        column = [list(row) for row in self.processes[action.rank].column]
        for load in action.loads:
            assert load.rank == action.rank, "somebody else's load"
            held = {expert for process in processes for expert in process.column[load.layer]}
            assert load.expert not in held, "loads an expert that is in memory"
            assert load.source is not Source.HOST or (load.layer, load.expert) in self.stored, "not in host memory"
            assert column[load.layer][load.slot] == load.evicts
            column[load.layer][load.slot] = load.expert
        assert column == placement.columns[action.rank].tolist(), "placement differs from what the rank holds"

    def check_state(self) -> None:
        controller, policy = self.controller, self.policy
        phase, epoch = controller.phase, controller.epoch
        assert epoch >= self.epoch, "an epoch fell"
        self.epoch = epoch
        if phase in WAITING or (phase is Phase.SERVING and not self.frontend_reported):
            assert controller.next_deadline() is not None, f"{phase} without a deadline"
        unavailable = controller.status is Status.UNAVAILABLE
        if unavailable or phase in (Phase.REGROUPING, Phase.RESUMING, Phase.SERVING):
            left = len(self.ready - self.dead)
            enough = left * policy.slots >= policy.experts
            deadline = controller.next_deadline()
            joins = deadline is not None and deadline <= self.now + policy.join_delay_s
            assert enough != unavailable or joins, f"{left} ranks left, but {controller.status}"
        held = [r for process in self.processes.values() if process.identity not in self.dead for r in process.requests]
        assert len(held) == len(set(held)), f"a request has two owners: {held}"
        if view := self.published:
            assert view.status is controller.status, f"published {view.status}, but is {controller.status}"
            assert epoch in (1, view.epoch), f"published epoch {view.epoch}, but is {epoch}"
            assert not self.dead & set(view.active), "published an excluded rank as active"

    def check_end(self) -> None:
        phase = self.controller.phase
        if self.exit is not None:
            assert phase is Phase.EXITED
            assert self.controller.next_deadline() is None
            assert self.controller.handle(p.Tick(), self.now) == (), "acts after its exit"
            return
        assert phase in (Phase.SERVING, Phase.UNAVAILABLE), f"at rest while {phase}"
        assert len(self.ended) <= self.orders and not self.running, f"never ends: {self.running}"
        assert not view_draining(self.published), "somebody drains for ever"
        if self.policy.restore and self.controller.automatic:
            back = {process.rank for process in self.processes.values() if process.identity not in self.dead}
            absent = self.controller._wanted - back - self.left_out
            cannot = self.controller._no_gpu | self.controller._left_out.keys()
            # In a world that is ended while poison acts, a rank may have just been lost once more.
            coming = self.controller._deadlines.of(Wait.RANK_RESTART).keys()
            assert absent <= cannot | coming, f"{absent} did not come back"
        if phase is Phase.SERVING:
            assert not self.recovering, "serves, but the recovery was never reported done"
            assert self.controller.status in SERVING
            members = self.members[self.epoch]
            for process in map(self.process_of, members):
                assert process and process.works and process.mode == "stepping" and process.epoch == self.epoch, process
            assert all(q.identity in members or q.identity in self.dead for q in self.processes.values())


def view_draining(view: p.Snapshot | None) -> bool:
    return view is not None and bool(view.draining)
