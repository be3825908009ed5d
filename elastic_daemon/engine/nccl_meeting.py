"""How the members of a group meet over NCCL, and how one leaves that waits for a member that is gone.

The calls that make a communicator wait for all members: at the store, while they connect, and on the device for the
first collectives; and torch offers no way to interrupt them before there is one. So they have a thread of their own,
and a rank that is fenced meanwhile leaves it behind. A communicator that it still makes is aborted; where none comes of
it any more, the thread ends since its connections are broken (`nccl.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from elastic_daemon.engine.leavable import run_leavable
from elastic_daemon.engine.nccl_abort import NcclAbort
from elastic_daemon.errors import PeerLost

POLL_S = 0.001
"""How often the first collective is looked at. It takes milliseconds."""


class Abortable(Protocol):
    """torch's ProcessGroupNCCL."""

    def abort(self) -> None: ...


class Completion(Protocol):
    """torch's event of a device."""

    def query(self) -> bool:
        """Whether it has happened. Raises RuntimeError when the device has failed."""


Group = TypeVar("Group", bound=Abortable)


def meet(connect: Callable[[], tuple[Group, Completion]], is_void: Callable[[], bool]) -> tuple[Group, NcclAbort]:
    """A group whose members have all taken part in a collective, and the means to end it.

    `connect`: makes the group and starts its first collective, whose completion it returns; called in another thread.
    Raises RuntimeError when NCCL does, and PeerLost when `is_void()` says that nobody waits for this group any more.
    """
    group, first = run_leavable(connect, is_void, "nccl-connect", lambda made: NcclAbort(made[0].abort).begin())
    abort = NcclAbort(group.abort)
    try:
        while not first.query():
            if is_void():
                raise PeerLost("left before its first collectives were complete")
            time.sleep(POLL_S)
    except (RuntimeError, PeerLost):
        abort.begin()
        raise
    return group, abort
