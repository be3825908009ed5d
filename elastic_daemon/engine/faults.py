"""Faults on request, for tests: a rank that dies at an exact point, which no signal from outside could hit.

`ELASTIC_FAULT_TRANSFER={"rank": 2, "layer": 0, "point": "commit", "rearrangement": 2}` kills rank 2 at that boundary of
its second rearrangement. Unset, as it should be in production, nothing is installed.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable

VARIABLE = "ELASTIC_FAULT_TRANSFER"


def transfer_fault(rank: int) -> Callable[[int, str], None] | None:
    """The hook that this rank's expert transfers call at each boundary, if the environment asks for one."""
    if not (wanted := os.environ.get(VARIABLE)):
        return None
    fault = json.loads(wanted)
    if fault["rank"] != rank:
        return None
    passed = 0

    def die_there(layer: int, point: str) -> None:
        nonlocal passed
        if (layer, point) == (fault["layer"], fault["point"]):
            passed += 1
            if passed == fault["rearrangement"]:
                os.kill(os.getpid(), signal.SIGKILL)

    return die_there
