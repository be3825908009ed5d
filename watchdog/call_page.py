"""A page of memory in which a child says which driver call it is in, so that its parent can tell when it never returns.

A call that hangs takes its whole process with it, so the child cannot report it: it writes before each call, the parent
looks. Three 64-bit words (completed cycles; start of the present call in CLOCK_MONOTONIC ns, 0 between calls; the
call's number) and 48 bytes: the GPU's UUID, `index:N` while it is not known yet, empty for a call that concerns none.
"""

from __future__ import annotations

import mmap
import os
import struct
import time

CALLS = ("none", "init", "count", "handle", "identity", "fields", "links", "clocks", "ecc", "rows", "pcie", "fabric",
         "temperature", "processes", "event_set", "register", "wait", "shutdown")  # fmt: skip
"""Names of calls by number."""

_WORDS = struct.Struct("=QQQ48s")
_BYTES = 4096


def create_page_fd() -> int:
    """A file descriptor to hand to a child."""
    fd = os.memfd_create("driver-calls", 0)
    os.ftruncate(fd, _BYTES)
    return fd


class CallPage:
    """Both ends: the child enters and leaves calls, the parent reads."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, _BYTES)
        self._cycles = 0

    def enter(self, call: str, gpu: str = "") -> None:
        _WORDS.pack_into(self._map, 0, self._cycles, time.monotonic_ns(), CALLS.index(call), gpu.encode())

    def leave(self) -> None:
        _WORDS.pack_into(self._map, 0, self._cycles, 0, 0, b"")

    def count_cycle(self) -> None:
        self._cycles += 1
        self.leave()

    def read(self) -> tuple[int, float | None, str, str]:
        """(cycles, start of the present call in monotonic seconds or None, GPU or "", name of the call)"""
        cycles, started, call, gpu = _WORDS.unpack_from(self._map)
        return cycles, started / 1e9 if started else None, gpu.rstrip(b"\0").decode(), CALLS[call % len(CALLS)]

    def close(self) -> None:
        self._map.close()
