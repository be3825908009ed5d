"""Counters of collectives on the heartbeat page, written by the GPU in the order of its stream.

The host only puts collectives on a stream: what it counted would run ahead of the device by steps. So the page is
mapped for the device, and a write is put on the stream before each collective and behind it (CUDA driver API, "Stream
Memory Operations"). A write stores a number, so it would be wrong in a CUDA graph that is replayed; collectives are
never captured here (`configure` splits graphs at them).
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

import structlog
import torch

from elastic_daemon.engine.device_times import DeviceTimes, Times
from elastic_daemon.engine.nccl_abort import NcclAbort
from watchdog.heartbeat.layout import COMPLETED, ENTERED, PAGE_BYTES, Collective, Granularity

log = structlog.get_logger(__name__)

LIBRARY = "libcuda.so.1"
_WORD_BYTES = 8


class StreamCounters:
    """What a rank counts collectives with on its GPU. The mapping lasts until the process ends, however it does."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._driver: ctypes.CDLL | None = None
        self._page = 0
        self._times: DeviceTimes | None = None

    def map(self, page: mmap.mmap) -> Granularity:
        """Map this process's page for the device. Returns what will be counted.

        That is whole steps, and a line in the log, where the driver does not map it, as for files that are not in
        memory.
        """
        try:
            torch.cuda.set_device(self._device)
            torch.cuda.init()
            self._map(page, ctypes.CDLL(LIBRARY))
        except (OSError, AttributeError, RuntimeError) as error:
            log.warning("heartbeat_per_step", reason=str(error))
            return Granularity.STEP
        return Granularity.DEVICE

    def count(self) -> CollectiveCount | None:
        """For the collectives of a new group; nothing may be under way on the stream. None if steps are counted."""
        if self._driver is None:
            return None
        self._times = DeviceTimes(
            lambda: torch.cuda.Event(enable_timing=True), is_freeing=lambda: bool(NcclAbort.running())
        )
        return CollectiveCount(self._write, self._times)

    def begin_step(self, number: int) -> Times | None:
        """A step of the newest group is about to be launched. Returns what an earlier one took, once that is known."""
        return self._times.begin_step(number) if self._times is not None else None

    def landed(self, newest: bool) -> None:
        """The host has the output of a step. `newest`: it has launched none behind that."""
        if self._times is not None:
            self._times.landed(newest)

    def _map(self, page: mmap.mmap, driver: ctypes.CDLL) -> None:
        # CUresult cuStreamWriteValue64(CUstream, CUdeviceptr, cuuint64_t value, unsigned flags); flags 0: what was
        # written before is visible first. cuMemHostGetDevicePointer(CUdeviceptr *, void *, unsigned flags)
        driver.cuStreamWriteValue64_v2.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint]
        driver.cuMemHostGetDevicePointer_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), ctypes.c_void_p, ctypes.c_uint]
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        mapped = ctypes.c_uint64()
        _check("cudaHostRegister", int(torch.cuda.cudart().cudaHostRegister(address, PAGE_BYTES, 0)))
        _check("cuMemHostGetDevicePointer", driver.cuMemHostGetDevicePointer_v2(ctypes.byref(mapped), address, 0))
        self._page, self._driver = mapped.value, driver
        self._write(ENTERED, 0)

    def _write(self, word: int, value: int) -> None:
        assert self._driver is not None
        stream = torch.cuda.current_stream(self._device).cuda_stream
        address = self._page + word * _WORD_BYTES
        _check("cuStreamWriteValue64", self._driver.cuStreamWriteValue64_v2(stream, address, value, 0))


class CollectiveCount:
    """Counts the collectives of one group, from 0. `write(word, value)` stores to the page in stream order."""

    def __init__(self, write: Callable[[int, int], None], times: DeviceTimes) -> None:
        self._write = write
        self._times = times
        self._entered = [0] * len(Collective)
        self._completed = [0] * len(Collective)

    def enter(self, kind: Collective) -> None:
        """A collective is about to be put on the stream."""
        self._entered[kind] += 1
        self._write(ENTERED + kind, self._entered[kind])
        self._times.enter(kind)

    def complete(self, kind: Collective) -> None:
        """The stream waits for the collective that was put on it last."""
        self._completed[kind] += 1
        self._times.complete(kind)
        self._write(COMPLETED + kind, self._completed[kind])


def _check(name: str, code: int) -> None:
    if code != 0:
        raise OSError(f"{name}: CUDA error {code}")
