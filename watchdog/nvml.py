"""NVML through pynvml, as a child of the watchdog calls it. Never import this in a process that must not hang.

Every call is announced in the call page first. What a GPU does not support is found out once, noted and skipped.
A reading is a flat dict, small enough to send often:

    status     "ok", "lost", "reset_required" or "error"; `error` then says which
    recovery   the driver's recovery action (field 230)                   ecc       uncorrectable errors, volatile
    pending    1: a row waits for a reset to be remapped                  failure   1: a row could not be remapped
    reasons    clock event reasons (bits)                                 corrected corrected ECC errors, volatile
    replays    PCIe replay counter (32 bits, wraps)                       links     bits of the NVLinks that are up
    link_errors NVLink replays + recoveries + CRC errors, all links       fabric    [state, status, health mask]
    celsius    temperature of the GPU                                     processes pids that compute on it

The first five are read at each poll, the others once a second.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import pynvml as nv

from watchdog.call_page import CallPage

T = TypeVar("T")

ALL_LINKS = 0xFFFFFFFF
"""The scope of an NVLink field that means all links (nvml.h)."""
_UNSUPPORTED = (nv.NVML_ERROR_NOT_SUPPORTED, nv.NVML_ERROR_FUNCTION_NOT_FOUND, nv.NVML_ERROR_NO_PERMISSION,
                nv.NVML_ERROR_INVALID_ARGUMENT, nv.NVML_ERROR_ARGUMENT_VERSION_MISMATCH, nv.NVML_ERROR_DEPRECATED,
                nv.NVML_ERROR_VGPU_ECC_NOT_SUPPORTED)  # fmt: skip
_GONE = (nv.NVML_ERROR_GPU_IS_LOST, nv.NVML_ERROR_GPU_NOT_FOUND, nv.NVML_ERROR_NOT_FOUND)

FAST_FIELDS = {
    "recovery": nv.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION,
    "ecc": nv.NVML_FI_DEV_ECC_DBE_VOL_TOTAL,
    "pending": nv.NVML_FI_DEV_REMAPPED_PENDING,
    "failure": nv.NVML_FI_DEV_REMAPPED_FAILURE,
}
SLOW_FIELDS = {
    "corrected": nv.NVML_FI_DEV_ECC_SBE_VOL_TOTAL,
    "replays": nv.NVML_FI_DEV_PCIE_REPLAY_COUNTER,
    "link_replays": (nv.NVML_FI_DEV_NVLINK_ERROR_DL_REPLAY, ALL_LINKS),
    "link_recoveries": (nv.NVML_FI_DEV_NVLINK_ERROR_DL_RECOVERY, ALL_LINKS),
    "link_crc": (nv.NVML_FI_DEV_NVLINK_ERROR_DL_CRC, ALL_LINKS),
}
EVENTS = {
    "xid": nv.nvmlEventTypeXidCriticalError,
    "ecc_double_bit": nv.nvmlEventTypeDoubleBitEccError,
    "ecc_single_bit": nv.nvmlEventTypeSingleBitEccError,
    "gpu_unavailable": nv.nvmlEventTypeGpuUnavailableError,
    "recovery_action_changed": nv.nvmlEventTypeGpuRecoveryAction,
}
"""Signal -> event type. `xid` comes with its number."""


class Trouble(Exception):
    """A GPU answered so that reading on makes no sense; `status` as in a reading."""

    def __init__(self, status: str, error: str) -> None:
        super().__init__(error)
        self.status = status


class Gpu:
    """One GPU that could be opened."""

    def __init__(self, label: str, handle: Any, page: CallPage) -> None:
        """`label` names it in the call page until its UUID has been read. Raises Trouble or NVMLError."""
        self._label = label
        self._handle = handle
        self._page = page
        self.missing: set[str] = set()
        """What this GPU does not support."""
        self.uuid: str = self._ask("identity", lambda: text(nv.nvmlDeviceGetUUID(handle)))
        self._label = self.uuid
        self.index: int = self._ask("identity", lambda: nv.nvmlDeviceGetIndex(handle))
        self.name: str = self._ask("identity", lambda: text(nv.nvmlDeviceGetName(handle)))
        self.slot: str | None = self._ask("identity", lambda: slot_of(handle))
        self._links: int | None = None
        self._other_ways: dict[str, Callable[[], int]] = {
            "ecc": lambda: self._ask("ecc", lambda: self._ecc_total(nv.NVML_MEMORY_ERROR_TYPE_UNCORRECTED)),
            "corrected": lambda: self._ask("ecc", lambda: self._ecc_total(nv.NVML_MEMORY_ERROR_TYPE_CORRECTED)),
            "pending": lambda: self._ask("rows", lambda: nv.nvmlDeviceGetRemappedRows(handle)[2]),
            "failure": lambda: self._ask("rows", lambda: nv.nvmlDeviceGetRemappedRows(handle)[3]),
            "replays": lambda: self._ask("pcie", lambda: nv.nvmlDeviceGetPcieReplayCounter(handle)),
        }
        """For drivers that answer a function and not its field."""
        self._by_function: set[str] = set()

    @property
    def address(self) -> int:
        """The handle as NVML's events name it."""
        return nv.cast(self._handle, nv.c_void_p).value or 0

    @property
    def handle(self) -> Any:
        return self._handle

    def read_fast(self) -> dict[str, Any]:
        reading: dict[str, Any] = {"status": "ok"}
        reading.update(self._read_fields("fields", FAST_FIELDS))
        self._read(reading, "reasons", "clocks", lambda: nv.nvmlDeviceGetCurrentClocksEventReasons(self._handle))
        return reading

    def read_slow(self) -> dict[str, Any]:
        """Raises Trouble("lost") too when another GPU has taken this one's place."""
        if self._ask("identity", lambda: text(nv.nvmlDeviceGetUUID(self._handle))) != self.uuid:
            raise Trouble("lost", "its UUID changed")
        reading = self._read_fields("fields", SLOW_FIELDS)
        errors = [reading.pop(name) for name in ("link_replays", "link_recoveries", "link_crc") if name in reading]
        if errors:
            reading["link_errors"] = sum(errors)
        self._read(reading, "links", "links", self._links_up)
        self._read(reading, "fabric", "fabric", self._fabric)
        self._read(reading, "celsius", "temperature", self._temperature)
        self._read(reading, "processes", "processes", self._processes)
        return reading

    def _ask(self, call: str, function: Callable[[], T]) -> T:
        """Raises Trouble, or NVMLError for what is not supported."""
        self._page.enter(call, self._label)
        try:
            return function()
        except nv.NVMLError as error:
            raise_trouble(error)
            raise
        finally:
            self._page.leave()

    def _read(self, reading: dict[str, Any], name: str, call: str, function: Callable[[], Any]) -> None:
        if name in self.missing:
            return
        try:
            reading[name] = self._ask(call, function)
        except nv.NVMLError:
            self.missing.add(name)

    def _read_fields(self, call: str, fields: dict[str, Any]) -> dict[str, Any]:
        names = [name for name in fields if name not in self.missing and name not in self._by_function]
        reading: dict[str, Any] = {}
        if names:
            try:
                wanted = [fields[name] for name in names]
                values = self._ask(call, lambda: nv.nvmlDeviceGetFieldValues(self._handle, wanted))
            except nv.NVMLError:  # the function itself: an old driver
                self._by_function.update(names)
                values = ()
            for name, value in zip(names, values, strict=False):
                if value.nvmlReturn == nv.NVML_SUCCESS:
                    reading[name] = _number(value)
                elif value.nvmlReturn in _UNSUPPORTED:
                    self._by_function.add(name)
                else:
                    raise_trouble(nv.NVMLError(value.nvmlReturn))
        for name in fields:
            if name in self._by_function and name not in self.missing:
                if name in self._other_ways:
                    self._read(reading, name, call, self._other_ways[name])
                else:
                    self.missing.add(name)
        return reading

    def _ecc_total(self, kind: int) -> int:
        return nv.nvmlDeviceGetTotalEccErrors(self._handle, kind, nv.NVML_VOLATILE_ECC)

    def _links_up(self) -> int:
        """Bit mask of links that are up. Raises NVMLError where there are none."""
        if self._links is None:
            count = nv.nvmlDeviceGetFieldValues(self._handle, [nv.NVML_FI_DEV_NVLINK_LINK_COUNT])[0]
            if count.nvmlReturn != nv.NVML_SUCCESS or not _number(count):
                raise nv.NVMLError(nv.NVML_ERROR_NOT_SUPPORTED)
            self._links = _number(count)
        wanted = [(nv.NVML_FI_DEV_NVLINK_GET_STATE, link) for link in range(self._links)]
        up, supported = 0, False
        for link, value in enumerate(nv.nvmlDeviceGetFieldValues(self._handle, wanted)):
            if value.nvmlReturn == nv.NVML_SUCCESS:
                supported = True
                # Asleep and "active, traffic disabled" are not broken.
                up |= (_number(value) != nv.NVML_NVLINK_STATE_INACTIVE) << link
        if not supported:
            raise nv.NVMLError(nv.NVML_ERROR_NOT_SUPPORTED)
        return up

    def _fabric(self) -> list[int]:
        info = nv.c_nvmlGpuFabricInfo_v2_t()
        nv.nvmlDeviceGetGpuFabricInfoV(self._handle, nv.byref(info))
        if info.state == nv.NVML_GPU_FABRIC_STATE_NOT_SUPPORTED:
            raise nv.NVMLError(nv.NVML_ERROR_NOT_SUPPORTED)
        return [info.state, info.status, info.healthMask]

    def _processes(self) -> list[int]:
        """Where they cannot be told, that says nothing against the GPU."""
        try:
            return sorted({one.pid for one in nv.nvmlDeviceGetComputeRunningProcesses(self._handle)})
        except nv.NVMLError as error:
            if error.value in (*_GONE, nv.NVML_ERROR_RESET_REQUIRED):
                raise
            raise nv.NVMLError(nv.NVML_ERROR_NOT_SUPPORTED) from error

    def _temperature(self) -> int:
        return nv.nvmlDeviceGetTemperature(self._handle, nv.NVML_TEMPERATURE_GPU)


class Driver:
    """NVML, initialised, and the GPUs it lists.

    A GPU is named by its UUID, or by `index:N` before that is known. Indices shift when a GPU goes, so known GPUs are
    opened by UUID, and those in `skip` are never touched; while there are any, an index that could be one of them is
    not touched either, which puts off finding new GPUs.
    """

    def __init__(self, page: CallPage, known: set[str], skip: set[str], only: str | None) -> None:
        self._page = page
        self.gpus: list[Gpu] = []
        self.unreadable: dict[str, str] = {}
        """GPU -> error, of those that are listed and cannot be opened."""
        self._call("init", nv.nvmlInit)
        try:
            self.version = text(self._call("init", nv.nvmlSystemGetDriverVersion))
            self.count: int = self._call("count", nv.nvmlDeviceGetCount)
            for gpu in sorted({only} if only else known - skip):
                self._open(gpu)
            if only is None:
                self._discover(skip)
        except BaseException:
            self.close()
            raise

    def _discover(self, skip: set[str]) -> None:
        opened = {gpu.index for gpu in self.gpus}
        rest = [index for index in range(self.count) if index not in opened and f"index:{index}" not in skip]
        if all(gpu.startswith("index:") for gpu in skip):
            for index in rest:
                self._open(f"index:{index}")

    def _open(self, gpu: str) -> None:
        _, found, index = gpu.partition("index:")
        try:
            if found:
                handle = self._call("handle", lambda: nv.nvmlDeviceGetHandleByIndex(int(index)), gpu)
            else:
                handle = self._call("handle", lambda: nv.nvmlDeviceGetHandleByUUID(gpu), gpu)
            self.gpus.append(Gpu(gpu, handle, self._page))
        except nv.NVMLError as error:
            if error.value != nv.NVML_ERROR_NOT_FOUND:
                self.unreadable[gpu] = str(error)
        except Trouble as trouble:
            self.unreadable[gpu] = str(trouble)

    def _call(self, call: str, function: Callable[[], T], gpu: str = "") -> T:
        self._page.enter(call, gpu)
        try:
            return function()
        finally:
            self._page.leave()

    def event_set(self) -> tuple[Any, dict[str, str]]:
        """A set with all wanted events that the GPUs support, and what went wrong, by UUID."""
        events = self._call("event_set", nv.nvmlEventSetCreate)
        wrong: dict[str, str] = {}
        for gpu in self.gpus:
            try:
                supported = self._call("register", partial(nv.nvmlDeviceGetSupportedEventTypes, gpu.handle), gpu.uuid)
                wanted = sum(EVENTS.values()) & supported
                gpu.missing = {name for name, bit in EVENTS.items() if not bit & supported}
                if wanted:
                    self._call("register", partial(nv.nvmlDeviceRegisterEvents, gpu.handle, wanted, events), gpu.uuid)
            except nv.NVMLError as error:
                if error.value in _UNSUPPORTED:
                    gpu.missing = set(EVENTS)
                else:
                    wrong[gpu.uuid] = str(error)
        return events, wrong

    def wait(self, events: Any, timeout_ms: int) -> tuple[int, str, int] | None:
        """(address of the GPU's handle, signal, data) of the next event; None when there was none in time."""
        try:
            data = self._call("wait", lambda: nv.nvmlEventSetWait_v2(events, timeout_ms))
        except nv.NVMLError as error:
            if error.value == nv.NVML_ERROR_TIMEOUT:
                return None
            raise
        signal = next((name for name, bit in EVENTS.items() if data.eventType & bit), f"event:{data.eventType:#x}")
        return nv.cast(data.device, nv.c_void_p).value or 0, signal, data.eventData

    def close(self) -> None:
        try:
            self._call("shutdown", nv.nvmlShutdown)
        except nv.NVMLError:
            pass  # there is nothing to release


def raise_trouble(error: Any) -> None:
    """Raise Trouble unless the error only says that something is not supported."""
    if error.value in _GONE:
        raise Trouble("lost", str(error)) from None
    if error.value == nv.NVML_ERROR_RESET_REQUIRED:
        raise Trouble("reset_required", str(error)) from None
    if error.value not in _UNSUPPORTED:
        raise Trouble("error", str(error)) from None


def _number(value: Any) -> int:
    if value.valueType == nv.NVML_VALUE_TYPE_UNSIGNED_INT:
        return int(value.value.uiVal)
    return int(value.value.ullVal)


def slot_of(handle: Any) -> str | None:
    """The address on the PCI bus: it stays when another GPU is put there. Whatever is wrong, others say so too."""
    try:
        return text(nv.nvmlDeviceGetPciInfo(handle).busId)
    except nv.NVMLError:
        return None


def text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
