"""What the controller hears (events), what it asks for (actions), and what it reports.

Plain frozen data; times are monotonic seconds, durations are seconds. Whatever a rank says carries its incarnation, and
its epoch where it belongs to one: the controller drops what an old process or an old epoch says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from elastic_daemon.membership import RankState, Status
from elastic_daemon.placement import Placement, SlotLoad

Column = tuple[tuple[int, ...], ...]  # expert ids by layer and slot: what a rank really holds
Identity = tuple[int, int]  # (rank, incarnation)


# --- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankReady:
    """Constructed alone, weights loaded, parked."""

    rank: int
    incarnation: int
    layers: int
    column: Column


@dataclass(frozen=True)
class RankExited:
    """Its process is dead, confirmed by the operating system."""

    rank: int
    incarnation: int
    status: str


@dataclass(frozen=True)
class RankFault:
    """A collective failed in it and it parked itself; no process died as far as it knows."""

    rank: int
    incarnation: int
    epoch: int
    error: str


@dataclass(frozen=True)
class RankFenced:
    """Out of its collectives, stepping no more, until it is told to regroup."""

    rank: int
    incarnation: int
    epoch: int
    column: Column


@dataclass(frozen=True)
class RankRegrouped:
    """Group built, experts in place; waits for Resume. `seconds` has the keys 'group' and 'repair'.

    `loaded`: source (`host`, `checkpoint`) -> bytes and seconds, of the experts that were loaded for it. `unusable`:
    (layer, expert) of copies in host memory that were missing or damaged; those came from the checkpoint.
    """

    rank: int
    incarnation: int
    epoch: int
    seconds: Mapping[str, float]
    loaded: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    unusable: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class RegroupFailed:
    rank: int
    incarnation: int
    epoch: int
    error: str


@dataclass(frozen=True)
class RankRespread:
    """Its part of respread `serial` is done, while it served: `column` is what it holds now."""

    rank: int
    incarnation: int
    epoch: int
    serial: int
    column: Column
    seconds: float
    bytes: int


@dataclass(frozen=True)
class RankStored:
    """Copies of `experts`, (layer, expert), are complete in host memory, where they outlive this rank."""

    rank: int
    incarnation: int
    epoch: int
    experts: tuple[tuple[int, int], ...]
    seconds: float
    bytes: int


@dataclass(frozen=True)
class ColumnChanged:
    """vLLM's load balancing has moved experts: `column` is what this rank holds now."""

    rank: int
    incarnation: int
    epoch: int
    column: Column


@dataclass(frozen=True)
class FrontendReady:
    pass


@dataclass(frozen=True)
class FrontendExited:
    """Reported before the next front end is started, so there is only ever one to speak of."""

    status: str


@dataclass(frozen=True)
class FrontendSynced:
    """Every request has found its place in this epoch. `delivered`: tokens it has delivered in all its life."""

    epoch: int
    kept: int
    replayed: int
    restarted: int
    lost: int
    delivered: int


@dataclass(frozen=True)
class FrontendMoved:
    """No request is on these incarnations any more, and none will come: they are draining."""

    epoch: int
    draining: tuple[int, ...]


class VerdictKind(StrEnum):
    """The watchdog's verdicts, the lightest first."""

    OK = "ok"
    SUSPECT = "suspect"
    RESTART_RANK = "restart-rank"
    DRAIN = "drain"
    EXCLUDE = "exclude"

    @property
    def acts(self) -> bool:
        return self not in (VerdictKind.OK, VerdictKind.SUSPECT)


@dataclass(frozen=True)
class TelemetryVerdict:
    """What the watchdog says about a GPU or a rank (`subject`), and so about `ranks`.

    It replaces what was said about the same subject before. Nothing is done about it unless `act`. `at`: when it was
    judged.
    """

    subject: str
    ranks: tuple[Identity, ...]
    verdict: VerdictKind
    act: bool
    reason: str
    at: float


@dataclass(frozen=True)
class GpuSeen:
    """`fit`: nothing is known against running a rank on it; else `reason` says what."""

    uuid: str
    fit: bool
    reason: str = ""


@dataclass(frozen=True)
class GpusSeen:
    """All GPUs that the watchdog knows. One that is not among them is not there."""

    gpus: tuple[GpuSeen, ...]


@dataclass(frozen=True)
class GpuReleased:
    """An operator lets this GPU be used again."""

    uuid: str


@dataclass(frozen=True)
class ScaleOrder:
    """Serve with `target` ranks. `retire`: who is to leave, None: whoever can best be spared.

    `timeout_s` bounds the whole operation.
    """

    operation: str
    target: int
    retire: tuple[int, ...] | None
    timeout_s: float


class RankDeed(StrEnum):
    """What an operator can ask for one rank."""

    DRAIN = "drain"  # move its requests and experts away, then let it go
    EXCLUDE = "exclude"  # give it up at once
    RELEASE = "release"  # it may come back


@dataclass(frozen=True)
class RankOrder:
    operation: str
    rank: int
    deed: RankDeed
    timeout_s: float


@dataclass(frozen=True)
class AutomationSwitched:
    """Off: nothing is restored and no verdict acted on; the death of a process is still recovered from."""

    enabled: bool


@dataclass(frozen=True)
class StopRequested:
    timeout_s: float


@dataclass(frozen=True)
class DrainComplete:
    pass


@dataclass(frozen=True)
class Tick:
    """Time has passed. Deadlines expire on this event only."""


RankEvent = (
    RankReady
    | RankExited
    | RankFault
    | RankFenced
    | RankRegrouped
    | RegroupFailed
    | RankRespread
    | RankStored
    | ColumnChanged
)
FrontendEvent = FrontendReady | FrontendExited | FrontendSynced | FrontendMoved
OperatorEvent = StopRequested | DrainComplete | ScaleOrder | RankOrder | AutomationSwitched
WatchdogEvent = TelemetryVerdict | GpusSeen | GpuReleased
Event = RankEvent | FrontendEvent | OperatorEvent | WatchdogEvent | Tick


# --- actions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartRank:
    """`members`: who is planned to be in the group, for the initial placement of this rank's experts.

    `gpu`: the UUID of its GPU; None where GPUs are not known.
    """

    rank: int
    incarnation: int
    members: tuple[int, ...]
    slots: int
    gpu: str | None = None


@dataclass(frozen=True)
class KillRank:
    """Kill without waiting: the controller already counts it as dead. `doubtful`: its stacks are worth a look first."""

    rank: int
    incarnation: int
    reason: str
    doubtful: bool = True


@dataclass(frozen=True)
class Fence:
    rank: int
    epoch: int


@dataclass(frozen=True)
class Regroup:
    """`placement` is that of all members, `loads` are this rank's own."""

    rank: int
    epoch: int
    members: tuple[int, ...]
    placement: Placement
    loads: tuple[SlotLoad, ...]


@dataclass(frozen=True)
class Resume:
    rank: int
    epoch: int


@dataclass(frozen=True)
class Respread:
    """Move experts, while the group serves, until it holds them as in `placement`. Sent to every member."""

    rank: int
    epoch: int
    serial: int
    placement: Placement


@dataclass(frozen=True)
class StoreExperts:
    """Copy these experts, (layer, slot, expert), from this rank's slots to host memory, while it serves."""

    rank: int
    epoch: int
    experts: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class StartFrontend:
    pass


@dataclass(frozen=True)
class KillFrontend:
    """It did not become ready in time. Repeated until its exit is reported."""

    reason: str


@dataclass(frozen=True)
class Snapshot:
    """The membership, as the front end needs it."""

    epoch: int
    status: Status
    reason: str
    active: tuple[Identity, ...]
    excluded: tuple[Identity, ...]  # so far in this recovery
    hold: bool = True  # while not serving: hold requests; False once the hold timeout has passed: refuse them (503)
    draining: tuple[Identity, ...] = ()  # of the active ones: move their requests to the others, send them none


@dataclass(frozen=True)
class Publish:
    """For the front end.

    ok, degraded: put the requests of ranks that are not in `active` onto ones that are, open, then answer
    FrontendSynced(epoch); with `draining`, also FrontendMoved when nothing is left on those. stopping: take nothing
    new, finish what runs. Anything else: hold what comes in, and deliver nothing more from `excluded`.
    """

    membership: Snapshot


@dataclass(frozen=True)
class RecordEvent:
    """For `/events` and the log."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RecoveryDone:
    report: RecoveryReport


@dataclass(frozen=True)
class OperationChanged:
    report: OperationReport


@dataclass(frozen=True)
class StoreTarget:
    """Remember over restarts that an operator wants so many ranks."""

    target: int


@dataclass(frozen=True)
class StopAll:
    """End the front end and every rank process, whatever they are doing."""


@dataclass(frozen=True)
class Exit:
    """The last action ever: 0 stopped, 3 start-up impossible, 4 the front end keeps dying."""

    code: int
    reason: str


Action = (
    StartRank
    | KillRank
    | Fence
    | Regroup
    | Resume
    | Respread
    | StoreExperts
    | StartFrontend
    | KillFrontend
    | Publish
    | RecordEvent
    | RecoveryDone
    | OperationChanged
    | StoreTarget
    | StopAll
    | Exit
)


# --- reports ---------------------------------------------------------------------------------------------------------


class RecoveryKind(StrEnum):
    START = "start"
    SHRINK = "shrink"
    GROW = "grow"
    REGROUP = "regroup"  # the same members again, after a fault without a death


@dataclass(frozen=True)
class RequestCounts:
    kept: int
    replayed: int
    restarted: int
    lost: int


@dataclass(frozen=True)
class RecoveryReport:
    """`seconds`: detect, fence, regroup, repair, resume, total; the phases add up to the total.

    `requests` is None where no front end was there to tell.
    """

    epoch: int
    kind: RecoveryKind
    ranks: tuple[int, ...]  # lost in it; those that joined, when it grew
    cause: str
    seconds: Mapping[str, float]
    requests: RequestCounts | None


class OperationKind(StrEnum):
    SCALE = "scale"
    DRAIN = "drain"
    EXCLUDE = "exclude"
    RELEASE = "release"


class OperationState(StrEnum):
    RUNNING = "running"
    DONE = "done"
    INVALID = "invalid"  # it asks for what cannot be; nothing was changed
    BUSY = "busy"  # another one is running; nothing was changed
    TIMED_OUT = "timed out"  # nothing is changed
    ROLLED_BACK = "rolled back"  # it failed, and what it had begun was undone

    @property
    def ended(self) -> bool:
        return self is not OperationState.RUNNING


@dataclass(frozen=True)
class OperationReport:
    """What an operator's order has come to.

    `phase`: what it is at, in words. `message`: how it ended, or why it was refused. `target` and `previous`: ranks to
    serve with, after and before. `ranks`: that join or leave. `busy_with`: the operation in its way, when `busy`.
    """

    operation: str
    kind: OperationKind
    state: OperationState
    phase: str
    message: str
    target: int
    previous: int
    ranks: tuple[int, ...]
    started: float
    ended: float | None = None
    busy_with: str | None = None


@dataclass(frozen=True)
class RankHealth:
    rank: int
    state: RankState
    since: float
    reason: str | None
    incarnation: int
    gpu: str | None = None


@dataclass(frozen=True)
class HealthSnapshot:
    """`/health`, less what only the shell knows (pids, GPUs, requests in flight, wall-clock time).

    `expert_safety` and `survivable_losses` are -1 when an expert is in no rank's memory, or finds no slot;
    `expert_safety` is None before the first placement. `doing`: one sentence on what goes on and what it waits for.
    """

    status: Status
    reason: str
    doing: str
    epoch: int
    target: int
    active: int
    expert_safety: int | None
    survivable_losses: int
    ranks: tuple[RankHealth, ...]
    last_recovery: RecoveryReport | None
    last_shrink: RecoveryReport | None
    last_grow: RecoveryReport | None
