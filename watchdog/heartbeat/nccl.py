"""What NCCL's result codes mean to the watchdog (`ncclResult_t`, nccl.h of NCCL 2.28)."""

from __future__ import annotations

NAMES = {
    1: "unhandled CUDA error",
    2: "system error",
    3: "internal error",
    4: "invalid argument",
    5: "invalid usage",
    6: "remote error",
}
IN_PROGRESS = 7
"""Not an error: the communicator is at work."""

WITNESS_CODES = frozenset({2, 6})
"""That speak of a peer or the way to it: a call to the system failed, such as on a socket that the peer has closed; a
call failed because of the network or a remote process that ended early. Who reports one is not the one that is broken.
"""


def describe(code: int) -> str:
    """'remote error (6)'."""
    return f"{NAMES.get(code, 'error')} ({code})"
