"""When NVML is initialised again because GPUs are gone: only that shows what came, or came back. Pure."""

from __future__ import annotations

from collections.abc import Collection

REOPEN_S = (0.5, 30.0)
"""After this long at the least, and at the most."""

SHARE = 0.05
"""Of the time, at most this is spent on it while a place is empty: on a large host it may take a second, and nothing
else is read meanwhile."""


class Reopening:
    def __init__(self) -> None:
        self._gone: frozenset[str] = frozenset()
        self._most = 0
        self._at: float | None = None

    def expect(self, count: int) -> None:
        """Ranks are bound to so many GPUs: there are places for them, even if some were never seen."""
        self._most = max(self._most, count)

    def due(self, gone: Collection[str], present: int, took_s: float, now: float) -> bool:
        """`gone`: GPUs that should be there; `present`: how many are there; `took_s`: the last initialisation.

        A new GPU, which serves as soon as it is seen, can only appear where there were more once. Where none is
        missing in number, an old one has been replaced, and is hardly waited for.
        """
        self._most = max(self._most, present)
        if not self._gone.issuperset(gone):
            self._at = now + REOPEN_S[0]
        self._gone = frozenset(gone)
        if not gone or self._at is None or now < self._at:
            return False
        first, longest = REOPEN_S
        self._at = now + (min(longest, max(first, took_s / SHARE)) if present < self._most else longest)
        return True
