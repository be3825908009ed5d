"""The books of a recovery: who was lost, why, how long each phase took, which regroups failed. And of faults that
recoveries do not cure. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple

from elastic_daemon.protocol import Identity, RecoveryKind, RecoveryReport, RequestCounts


class Timer(StrEnum):
    """The phases of a recovery, as reported."""

    DETECT = "detect"
    FENCE = "fence"
    REGROUP = "regroup"
    REPAIR = "repair"
    RESUME = "resume"


class Fault(NamedTuple):
    """The first one reported in an epoch."""

    at: float
    rank: int
    error: str

    @property
    def reason(self) -> str:
        return f"rank {self.rank}: {self.error}"


class Recovery:
    """One from the first evidence until the front end is in step, however many deaths and attempts that takes."""

    def __init__(self, cause: str, evidence_at: float, now: float) -> None:
        self.cause = cause
        self.lost: tuple[Identity, ...] = ()
        self.joining: tuple[Identity, ...] = ()
        self.failed_regroups = 0  # in a row, with the same members
        self._blame: Counter[int] = Counter()
        self._seconds = dict.fromkeys(Timer, 0.0)
        self._began = evidence_at
        self._lap_began = now
        self._seconds[Timer.DETECT] = now - evidence_at

    def lose(self, ranks: Iterable[Identity], reason: str) -> None:
        """A loss is progress: the regroups that failed before it count no more.

        One that was only about to join is not missed.
        """
        gone = tuple(ranks)
        self.lost += tuple(rank for rank in gone if rank not in self.joining)
        self.joining = tuple(rank for rank in self.joining if rank not in gone)
        self.add_cause(reason)
        self.failed_regroups = 0
        self._blame.clear()

    def join(self, ranks: Iterable[Identity], reason: str) -> None:
        self.joining += tuple(ranks)
        self.add_cause(reason)

    def add_cause(self, reason: str) -> None:
        if reason not in self.cause:
            self.cause = f"{self.cause}; {reason}"

    def regroup_failed(self, ranks: Iterable[int]) -> None:
        self.failed_regroups += 1
        self._blame.update(ranks)

    def most_blamed(self, members: Iterable[int]) -> int:
        """Of these, the rank whose regroup failed most often; the highest id of several."""
        return _most_blamed(self._blame, members)

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
        if first:
            kind, ranks = RecoveryKind.START, self.lost
        elif self.lost:
            kind, ranks = RecoveryKind.SHRINK, self.lost
        else:
            kind, ranks = RecoveryKind.GROW if self.joining else RecoveryKind.REGROUP, self.joining
        seconds = {timer.value: spent for timer, spent in self._seconds.items()}
        seconds["total"] = now - self._began
        return RecoveryReport(epoch, kind, tuple(rank for rank, _ in ranks), self.cause, seconds, requests)


class Remedy(StrEnum):
    """What to do about a fault without a death."""

    REGROUP = "regroup"
    EXCLUDE = "exclude"
    END_REQUESTS = "end requests"


class FaultRun:
    """Faults without a death, in a row, between which no request got a token. To regroup once more cures none of them.

    A rank that cannot keep its connections does that, and so does a request that breaks every step it is in. They look
    alike from here, so after `limit` faults a rank is given up, which loses no request; if that does not help either,
    the requests in flight are ended. It takes turns from then on, until a token comes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._length = 0
        self._blame: Counter[int] = Counter()
        self._in_flight = self._delivered = self._delivered_before = 0
        self._excluded = False

    def in_step(self, in_flight: int, delivered: int) -> None:
        """What the front end says when an epoch begins: its requests, and all tokens that it has ever delivered."""
        self._in_flight, self._delivered = in_flight, delivered

    def lost_member(self) -> None:
        """Another group is another chance."""
        self._length = 0
        self._blame.clear()

    def fault(self, rank: int, may_exclude: bool) -> Remedy:
        """One more, first reported by `rank`."""
        if self._in_flight == 0 or self._delivered != self._delivered_before:
            self.lost_member()
            self._excluded = False
        self._delivered_before = self._delivered
        self._length += 1
        self._blame[rank] += 1
        if self._length < self._limit:
            return Remedy.REGROUP
        self._length = 0
        self._excluded = may_exclude and not self._excluded
        return Remedy.EXCLUDE if self._excluded else Remedy.END_REQUESTS

    def most_blamed(self, members: Iterable[int]) -> int:
        """Of these, the rank that was the first to report most often; the highest id of several."""
        return _most_blamed(self._blame, members)


def _most_blamed(blame: Counter[int], members: Iterable[int]) -> int:
    return max(members, key=lambda rank: (blame[rank], rank))
