"""What the controller waits for, and until when. Pure."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class Wait(StrEnum):
    """Values read well in 'waiting for …'."""

    START = "all ranks to start"
    RANK_START = "ranks to start"
    RANK_RESTART = "the pause before restarting ranks"
    GPU = "the probation of a GPU"
    JOIN = "ranks to join"
    QUIESCE = "ranks to end their step"
    FENCE = "ranks to park"
    REGROUP = "ranks to regroup"
    SYNC = "the front end to place its requests"
    GRACE = "a death that explains the fault"
    SPREAD_START = "a quiet moment to spread experts"
    SPREAD = "experts to be spread"
    RECONSIDER = "a verdict that was refused"
    STORE = "a quiet moment to copy experts to host memory"
    DEPARTURE = "ranks to drain"
    OPERATION = "the operation"
    HOLD = "the end of holding requests"
    DRAIN = "running requests to finish"
    FRONTEND_START = "the front end to start"
    FRONTEND_RESTART = "the pause before restarting the front end"


OF_OTHERS: Final = (
    Wait.START,
    Wait.RANK_START,
    Wait.QUIESCE,
    Wait.FENCE,
    Wait.REGROUP,
    Wait.SYNC,
    Wait.GRACE,
    Wait.SPREAD,
    Wait.FRONTEND_START,
)
"""Those that judge others by their silence. The rest are pauses, and what people were promised."""

NO_RANK: Final = -1  # for what is not a rank's


class Deadlines:
    """At most one deadline for each thing waited for, and rank where it is a rank's."""

    def __init__(self) -> None:
        self._at: dict[tuple[Wait, int], float] = {}

    def arm(self, what: Wait, at: float, rank: int = NO_RANK) -> None:
        self._at[what, rank] = at

    def disarm(self, what: Wait, rank: int = NO_RANK) -> None:
        self._at.pop((what, rank), None)

    def postpone(self, seconds: float, *whats: Wait) -> None:
        """All deadlines of these kinds."""
        self._at = {key: at + seconds if key[0] in whats else at for key, at in self._at.items()}

    def clear(self, *whats: Wait) -> None:
        """All deadlines of these kinds; of every kind when none is named."""
        self._at = {key: at for key, at in self._at.items() if whats and key[0] not in whats}

    def __contains__(self, what: Wait) -> bool:
        return any(kind is what for kind, _ in self._at)

    def of(self, what: Wait) -> dict[int, float]:
        """Deadlines of this kind, by rank."""
        return {rank: at for (kind, rank), at in self._at.items() if kind is what}

    @property
    def next(self) -> float | None:
        return min(self._at.values(), default=None)

    def pop_due(self, what: Wait, now: float) -> tuple[int, ...]:
        """Take out what is due of this kind; the ranks, ascending."""
        due = sorted(rank for rank, at in self.of(what).items() if at <= now)
        for rank in due:
            self.disarm(what, rank)
        return tuple(due)

    def describe(self, now: float) -> str:
        """Soonest first: 'ranks to park: 0, 3 (1.2 s left)'. Empty when nothing is waited for."""
        parts = []
        for what in dict.fromkeys(kind for kind, _ in self._at):
            waits = self.of(what)
            ranks = ", ".join(str(rank) for rank in sorted(waits) if rank != NO_RANK)
            soonest = min(waits.values())
            parts.append((soonest, f"{what}{': ' if ranks else ''}{ranks} ({max(soonest - now, 0.0):.1f} s left)"))
        return "; ".join(text for _, text in sorted(parts))
