"""What the controller hears.

Whatever a rank says carries its incarnation, and its epoch where it belongs to one: the controller drops what an old
process or an old epoch says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from elastic_daemon.protocol.base import Column, Identity


@dataclass(frozen=True)
class RankReady:
    """Constructed alone, weights loaded, parked. `gpu`: the UUID of the GPU that it found itself on, None on CPU."""

    rank: int
    incarnation: int
    layers: int
    column: Column
    gpu: str | None = None


@dataclass(frozen=True)
class RankExited:
    """Its process is dead, or dying and beyond recall; the operating system says so."""

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
class RankQuiesced:
    """Its last step of this epoch has ended, and so has that of all other members: the fence voids nothing."""

    rank: int
    incarnation: int
    epoch: int


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

    @property
    def about_gpu(self) -> bool:
        """The GPU is bad, whichever process runs on it."""
        return self.verdict in (VerdictKind.DRAIN, VerdictKind.EXCLUDE)


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


@dataclass(frozen=True)
class Stalled:
    """The supervisor itself stood still for so long. It heard nobody, and may have left unsaid what it had decided."""

    seconds: float


RankEvent = (
    RankReady
    | RankExited
    | RankFault
    | RankQuiesced
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
Event = RankEvent | FrontendEvent | OperatorEvent | WatchdogEvent | Tick | Stalled
