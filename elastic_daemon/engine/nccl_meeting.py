"""How the members of a group meet over NCCL, and how one leaves that waits for a member that is gone.

The calls that make a communicator wait for all members: at the store, while they connect, and on the device for the
first collectives. There is no way to interrupt them before there is a communicator. So they have a thread of their own,
and a rank that is fenced meanwhile leaves it behind; the communicator is aborted, now or as soon as there is one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import structlog

from elastic_daemon.engine.leavable import run_leavable
from elastic_daemon.engine.nccl_abort import NcclAbort
from elastic_daemon.errors import PeerLost

log = structlog.get_logger(__name__)


class Abortable(Protocol):
    """torch's ProcessGroupNCCL."""

    def abort(self) -> None: ...


Group = TypeVar("Group", bound=Abortable)


class Meeting(Generic[Group]):
    """What one thread makes and another may leave at any time. Then it is aborted once, whoever comes first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = False
        self._abort: NcclAbort | None = None

    def made(self, group: Group) -> None:
        """There is a communicator now. Called by who connects."""
        with self._lock:
            self._abort = NcclAbort(group.abort)
            if self._left:
                self._abort.begin()

    def leave(self) -> None:
        with self._lock:
            self._left = True
            if self._abort is not None:
                self._abort.begin()
            else:
                log.warning("nccl_connecting_left")  # its thread goes on until NCCL gives up there

    @property
    def abort(self) -> NcclAbort:
        """Of the group that was made."""
        assert self._abort is not None
        return self._abort


def meet(connect: Callable[[Meeting[Group]], Group], is_void: Callable[[], bool]) -> tuple[Group, NcclAbort]:
    """A group whose members have all taken part in its first collectives, and the means to end it.

    `connect`: makes the group, says so to the meeting as soon as there is a communicator, and waits for its first
    collectives; called in another thread.

    Raises RuntimeError when NCCL does, and PeerLost when `is_void()` says that nobody waits for this group any more.
    """
    meeting: Meeting[Group] = Meeting()
    try:
        group = run_leavable(lambda: connect(meeting), is_void, "nccl-connect")
    except (RuntimeError, PeerLost):
        meeting.leave()
        raise
    return group, meeting.abort
