"""The end of a communicator, in a thread of its own.

NCCL ends the kernels of an aborted communicator within milliseconds, and then spends half a second to give back its
memory and to close its connections, before the call returns. What a recovery waits for are the kernels. So it goes on
meanwhile: the next communicator is made beside the one that is being taken down.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)


class NcclAbort:
    """Aborts one communicator, once, in the background. All methods are for any thread."""

    def __init__(self, abort: Callable[[], None]) -> None:
        """`abort`: the call that ends it. It, and with it the communicator, is let go of when it has returned."""
        self._abort: Callable[[], None] | None = abort
        self._in_use = threading.Lock()
        self._begin = threading.Lock()
        self._void = False
        self._thread: threading.Thread | None = None

    @property
    def is_void(self) -> bool:
        return self._void

    def void(self) -> None:
        """From here on nothing that the communicator does counts; `begin` ends it."""
        self._void = True

    def begin(self) -> bool:
        """Have it aborted, without waiting for that. Returns whether this call was the first."""
        self.void()
        with self._begin:
            if self._thread is not None:
                return False
            self._thread = threading.Thread(target=self._run, name="nccl-abort", daemon=True)
            self._thread.start()
        return True

    def wait(self, timeout_s: float) -> bool:
        """Whether an abort that was begun is over within that time."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is not None and not self._thread.is_alive()

    def unless_void(self, ask: Callable[[], int]) -> int | None:
        """What `ask` says about the communicator, None once it is void. An abort waits for `ask`, which never waits."""
        if not self._in_use.acquire(blocking=False):
            return None
        try:
            return None if self._void else ask()
        finally:
            self._in_use.release()

    def _run(self) -> None:
        started = time.monotonic()
        with self._in_use:
            abort, self._abort = self._abort, None
            assert abort is not None, "the only thread of this abort"
            try:
                abort()
            except RuntimeError as error:
                log.error("nccl_abort_failed", error=str(error))  # if its kernels run on, this rank misses the fence
            else:
                log.info("nccl_aborted", seconds=round(time.monotonic() - started, 3))
