"""Who belongs to the deployment: rank states, the transitions allowed between them, incarnations and epochs.

Pure. A *rank* is a logical id, stable for life. Each process start of a rank is one *incarnation*: a number that rises
over the whole life of the daemon and is never reused, so that whatever an old process still says can be told from what
its successor says. An *epoch* is one agreed set of members; it only rises, and everything said in an older one is void.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final


class RankState(StrEnum):
    STARTING = "starting"  # its process constructs the engine and loads weights, alone
    STANDBY = "standby"  # ready and parked, outside the group
    JOINING = "joining"  # being built into the group for the first time
    ACTIVE = "active"
    SUSPECT = "suspect"  # a member that reported a fault, or gave cause for doubt
    DRAINING = "draining"  # a member whose requests are moving away
    EXCLUDED = "excluded"  # gone, or given up: nothing it says counts
    RETIRED = "retired"  # left on request


class Status(StrEnum):
    """What `/health` shows."""

    STARTING = "starting"
    OK = "ok"  # all target ranks serve
    DEGRADED = "degraded"  # serving with fewer
    RECOVERING = "recovering"  # paused, requests are held
    UNAVAILABLE = "unavailable"  # the ranks left cannot hold every expert
    STOPPING = "stopping"


TRANSITIONS: Final[dict[RankState, frozenset[RankState]]] = {
    RankState.STARTING: frozenset({RankState.STANDBY, RankState.EXCLUDED, RankState.RETIRED}),
    RankState.STANDBY: frozenset({RankState.JOINING, RankState.EXCLUDED, RankState.RETIRED}),
    RankState.JOINING: frozenset({RankState.ACTIVE, RankState.STANDBY, RankState.EXCLUDED}),
    RankState.ACTIVE: frozenset({RankState.SUSPECT, RankState.DRAINING, RankState.EXCLUDED}),
    RankState.SUSPECT: frozenset({RankState.SUSPECT, RankState.ACTIVE, RankState.DRAINING, RankState.EXCLUDED}),
    RankState.DRAINING: frozenset({RankState.ACTIVE, RankState.RETIRED, RankState.EXCLUDED}),
    RankState.EXCLUDED: frozenset({RankState.STARTING, RankState.RETIRED}),
    RankState.RETIRED: frozenset({RankState.STARTING}),
}

IN_GROUP: Final = frozenset({RankState.ACTIVE, RankState.SUSPECT, RankState.DRAINING})
MEMBERS: Final = IN_GROUP | {RankState.JOINING}  # must take part in fencing and regrouping
ALIVE: Final = MEMBERS | {RankState.STARTING, RankState.STANDBY}


class IllegalTransition(Exception):
    """A bug in the daemon: the transition is not in TRANSITIONS."""


@dataclass(frozen=True)
class Rank:
    """One row of the table. `since` is when it entered `state`, `reason` why (None where nothing is wrong)."""

    rank: int
    incarnation: int
    state: RankState
    since: float
    reason: str | None = None
    starts: int = 1  # process starts so far

    @property
    def identity(self) -> tuple[int, int]:
        return self.rank, self.incarnation


class Membership:
    """The table of ranks, and the epoch. The only place where states, incarnations and the epoch change."""

    def __init__(self) -> None:
        self._rows: dict[int, Rank] = {}  # ascending by rank
        self._incarnation = 0
        self._epoch = 0

    @property
    def epoch(self) -> int:
        return self._epoch

    def next_epoch(self) -> int:
        self._epoch += 1
        return self._epoch

    def start(self, rank: int, now: float) -> Rank:
        """A new process of `rank`: unknown so far, excluded or retired. Returns its row, with a fresh incarnation."""
        old = self._rows.get(rank)
        if old is not None and RankState.STARTING not in TRANSITIONS[old.state]:
            raise IllegalTransition(f"rank {rank}: {old.state} -> {RankState.STARTING}")
        self._incarnation += 1
        starts = 1 if old is None else old.starts + 1
        self._put(Rank(rank, self._incarnation, RankState.STARTING, now, starts=starts))
        return self._rows[rank]

    def enrol(self, rank: int, now: float, reason: str) -> None:
        """A rank that cannot be started yet. One that is known stays as it is."""
        if rank not in self._rows:
            self._put(Rank(rank, 0, RankState.EXCLUDED, now, reason, starts=0))

    def _put(self, row: Rank) -> None:
        is_new = row.rank not in self._rows
        self._rows[row.rank] = row
        if is_new:
            self._rows = {rank: self._rows[rank] for rank in sorted(self._rows)}

    def move(self, rank: int, state: RankState, now: float, reason: str | None = None) -> Rank:
        """Raises IllegalTransition unless TRANSITIONS allows it, KeyError for a rank never started."""
        row = self._rows[rank]
        if state not in TRANSITIONS[row.state] or state is RankState.STARTING:  # a start needs a new incarnation
            raise IllegalTransition(f"rank {rank}: {row.state} -> {state}")
        self._rows[rank] = replace(row, state=state, since=now, reason=reason)
        return self._rows[rank]

    def current(self, rank: int, incarnation: int) -> Rank | None:
        """The row, if this incarnation is the one that counts and has not been given up; else None."""
        row = self._rows.get(rank)
        return row if row and row.incarnation == incarnation and row.state in ALIVE else None

    def where(self, *states: RankState) -> tuple[Rank, ...]:
        """Rows in one of these states, ascending by rank."""
        return tuple(row for row in self._rows.values() if row.state in states)

    @property
    def members(self) -> tuple[Rank, ...]:
        return self.where(*MEMBERS)

    def __getitem__(self, rank: int) -> Rank:
        return self._rows[rank]

    def __iter__(self) -> Iterator[Rank]:
        return iter(tuple(self._rows.values()))
