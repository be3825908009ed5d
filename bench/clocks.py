"""The time of day, which events have, on the monotonic clock, which benches measure with."""

from __future__ import annotations

import time

READINGS = 5


def clock_offset_s() -> float:
    """Monotonic time minus time of day: what an event's time needs to be compared.

    The two cannot be read at once, and a process may lose its processor in between: the closest of some readings holds.
    """
    readings = []
    for _ in range(READINGS):
        before = time.monotonic()
        of_day = time.time()
        after = time.monotonic()
        readings.append((after - before, (before + after) / 2 - of_day))
    return min(readings)[1]
