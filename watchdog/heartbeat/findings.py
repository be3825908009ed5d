"""What the heartbeats say: findings, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class FindingKind(StrEnum):
    DEAD = "dead"
    """The process is gone. Always confirmed."""
    HUNG = "hung"
    """The rank has stopped while its peers have not, or wait for it."""
    STRAGGLER = "straggler"
    """Advancing, but its peers wait for it again and again. Never confirmed: slowness alone excludes nobody."""
    NOBODY = "nobody"
    """The group stands still and no rank can be named (`rank` is None): fabric, lost message, frozen machine."""


class Reason(StrEnum):
    """Why; part of the evidence that operators see."""

    PROCESS_GONE = "its process is gone"
    BEHIND = "it does not enter the collective that its peers wait in"
    SILENT_IN_COLLECTIVE = "it stopped inside a collective, while its peers wait"
    SILENT_IDLE = "its idle main loop does not turn"
    STOPPED = "its process is stopped"
    SILENT_SLOW_PHASE = "it is silent for longer than its phase may last"
    UNHEARD = "the group stands still, and NCCL does not hear its process alone"
    SLOW = "its peers wait for it again and again"
    ALL_AT_ONE_POINT = "all ranks wait at the same point"
    ALL_SILENT = "all ranks are silent at once"
    NOT_JOINED = "ranks whose idle loops turn do not join the collective that others wait in"
    UNTOLD = "several ranks wait behind their peers and none can be told from the others"


@dataclass(frozen=True, slots=True)
class Finding:
    """What holds at this observation; it is repeated for as long as it holds.

    `confirmed`: it held for long enough to act on, or a second source agrees; else only to suspect. `seconds`: for how
    long the rank (or group) has been silent or stuck, in the reader's time without its own stalls. `limit_s`: the
    threshold that passed. `slowdown`: of a straggler, its work per collective relative to its peers' median.
    """

    kind: FindingKind
    rank: int | None
    incarnation: int | None
    epoch: int
    confirmed: bool
    reason: Reason
    seconds: float = 0.0
    limit_s: float = 0.0
    slowdown: float | None = None
    evidence: Mapping[str, object] = field(default_factory=dict)
