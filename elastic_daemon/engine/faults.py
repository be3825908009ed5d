"""Faults on request, for tests: what no signal from outside could hit, from the environment.

- `ELASTIC_FAULT_TRANSFER={"rank": 2, "layer": 0, "point": "commit", "rearrangement": 2}` kills rank 2 at that boundary
  the second time that this layer moves, be it by balancing or by a respread.
- `ELASTIC_FAULT_LINKS={"rank": 1, "every_s": 0.2}` breaks rank 1's connections again and again: faults without a death.
  With `"after_steps": 20`, only once 20 steps of the epoch are done.

`"rank": null` means every rank.

Unset, as they should be in production, nothing is installed.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any


def _wanted(variable: str, rank: int) -> dict[str, Any] | None:
    fault: dict[str, Any] | None = json.loads(os.environ.get(variable) or "null")
    return fault if fault is not None and fault["rank"] in (rank, None) else None


def transfer_fault(rank: int) -> Callable[[int, str], None] | None:
    """The hook that this rank's expert transfers call at each boundary, if the environment asks for one."""
    fault = _wanted("ELASTIC_FAULT_TRANSFER", rank)
    if fault is None:
        return None
    passed = 0

    def die_there(layer: int, point: str) -> None:
        nonlocal passed
        if (layer, point) == (fault["layer"], fault["point"]):
            passed += 1
            if passed == fault["rearrangement"]:
                os.kill(os.getpid(), signal.SIGKILL)

    return die_there


def break_links(rank: int, abort: Callable[[], int], steps: Callable[[], int]) -> None:
    """Start breaking this rank's connections, if the environment asks for it. `steps()`: done in this epoch."""
    fault = _wanted("ELASTIC_FAULT_LINKS", rank)
    if fault is None:
        return

    def keep_breaking() -> None:
        while True:
            time.sleep(fault["every_s"])
            if steps() >= fault.get("after_steps", 0):
                abort()

    threading.Thread(target=keep_breaking, name="fault-links", daemon=True).start()
