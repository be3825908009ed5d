"""Who is to blame when the group stands still: findings from the pages of all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from watchdog.heartbeat.layout import Snapshot


class FindingKind(StrEnum):
    DEAD = "dead"
    """The process is gone. Always confirmed."""
    HUNG = "hung"
    """The rank has stopped while its peers have not, or wait for it."""
    STRAGGLER = "straggler"
    """Advancing, but its peers wait for it again and again. Never confirmed: slowness alone excludes nobody."""
    NOBODY = "nobody"
    """The group stands still and no rank can be named (`rank` is None): the fabric, a lost message, a frozen machine."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What holds at this observation; it is repeated for as long as it holds.

    `confirmed`: it held for long enough to act on, not only to suspect. `seconds`: for how long the rank (or the
    group) has been silent or stuck, in the reader's time without its own stalls. `limit_s`: the threshold it passed.
    """

    kind: FindingKind
    rank: int | None
    incarnation: int | None
    epoch: int
    confirmed: bool
    reason: str
    seconds: float = 0.0
    limit_s: float = 0.0
    slowdown: float | None = None
    evidence: Mapping[str, object] = field(default_factory=dict)


class HeartbeatJudge:
    def observe(self, now_s: float, snapshots: Sequence[Snapshot], epoch: int | None = None) -> list[Finding]:
        raise NotImplementedError
