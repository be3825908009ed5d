"""Notice of a death before the kernel has taken the process down.

A pidfd speaks when all of a process is gone. Giving back hundreds of megabytes takes tens of milliseconds, a CUDA
context 170 ms, and it computes nothing any more meanwhile. But a thread that ends lets go of its robust mutexes before
that (Linux, `mm_release`). So a rank's main thread holds one in shared memory for life, and a thread here waits for it.

Robust mutexes are POSIX; the numbers below are those of glibc and musl.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

_PROCESS_SHARED = 1
_ROBUST = 1
_ROOM = 64
"""Bytes for a mutex, or its attributes: 40 and 4 on x86-64, 48 and 8 on arm64."""

_libc = ctypes.CDLL(None)


def hold(path: Path) -> None:
    """Until this process ends, by the calling thread, which has to be its main one. Makes the file. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, mmap.PAGESIZE)
        mutex = _mapped(fd)
    finally:
        os.close(fd)
    attributes = ctypes.create_string_buffer(_ROOM)
    _check("pthread_mutexattr_init", _libc.pthread_mutexattr_init(attributes))
    _check("pthread_mutexattr_setpshared", _libc.pthread_mutexattr_setpshared(attributes, _PROCESS_SHARED))
    _check("pthread_mutexattr_setrobust", _libc.pthread_mutexattr_setrobust(attributes, _ROBUST))
    _check("pthread_mutex_init", _libc.pthread_mutex_init(mutex, attributes))
    _check("pthread_mutex_lock", _libc.pthread_mutex_lock(mutex))
    # For ever: the interpreter would unmap it at its end, and what is not mapped the kernel cannot let go of.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(mutex))


def follow(path: Path, on_death: Callable[[], None]) -> None:
    """Call `on_death`, in a thread of its own, when the process ends that holds `path`. Removes the file.

    It has to be held already. Raises OSError.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        path.unlink()
        mutex = _mapped(fd)
    finally:
        os.close(fd)
    threading.Thread(target=_wait, args=(mutex, on_death), name=f"follow {path.name}", daemon=True).start()


def _wait(mutex: ctypes.Array[ctypes.c_char], on_death: Callable[[], None]) -> None:
    code = _libc.pthread_mutex_lock(mutex)  # without the interpreter's lock
    if code == errno.EOWNERDEAD:
        on_death()
    else:
        log.warning("lifeline_useless", code=code)


def _mapped(fd: int) -> ctypes.Array[ctypes.c_char]:
    """The mapping lives as long as what is returned."""
    return (ctypes.c_char * _ROOM).from_buffer(mmap.mmap(fd, mmap.PAGESIZE))


def _check(name: str, code: int) -> None:
    if code:
        raise OSError(code, f"{name}: {os.strerror(code)}")
