"""The end of a communicator, in a thread of its own.

NCCL ends the kernels of an aborted communicator within milliseconds, and then spends half a second to give back its
memory and to close its connections, before the call returns. What a recovery waits for are the kernels. So it goes on
meanwhile: the next communicator is made beside the one that is being taken down.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import ClassVar

import structlog

from elastic_daemon.errors import PeerLost

log = structlog.get_logger(__name__)

USE_PATIENCE_S = 0.02
"""How long an abort waits for a thread that is calling NCCL, mostly for microseconds. One that connects waits for peers
there, and needs the abort."""


class NcclAbort:
    """Aborts one communicator, once, in the background. All methods are for any thread."""

    _running: ClassVar[set[NcclAbort]] = set()

    def __init__(self, abort: Callable[[], None]) -> None:
        """`abort`: the call that ends it. It, and with it the communicator, is let go of when it has returned."""
        self._abort: Callable[[], None] | None = abort
        self._in_use, self._asked = threading.Lock(), threading.Lock()
        self._begin = threading.Lock()
        self._void = False
        self._thread: threading.Thread | None = None

    @staticmethod
    def running() -> tuple[NcclAbort, ...]:
        """Those of this process whose communicators may still hold memory."""
        return tuple(NcclAbort._running)

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
            NcclAbort._running.add(self)
            thread = threading.Thread(target=self._run, name="nccl-abort", daemon=True)
            thread.start()
            self._thread = thread  # only now: who waits for it joins it
        return True

    def wait(self, timeout_s: float) -> bool:
        """Whether an abort that was begun is over within that time."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is not None and not self._thread.is_alive()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """While a collective is started: the communicator is not freed meanwhile. Raises PeerLost once it is void."""
        with self._in_use:
            if self._void:
                raise PeerLost("the group was aborted")
            yield

    def unless_void(self, ask: Callable[[], int]) -> int | None:
        """What `ask` says about the communicator, None once it is void. Whoever starts a collective is not waited for:
        he may be stuck there, and NCCL knows why."""
        with self._asked:
            return None if self._void else ask()

    def _run(self) -> None:
        started = time.monotonic()
        abort, self._abort = self._abort, None
        assert abort is not None, "the only thread of this abort"
        for lock in (self._in_use, self._asked):
            if lock.acquire(timeout=USE_PATIENCE_S):  # from here on nobody begins to use it: it is void
                lock.release()
        try:
            abort()
        except RuntimeError as error:
            log.error("nccl_abort_failed", error=str(error))  # if its kernels run on, this rank misses the fence
        else:
            log.info("nccl_aborted", seconds=round(time.monotonic() - started, 3))
        finally:
            del abort
            NcclAbort._running.discard(self)
