"""Which parts fit into the time that is left. Pure but for the clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

STOP_S = 20.0
"""To stop the daemon and to write what was found."""


@dataclass(frozen=True)
class Wanted:
    """A part that is to be run. Parts with the same `flags` can share one life of the daemon."""

    name: str
    flags: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Life:
    flags: tuple[str, ...]
    parts: tuple[Wanted, ...]


class Budget:
    """`seconds` from now on; None: as long as it takes."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self.began = clock, clock()
        self._end = math.inf if seconds is None else self.began + seconds

    @property
    def spent(self) -> float:
        return self._clock() - self.began

    @property
    def left(self) -> float:
        """What may be spent before the daemon has to be stopped."""
        return self._end - self._clock() - STOP_S


def lives(wanted: Sequence[Wanted]) -> list[Life]:
    """All parts, as few lives as can be, in the order in which they were asked for."""
    groups: dict[tuple[str, ...], list[Wanted]] = {}
    for part in wanted:
        groups.setdefault(part.flags, []).append(part)
    return [Life(flags, tuple(parts)) for flags, parts in groups.items()]


def fitting(life: Life, start_s: float, left: float) -> tuple[list[Wanted], list[Wanted]]:
    """The parts of a life that can be run in `left` seconds, its start included, and those that cannot."""
    left -= start_s
    fit, rest = [], []
    for part in life.parts:
        if part.seconds <= left:
            left -= part.seconds
            fit.append(part)
        else:
            rest.append(part)
    return fit, rest


def plan(all_lives: Sequence[Life], start_s: float, left: float) -> tuple[list[Wanted], list[Wanted]]:
    """The same over all lives: what is foreseen. Each part is looked at again when its turn comes."""
    run: list[Wanted] = []
    skipped: list[Wanted] = []
    for life in all_lives:
        fit, rest = fitting(life, start_s, left)
        if fit:
            left -= start_s + sum(part.seconds for part in fit)
        run += fit
        skipped += rest
    return run, skipped
