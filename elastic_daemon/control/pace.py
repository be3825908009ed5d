"""Whether the control loop turns when it means to. Pure."""

from __future__ import annotations

TOLERANCE_S = 0.5
"""What any loop may be late on a busy host; deadlines are longer than this."""


class Pace:
    """Measures each turn of a loop: what it does, then a wait.

    A loop that stood still (no CPU, a machine that was suspended, a log that nobody read) has told and heard nothing
    meanwhile, perhaps not even what it had already decided.
    """

    def __init__(self, now: float) -> None:
        self._last = now

    def stalled_s(self, now: float, meant_s: float) -> float:
        """To be called at the end of each turn's wait, which was to last `meant_s` at the most.

        Returns by how much this turn was longer, 0 up to `TOLERANCE_S`.
        """
        late, self._last = now - self._last - meant_s, now
        return late if late > TOLERANCE_S else 0.0
