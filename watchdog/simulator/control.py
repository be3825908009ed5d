"""The state file of the simulated GPUs, read and written through the compiled control library.

That library does what Python cannot: ordered stores that other processes never see half of, and futex wake-ups.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Self

from watchdog.simulator import layout
from watchdog.simulator.errors import NoState, SimulatorError
from watchdog.simulator.layout import EventRecord, GpuRecord
from watchdog.simulator.library import CONTROL, library_dir

HEADER = struct.Struct("<QII")
"""magic, layout, size: how `struct sim_state` begins."""

MAGIC = int.from_bytes(b"NVMLSIM1", "little")

LOCK_TIMEOUT_MS = 5000
"""A change takes microseconds: one who holds the lock for this long is stopped."""


@cache
def library() -> ctypes.CDLL:
    """The control library. Raises NotBuilt, and SimulatorError when its layout is another than layout.py's."""
    loaded = ctypes.CDLL(str(library_dir() / CONTROL), use_errno=True)
    loaded.sim_open.restype = ctypes.c_void_p
    loaded.sim_open.argtypes = [ctypes.c_char_p]
    for name in ("sim_close", "sim_unlock", "sim_count", "sim_wake"):
        getattr(loaded, name).argtypes = [ctypes.c_void_p]
    loaded.sim_count.restype = ctypes.c_uint32
    loaded.sim_lock.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    loaded.sim_set_count.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    for name in ("sim_get", "sim_get_locked", "sim_put"):
        getattr(loaded, name).argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.POINTER(GpuRecord)]
    loaded.sim_post.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint64]
    for name in (
        "sim_close",
        "sim_unlock",
        "sim_set_count",
        "sim_get",
        "sim_get_locked",
        "sim_put",
        "sim_post",
        "sim_wake",
    ):
        getattr(loaded, name).restype = None
    described = [
        layout.LAYOUT,
        layout.MAX_GPUS,
        layout.NVLINKS,
        layout.NVLINK_COUNTERS,
        state_size(loaded),
        ctypes.sizeof(GpuRecord),
        GpuRecord.flap_start_ns.offset,
        GpuRecord.temperature_c.offset,
        GpuRecord.nvlink_errors.offset,
        GpuRecord.fabric_cluster.offset,
    ]
    if described != list((ctypes.c_uint32 * len(described)).in_dll(loaded, "sim_layout")):
        raise SimulatorError("layout.py and native/state.h describe the simulated GPUs differently")
    return loaded


def state_size(loaded: ctypes.CDLL) -> int:
    """Bytes of a state file."""
    return int((ctypes.c_uint32 * 5).in_dll(loaded, "sim_layout")[4])


class StateFile:
    """One open state file; its methods may be called from several threads and processes."""

    def __init__(self, handle: int) -> None:
        self._handle: int | None = handle
        self._library = library()
        self._thread_lock = threading.Lock()  # the file's lock belongs to the process

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises NoState, NotBuilt."""
        handle = library().sim_open(os.fsencode(path))
        if handle:
            return cls(handle)
        code = ctypes.get_errno()
        if code == errno.ENOENT:
            raise NoState(
                f"no simulated GPUs in {path.parent}: start the daemon with --device cpu, or name its --runtime-dir"
            )
        if code in (errno.EPROTO, errno.EINVAL):
            raise NoState(f"{path} is of another version of the simulated driver: start the daemon again")
        raise NoState(f"{path} cannot be used: {os.strerror(code)}")

    @classmethod
    def create(cls, path: Path) -> Self:
        """Open it, made anew without GPUs if there is none of this version. Raises SimulatorError, NotBuilt."""
        loaded = library()
        with contextlib.suppress(NoState):
            return cls.open(path)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as new:
                new.truncate(state_size(loaded))
                new.write(HEADER.pack(MAGIC, layout.LAYOUT, state_size(loaded)))
                new.flush()
            os.replace(new.name, path)
        except OSError as error:
            raise SimulatorError(f"the simulated GPUs cannot be written to {path}: {error.strerror}") from error
        return cls.open(path)

    def close(self) -> None:
        with self._thread_lock:
            if self._handle is not None:
                self._library.sim_close(self._handle)
                self._handle = None

    def __del__(self) -> None:
        self.close()

    def read_all(self) -> list[GpuRecord]:
        """A consistent copy of each GPU's record."""
        with self._thread_lock:
            handle = self._open_handle()
            return [
                self._read(self._library.sim_get, handle, index) for index in range(self._library.sim_count(handle))
            ]

    def update(
        self,
        choose: Callable[[list[GpuRecord]], int],
        change: Callable[[GpuRecord], None],
        events: Sequence[EventRecord] = (),
    ) -> None:
        """Change the GPU that `choose` picks, post events of it, wake all waiters: as one step to other writers.

        Nothing is changed if one of the functions raises.
        """
        with self._locked() as handle:
            read = self._library.sim_get_locked
            records = [self._read(read, handle, index) for index in range(self._library.sim_count(handle))]
            index = choose(records)
            change(records[index])
            self._library.sim_put(handle, index, records[index])
            for event in events:
                self._library.sim_post(handle, index, event.type, event.data)
            self._library.sim_wake(handle)

    def rewrite(self, count: int, change: Callable[[int, GpuRecord], None]) -> None:
        """Make it `count` GPUs and change each one."""
        with self._locked() as handle:
            for index in range(count):
                record = self._read(self._library.sim_get_locked, handle, index)
                change(index, record)
                self._library.sim_put(handle, index, record)
            self._library.sim_set_count(handle, count)
            self._library.sim_wake(handle)

    @staticmethod
    def _read(get: Callable[[int, int, GpuRecord], None], handle: int, index: int) -> GpuRecord:
        record = GpuRecord()
        get(handle, index, record)
        return record

    def _open_handle(self) -> int:
        if self._handle is None:
            raise SimulatorError("this simulator has been closed")
        return self._handle

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        with self._thread_lock:
            handle = self._open_handle()
            if code := self._library.sim_lock(handle, LOCK_TIMEOUT_MS):
                raise SimulatorError(
                    f"the simulated GPUs are being changed by another process that does not finish "
                    f"({LOCK_TIMEOUT_MS / 1000:g} s waited)"
                    if code == errno.ETIMEDOUT
                    else f"the simulated GPUs cannot be locked: {os.strerror(code)}"
                )
            try:
                yield handle
            finally:
                self._library.sim_unlock(handle)
