"""When to start, kill and give up the watchdog, by its signs of life. Pure.

A sign of life is a change of its status file. Silence is the sum of the gaps between our own looks, each counted for at
most `MAX_GAP_S`: a supervisor that itself stood still accuses nobody, and no clock that jumps matters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from enum import StrEnum

STALE_S = 3.0
"""It writes twice a second."""
START_S = 30.0
"""From its start, or ours, to the first sign of life. Machines are busy when ranks start."""
MAX_GAP_S = 1.0
BACKOFF_S = (0.5, 10.0)
MAX_ENDS, WINDOW_S = 5, 120.0
"""After more ends than this in such a time it is not started any more."""


class WatchMode(StrEnum):
    """Who starts the watchdog."""

    SPAWN = "spawn"
    EXTERNAL = "external"
    OFF = "off"


class Deed(StrEnum):
    START = "start"
    KILL = "kill"


class WatchState(StrEnum):
    """`down`: not there, or it does not move. `given up`: and is not started any more."""

    OFF = "off"
    STARTING = "starting"
    ALIVE = "alive"
    DOWN = "down"
    GIVEN_UP = "given up"


class Upkeep:
    """`look` says what to do next; `state` and `trouble` (None: nothing is wrong) how things are."""

    def __init__(self, mode: WatchMode, now: float) -> None:
        self.state = WatchState.OFF if mode is WatchMode.OFF else WatchState.STARTING
        self.trouble: str | None = None
        self._mode = mode
        self._looked = now
        self._silent = 0.0
        self._sign: Hashable = None
        self._alive = False  # it has given a sign since it was started
        self._start_at: float | None = now if mode is WatchMode.SPAWN else None
        self._ends: deque[float] = deque()
        self._killed = ""  # why we ended it

    def look(self, now: float, sign: Hashable) -> Deed | None:
        """`sign`: whatever changes when it shows that it lives; None when there is nothing to see."""
        self._silent += min(max(0.0, now - self._looked), MAX_GAP_S)
        self._looked = now
        if self.state in (WatchState.OFF, WatchState.GIVEN_UP):
            return None
        if self._start_at is not None:
            return self._start(now, sign) if now >= self._start_at else None
        if sign is not None and sign != self._sign:
            self._sign, self._silent, self._alive = sign, 0.0, True
            if not self._killed:
                self.state, self.trouble = WatchState.ALIVE, None
            return None
        if self._silent < (STALE_S if self._alive else START_S):
            return None
        return self._silence()

    def ended(self, now: float, status: str) -> None:
        """Its process is gone."""
        why, self._killed = self._killed or f"the watchdog {status}", ""
        self._ends.append(now)
        while self._ends[0] < now - WINDOW_S:
            self._ends.popleft()
        if len(self._ends) > MAX_ENDS:
            self.state = WatchState.GIVEN_UP
            self.trouble = f"{why}; it ended {len(self._ends)} times in {WINDOW_S:g} s and is not started any more"
            return
        first, longest = BACKOFF_S
        pause = min(longest, first * 2.0 ** (len(self._ends) - 1))
        self.state, self._start_at = WatchState.DOWN, now + pause
        self.trouble = f"{why}; it is started again"

    def _start(self, now: float, sign: Hashable) -> Deed:
        """What lies there now is its predecessor's. What was wrong stays so until it shows that it lives."""
        self._start_at, self._sign, self._silent, self._alive = None, sign, 0.0, False
        return Deed.START

    def _silence(self) -> Deed | None:
        if self._mode is WatchMode.EXTERNAL:
            seen = f"has not moved for {STALE_S:g} s" if self._alive else "is not there: start `elastic-watchdog run`"
            self.state, self.trouble = WatchState.DOWN, f"the watchdog {seen}"
            return None
        if not self._killed:
            self._killed = f"the watchdog has not moved for {STALE_S if self._alive else START_S:g} s"
            self.state, self.trouble = WatchState.DOWN, f"{self._killed}; it is started again"
            return Deed.KILL
        return None
