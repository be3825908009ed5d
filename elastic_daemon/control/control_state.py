"""What the controller knows, what it shows of it (status, health, one sentence), and its outbox. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from elastic_daemon.control.comebacks import Comebacks
from elastic_daemon.control.deadlines import Deadlines
from elastic_daemon.control.departure import Departure, Operation
from elastic_daemon.control.gpu_pool import GpuPool
from elastic_daemon.control.policy import Policy
from elastic_daemon.control.recovery import Fault, FaultRun, Recovery, Timer
from elastic_daemon.control.respreading import Spread
from elastic_daemon.control.verdicts import Doubts
from elastic_daemon.membership import IN_GROUP, Membership, Rank, RankState, Status
from elastic_daemon.placement import Placement, expert_safety, survivable_losses
from elastic_daemon.protocol import (
    Action,
    Column,
    HealthSnapshot,
    Identity,
    Publish,
    RankHealth,
    RecordEvent,
    RecoveryKind,
    RecoveryReport,
    Snapshot,
)
from elastic_daemon.routes.placement_view import PlacementView


class Phase(StrEnum):
    STARTING = "starting"  # until every target rank is on standby
    FENCING = "fencing"
    REGROUPING = "regrouping"
    RESUMING = "resuming"  # ranks step again, the front end places its requests
    SERVING = "serving"
    QUIESCING = "quiescing"  # still serving; ranks end their step, and the group changes then
    UNAVAILABLE = "unavailable"  # the ranks left, all parked, cannot hold every expert
    STOPPING = "stopping"  # running requests may finish
    EXITED = "exited"  # nothing is done or heard any more


STEPPING = (Phase.RESUMING, Phase.SERVING, Phase.QUIESCING)
CHANGING = (Phase.QUIESCING, Phase.FENCING, Phase.REGROUPING)

TIMERS = {Phase.FENCING: Timer.FENCE, Phase.REGROUPING: Timer.REGROUP, Phase.RESUMING: Timer.RESUME}


class Frontend(StrEnum):
    DOWN = "down"
    STARTING = "starting"
    READY = "ready"


class ControlState:
    def __init__(self, policy: Policy, now: float, gpus: GpuPool | None = None) -> None:
        """`gpus`: None where they are not known."""
        self._policy = policy
        self._gpus = gpus or GpuPool(None, 1, 0.0)
        self._wanted = set(range(policy.target))  # who is to serve; as many as the target
        self._ordered: set[int] = set()  # to be started although nothing is restored by itself
        self._left_out: dict[int, str] = {}  # not to be started until an operator releases them, and why
        self._no_gpu: set[int] = set()  # cannot be started for want of one
        self._automatic = True  # whether verdicts are acted on and ranks restored
        self._departure: Departure | None = None
        self._operation: Operation | None = None
        self._spread: Spread | None = None  # under way
        self._spread_due = False  # the group has changed since experts were spread
        self._spread_serial = 0
        self._host_copies: set[tuple[int, int]] = set()  # (layer, expert)
        self._now = now
        self._phase = Phase.STARTING
        self._ranks = Membership()
        self._deadlines = Deadlines()
        self._out: list[Action] = []
        self._layers: int | None = None  # MoE layers, as the first rank that was ready said
        self._columns: dict[int, Column] = {}  # what parked ranks say they hold
        self._regrouped: dict[int, Mapping[str, float]] = {}  # who has regrouped in this epoch, and how fast
        self._placement: Placement | None = None  # of the last group that was planned
        self._recovery: Recovery | None = None  # the one under way, start-up's first regroup included
        self._fault: Fault | None = None  # the first one reported in this epoch
        self._fault_run = FaultRun(policy.max_vain_faults)
        self._comebacks = Comebacks(policy)
        self._doubts = Doubts()
        self._frontend = Frontend.DOWN
        self._frontend_exits: deque[float] = deque()
        self._shown: Status | None = None  # to the front end, last
        self._opened = False  # whether the endpoint has ever served
        self._hold = True  # whether requests are held while nothing is served
        self._stop_by: float | None = None  # asked to stop, at the latest then, and the group is changing
        self._trouble = ""  # why it is unavailable, or ends
        self._last: dict[RecoveryKind, RecoveryReport] = {}
        self._last_recovery: RecoveryReport | None = None

    def be_patient(self, policy: Policy) -> None:
        """Durations, and what is done by itself, change while the daemon serves; experts, slots and ranks do not."""
        self._policy = policy
        self._comebacks.adopt(policy)

    @property
    def target(self) -> int:
        return len(self._wanted)

    @property
    def automatic(self) -> bool:
        return self._automatic

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def epoch(self) -> int:
        return self._ranks.epoch

    @property
    def status(self) -> Status:
        match self._phase:
            case Phase.STOPPING | Phase.EXITED:
                return Status.STOPPING
            case Phase.UNAVAILABLE:
                return Status.UNAVAILABLE
            case phase if phase in STEPPING and self._frontend is Frontend.READY:
                serving = {row.rank for row in self._group if row.state is not RankState.DRAINING}
                return Status.OK if serving >= self._wanted else Status.DEGRADED
            case _:
                return Status.RECOVERING if self._opened else Status.STARTING

    @property
    def _ending(self) -> bool:
        return self._phase is Phase.STOPPING or self._stop_by is not None

    @property
    def reason(self) -> str:
        """Why the status is not ok, and what is wrong although it is."""
        match self.status:
            case Status.UNAVAILABLE | Status.STOPPING:
                return self._trouble
            case Status.OK | Status.DEGRADED:
                rows = [row for row in self._ranks if row.rank in self._wanted]
                wrong = [(row.rank, self._absence(row)) for row in rows if row.state not in IN_GROUP]
                wrong += [(row.rank, f"draining: {row.reason}") for row in rows if row.state is RankState.DRAINING]
                wrong += [(rank[0], why) for ranks, why in self._doubts.kept for rank in ranks if self._is(rank)]
                bars = self._gpus.bars if self._no_gpu & self._wanted else ()
                return "; ".join([*(f"rank {rank}: {reason}" for rank, reason in wrong), *bars])
            case _:
                if self._recovery is not None:
                    return self._recovery.cause
                return "ranks are starting" if self._phase is Phase.STARTING else f"the front end is {self._frontend}"

    def describe(self) -> str:
        """One sentence: what goes on, and what it waits for."""
        match self._phase:
            case Phase.EXITED:
                return f"exited: {self._trouble}"
            case Phase.STARTING | Phase.STOPPING:
                doing = self._phase.value
            case Phase.UNAVAILABLE:
                doing = f"unavailable in epoch {self.epoch}: {self._trouble}"
            case Phase.SERVING:
                doing = f"serving epoch {self.epoch} with {len(self._group)} of {self.target} ranks"
            case _:
                doing = f"{self._phase} epoch {self.epoch}"
        waits = self._deadlines.describe(self._now)
        return f"{doing}; waiting for {waits}" if waits else doing

    def snapshot(self, now: float) -> HealthSnapshot:
        self._now = max(self._now, now)
        safety = None
        if self._placement is not None:
            left = {row.rank for row in self._group} & set(self._placement.ranks)
            safety = expert_safety(self._placement.restricted(left), self._host_copies) if left else -1
        active = len(self._group)
        return HealthSnapshot(
            status=self.status,
            reason=self.reason,
            doing=self.describe(),
            epoch=self.epoch,
            target=self.target,
            active=active,
            expert_safety=safety,
            survivable_losses=survivable_losses(self._policy.experts, active, self._policy.slots),
            ranks=tuple(
                RankHealth(row.rank, row.state, row.since, row.reason, row.incarnation, self._gpus.of(row.rank))
                for row in self._ranks
            ),
            last_recovery=self._last_recovery,
            last_shrink=self._last.get(RecoveryKind.SHRINK),
            last_grow=self._last.get(RecoveryKind.GROW),
            frontend_ready=self._frontend is Frontend.READY,
        )

    @property
    def placement(self) -> PlacementView | None:
        """What the group holds now, as far as is known; None before the first group."""
        if self._placement is None:
            return None
        in_group = {row.rank for row in self._group}
        left = tuple(rank for rank in self._placement.ranks if rank in in_group)
        return PlacementView(self.epoch, self._placement, left, frozenset(self._host_copies))

    @property
    def _group(self) -> tuple[Rank, ...]:
        return self._ranks.where(*IN_GROUP)

    @property
    def _spreads(self) -> bool:
        """Whether anything is done about copies of experts after the group has changed."""
        return self._policy.respread or self._policy.host_copies

    def _absence(self, row: Rank) -> str:
        """Why a wanted rank does not serve."""
        why = self._left_out.get(row.rank) or row.reason or row.state.value
        return f"{why}; waits for a usable GPU" if row.rank in self._no_gpu else why

    def _holds_all(self, ranks: int) -> bool:
        """Whether so many ranks have a slot for every expert."""
        return ranks * self._policy.slots >= self._policy.experts

    def _is(self, identity: Identity) -> bool:
        """Whether this incarnation is the one that counts."""
        return self._ranks.current(*identity) is not None

    def _show_doubts(self) -> None:
        """Members that the watchdog doubts are `suspect`, and are not any more when it does not."""
        self._doubts.forget(self._is)
        for row in self._ranks.where(RankState.ACTIVE, RankState.SUSPECT):
            doubt = self._doubts.of(row.identity)
            if doubt is not None and (row.state, row.reason) != (RankState.SUSPECT, doubt):
                self._ranks.move(row.rank, RankState.SUSPECT, self._now, doubt)
            elif doubt is None and row.state is RankState.SUSPECT and self._fault is None:
                self._ranks.move(row.rank, RankState.ACTIVE, self._now)

    def _publish(self) -> None:
        self._shown = self.status
        self._opened = self._opened or self._shown in (Status.OK, Status.DEGRADED)
        members = tuple(row.identity for row in self._ranks.members)
        excluded = self._recovery.lost if self._recovery else ()
        draining = tuple(row.identity for row in self._ranks.where(RankState.DRAINING))
        self._emit(Publish(Snapshot(self.epoch, self.status, self.reason, members, excluded, self._hold, draining)))

    def _column_error(self, column: Column) -> str | None:
        """What is wrong with the experts a rank says it holds."""
        layers, slots, experts = self._layers, self._policy.slots, self._policy.experts
        if len(column) != layers or any(len(row) != slots for row in column):
            return f"reports experts for {len(column)} layers, expected {layers} layers of {slots} slots"
        if any(not -1 <= expert < experts for row in column for expert in row):
            return f"reports an expert outside -1..{experts - 1}"
        return None

    def _lap(self) -> None:
        """The phase of the recovery under way, if any, ends here."""
        if self._recovery is not None and self._phase in TIMERS:
            self._recovery.lap(TIMERS[self._phase], self._now)

    def _record(self, name: str, **fields: Any) -> None:
        self._emit(RecordEvent(name, fields))

    def _emit(self, action: Action) -> None:
        self._out.append(action)

    def _flush(self) -> tuple[Action, ...]:
        out, self._out = tuple(self._out), []
        return out
