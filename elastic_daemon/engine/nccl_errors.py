"""NCCL's asynchronous error, onto the rank's heartbeat page.

NCCL notices in threads of its own when a peer is gone or a link fails; nobody hears of it who does not ask. The main
thread cannot ask: it may wait for a kernel that will never end. So a thread does, and the watchdog has a second witness
when ranks stand still. vLLM's binding lacks the function, and torch's is for its own watchdog, which is off.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable
from typing import Protocol

import structlog

from watchdog.heartbeat.nccl import IN_PROGRESS, describe

log = structlog.get_logger(__name__)

LIBRARY = "libtorch_cuda.so"
"""A name is looked up in it and what it was linked with. So this finds the NCCL that torch made the communicator with,
also where vLLM has loaded another one (`VLLM_NCCL_SO_PATH`)."""
POLL_S = 0.1


class ErrorPage(Protocol):
    """Where it is written: `watchdog.heartbeat.page.HeartbeatWriter`."""

    def report_async_error(self, code: int) -> None: ...


class Communicating(Protocol):
    """torch's ProcessGroupNCCL. vLLM asks it for its communicator the same way."""

    def _comm_ptr(self) -> int: ...


class AsyncError:
    """The asynchronous error of one group's communicator, by `ncclCommGetAsyncError`."""

    def __init__(self, group: Communicating) -> None:
        """To be called where the group's device is the current one: torch looks for the communicator there.

        Raises OSError where torch has not loaded its library for GPUs, AttributeError where a function is missing.
        """
        library = ctypes.CDLL(LIBRARY, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        self._get = library.ncclCommGetAsyncError
        self._get.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)]  # ncclComm_t, ncclResult_t * (nccl.h)
        self._get.restype = ctypes.c_int
        self._communicator = group._comm_ptr()

    def read(self) -> int:
        """A `ncclResult_t`: 0 for none, also while an operation is under way. That of the call itself if it fails.

        The communicator must not be destroyed or aborted before this returns.
        """
        found = ctypes.c_int()
        code = self._get(self._communicator, ctypes.byref(found)) or found.value
        return 0 if code == IN_PROGRESS else int(code)


def async_error_of(group: Communicating) -> AsyncError | None:
    """None, and a line in the log, where it cannot be had: a rank serves without."""
    try:
        return AsyncError(group)
    except (OSError, AttributeError) as error:
        log.warning("nccl_errors_unknown", error=str(error))
        return None


class ErrorPoll:
    """A thread that asks `error` and writes what it says to `page`, until it says None or `close` is called."""

    def __init__(self, error: Callable[[], int | None], page: ErrorPage, poll_s: float = POLL_S) -> None:
        """Begins with 0 on the page: what is there is of the communicator before."""
        self._error, self._page, self._poll_s = error, page, poll_s
        self._over = threading.Event()
        self._page.report_async_error(0)
        self._thread = threading.Thread(target=self._run, name="nccl-errors", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nothing is written once this has returned."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        said = 0
        while not self._over.wait(self._poll_s) and (code := self._error()) is not None:
            if code != said:
                said = code
                with contextlib.suppress(ValueError):  # the page is closed: this process ends
                    self._page.report_async_error(code)
                log.warning("nccl_async_error", code=code, error=describe(code))
