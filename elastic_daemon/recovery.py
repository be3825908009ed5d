"""The books of one recovery: who was lost, why, how long each phase took, which regroups failed. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum

from elastic_daemon.protocol import Identity, RecoveryKind, RecoveryReport, RequestCounts


class Timer(StrEnum):
    """The phases of a recovery, as reported."""

    DETECT = "detect"
    FENCE = "fence"
    REGROUP = "regroup"
    REPAIR = "repair"
    RESUME = "resume"


class Recovery:
    """One from the first evidence until the front end is in step, however many deaths and attempts that takes."""

    def __init__(self, cause: str, evidence_at: float, now: float) -> None:
        self.cause = cause
        self.lost: tuple[Identity, ...] = ()
        self.failed_regroups = 0  # in a row, with the same members
        self._blame: Counter[int] = Counter()
        self._seconds = dict.fromkeys(Timer, 0.0)
        self._began = evidence_at
        self._lap_began = now
        self._seconds[Timer.DETECT] = now - evidence_at

    def lose(self, ranks: Iterable[Identity], reason: str) -> None:
        """A loss is progress: the regroups that failed before it count no more."""
        self.lost += tuple(ranks)
        if reason not in self.cause:
            self.cause = f"{self.cause}; {reason}"
        self.failed_regroups = 0
        self._blame.clear()

    def regroup_failed(self, ranks: Iterable[int]) -> None:
        self.failed_regroups += 1
        self._blame.update(ranks)

    def most_blamed(self, members: Iterable[int]) -> int:
        """Of these, the rank whose regroup failed most often; the highest id of several."""
        return max(members, key=lambda rank: (self._blame[rank], rank))

    def lap(self, timer: Timer, now: float) -> None:
        """The time since the last lap goes to `timer`."""
        self._seconds[timer] += now - self._lap_began
        self._lap_began = now

    def regrouped(self, seconds: Iterable[Mapping[str, float]], now: float) -> None:
        """As `lap`, shared between regroup and repair by what the slowest rank says of its repair."""
        elapsed = now - self._lap_began
        repair = min(max((max(s.get("repair", 0.0), 0.0) for s in seconds), default=0.0), elapsed)
        self._seconds[Timer.REPAIR] += repair
        self._seconds[Timer.REGROUP] -= repair
        self.lap(Timer.REGROUP, now)

    def report(self, epoch: int, first: bool, requests: RequestCounts | None, now: float) -> RecoveryReport:
        kind = RecoveryKind.START if first else RecoveryKind.SHRINK if self.lost else RecoveryKind.REGROUP
        seconds = {timer.value: spent for timer, spent in self._seconds.items()}
        seconds["total"] = now - self._began
        return RecoveryReport(epoch, kind, tuple(rank for rank, _ in self.lost), self.cause, seconds, requests)
