"""Faults of simulated GPUs. A fault is a change of one GPU's record, plus the events the driver would send."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Self

from watchdog.simulator.control import StateFile
from watchdog.simulator.errors import SimulatorError
from watchdog.simulator.layout import MAX_GPUS, NVLINK_COUNTERS, NVLINKS, EventRecord, EventType, Feature, GpuRecord
from watchdog.simulator.library import library_dir
from watchdog.simulator.records import (
    CLOCK_REASONS,
    FABRIC_ROUTE_UNHEALTHY_MASK,
    FABRIC_UNHEALTHY,
    GpuState,
    Throttle,
    describe,
    find,
    make_healthy,
    new_uuid,
)

UNKNOWN_ERROR = 999
"""NVML_ERROR_UNKNOWN."""
STATE_VARIABLE = "ELASTIC_NVML_SIMULATOR"
STATE_NAME = "nvml-simulator.state"


def state_path(runtime_dir: Path) -> Path:
    return runtime_dir / STATE_NAME


def create(runtime_dir: Path, gpus: int, spares: int = 0, *, nvlinks: int = NVLINKS) -> Simulator:
    """Power up `gpus` + `spares` healthy GPUs (at most 72 together) with `nvlinks` links each.

    GPUs that this directory had before keep their UUIDs and lose their faults; a driver that is in use sees the
    change. Raises NotBuilt, and SimulatorError for numbers that do not fit or a directory that cannot be written.
    """
    total = gpus + spares
    if gpus < 0 or spares < 0 or not 1 <= total <= MAX_GPUS:
        raise SimulatorError(
            f"{gpus} simulated GPUs and {spares} spare ones: from 1 to {MAX_GPUS} together are possible"
        )
    if not 0 <= nvlinks <= NVLINKS:
        raise SimulatorError(f"{nvlinks} NVLinks per simulated GPU: from 0 to {NVLINKS} are possible")
    state = StateFile.create(state_path(runtime_dir))

    def power_up(index: int, record: GpuRecord) -> None:
        if not record.uuid:
            record.uuid = new_uuid()
            record.generation = 1
        record.spare = index >= gpus
        make_healthy(record)
        record.unsupported = 0 if nvlinks else Feature.NVLINK | Feature.FABRIC
        record.nvlinks = nvlinks
        record.nvlinks_up = (1 << nvlinks) - 1

    state.rewrite(total, power_up)
    return Simulator(state)


def driver_environment(runtime_dir: Path) -> dict[str, str]:
    """Variables for a child that is to call NVML on the simulated GPUs, to be laid over its environment.

    Only for such children, never for a process that imports vLLM. Raises NotBuilt.
    """
    inherited = os.environ.get("LD_LIBRARY_PATH")
    search = str(library_dir()) + (f":{inherited}" if inherited else "")
    return {"LD_LIBRARY_PATH": search, STATE_VARIABLE: str(state_path(runtime_dir).absolute())}


class Simulator:
    """Injects faults; any number of processes may do so at once. A GPU is named by its index here or by its UUID.

    Methods raise UnknownGpu for another name and SimulatorError for a value that is out of range. A change is visible
    to the driver's users when the method returns; processes that wait for an event have been woken.
    """

    def __init__(self, state: StateFile) -> None:
        self._state = state

    @classmethod
    def open(cls, runtime_dir: Path) -> Self:
        """Raises NoState where `create` has not been called with this directory."""
        return cls(StateFile.open(state_path(runtime_dir)))

    def close(self) -> None:
        self._state.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def list(self) -> tuple[GpuState, ...]:
        """All GPUs by index, lost ones too."""
        now = time.monotonic_ns()
        return tuple(describe(index, record, now) for index, record in enumerate(self._state.read_all()))

    def lose(self, gpu: int | str, *, event: bool = False) -> None:
        """Off the bus: every call for it answers GPU_IS_LOST, and it is not counted after NVML is initialised again.

        With `event` the driver says so first (GPU unavailable); it often does not get to.
        """
        self._set(gpu, *([event_of(EventType.GPU_UNAVAILABLE)] if event else []), lost=1)

    def reset_required(self, gpu: int | str) -> None:
        """Calls answer RESET_REQUIRED, apart from those for its identity and the driver's recovery action."""
        self._set(gpu, reset_required=1)

    def driver_error(self, gpu: int | str, code: int = UNKNOWN_ERROR) -> None:
        """Calls answer this NVML error (nvmlReturn_t), apart from those for its identity."""
        self._set(gpu, error=positive("an NVML error", code))

    def xid(self, gpu: int | str, code: int) -> None:
        """An Xid event, nothing else: combine it with `lose` and the like where the driver would."""
        self._set(gpu, event_of(EventType.XID, positive("an Xid", code)))

    def ecc(self, gpu: int | str, count: int = 1, *, corrected: bool = False) -> None:
        """`count` more memory errors, volatile and aggregate, and one event."""
        positive("a number of ECC errors", count)

        def change(record: GpuRecord) -> None:
            counters = record.ecc[0 if corrected else 1]
            counters[0] += count
            counters[1] += count

        kind = EventType.SINGLE_BIT_ECC if corrected else EventType.DOUBLE_BIT_ECC
        self._change(gpu, change, event_of(kind))

    def remap_failure(self, gpu: int | str) -> None:
        """A row of memory went bad and could not be remapped."""

        def change(record: GpuRecord) -> None:
            record.remapped_uncorrected += 1
            record.remap_failure = 1

        self._change(gpu, change)

    def remap_pending(self, gpu: int | str) -> None:
        """A row of memory went bad and is remapped at the next reset."""

        def change(record: GpuRecord) -> None:
            record.remapped_uncorrected += 1
            record.remap_pending = 1

        self._change(gpu, change)

    def recovery_action(self, gpu: int | str, action: int) -> None:
        """What field 230 answers (0 none, 1 reset, 2 reboot, 3 drain P2P, 4 drain and reset, ...), and its event."""
        if not 0 <= action <= 255:
            raise SimulatorError(f"recovery action {action}: from 0 to 255 are possible")
        self._set(gpu, event_of(EventType.RECOVERY_ACTION), recovery_action=action)

    def throttle(self, gpu: int | str, reason: Throttle = Throttle.THERMAL) -> None:
        self._set(gpu, clock_reasons=CLOCK_REASONS[reason])

    def temperature(self, gpu: int | str, celsius: int) -> None:
        if not 0 <= celsius <= 200:
            raise SimulatorError(f"a temperature of {celsius} C: from 0 to 200 are possible")
        self._set(gpu, temperature_c=celsius)

    def hang(self, gpu: int | str) -> None:
        """Calls for this GPU, also for its handle, never return until it is healed or replaced.

        Waiting for events does not touch the GPU and goes on.
        """
        self._set(gpu, hang=1)

    def latency(self, gpu: int | str, delay: timedelta) -> None:
        """Every call for this GPU takes this much longer; zero ends it."""
        milliseconds = round(delay / timedelta(milliseconds=1))
        if not 0 <= milliseconds <= 3_600_000:
            raise SimulatorError(f"a latency of {milliseconds} ms: from 0 to an hour are possible")
        self._set(gpu, latency_ms=milliseconds)

    def flap(self, gpu: int | str, period: timedelta = timedelta(seconds=2)) -> None:
        """Lost for half a period, back for the other half, and so on, lost first; the driver goes by the clock."""
        period_ns = round(period / timedelta(microseconds=1)) * 1000
        if period_ns < 2_000_000:
            raise SimulatorError(f"a period of {period_ns / 1e6} ms: at least 2 ms are needed")
        self._set(gpu, flap_start_ns=time.monotonic_ns(), flap_period_ns=period_ns)

    def occupy(self, gpu: int | str, pid: int) -> None:
        """A process, of whatever name, computes on it; it need not be there."""
        self._set(gpu, process=positive("a pid", pid))

    def replace(self, gpu: int | str) -> str:
        """Put another, healthy GPU in its place; returns the new UUID. Handles of the old one answer GPU_IS_LOST."""
        replacement = new_uuid()

        def change(record: GpuRecord) -> None:
            record.uuid = replacement
            record.generation += 1
            make_healthy(record)

        self._change(gpu, change)
        return replacement.decode()

    def heal(self, gpu: int | str) -> None:
        """Clear all faults and counters; calls that hang go on. Unsupported features stay unsupported."""
        self._change(gpu, make_healthy)

    def nvlink_down(self, gpu: int | str, link: int) -> None:
        def change(record: GpuRecord) -> None:
            require_link(record, link)
            record.nvlinks_up &= ~(1 << link)

        self._change(gpu, change)

    def nvlink_errors(self, gpu: int | str, link: int, count: int = 1) -> None:
        """`count` more errors of each kind (replay, recovery, CRC flit, CRC data, ECC) on one link."""
        positive("a number of NVLink errors", count)

        def change(record: GpuRecord) -> None:
            require_link(record, link)
            for counter in range(NVLINK_COUNTERS):
                record.nvlink_errors[link][counter] += count

        self._change(gpu, change)

    def fabric_unhealthy(self, gpu: int | str) -> None:
        """The fabric manager reports an unhealthy route to this GPU."""
        self._set(gpu, fabric_health=FABRIC_ROUTE_UNHEALTHY_MASK, fabric_summary=FABRIC_UNHEALTHY)

    def pcie_replays(self, gpu: int | str, count: int = 1) -> None:
        """`count` more PCIe replays; the 32-bit counter wraps, as the driver's does."""
        positive("a number of PCIe replays", count)

        def change(record: GpuRecord) -> None:
            record.pcie_replays = (record.pcie_replays + count) & 0xFFFFFFFF

        self._change(gpu, change)

    def unsupported(self, gpu: int | str, features: Feature) -> None:
        """The features that this GPU lacks from now on, `Feature(0)` for none."""
        self._set(gpu, unsupported=int(features))

    def _set(self, gpu: int | str, *events: EventRecord, **fields: int) -> None:
        def change(record: GpuRecord) -> None:
            for name, value in fields.items():
                setattr(record, name, value)

        self._change(gpu, change, *events)

    def _change(self, gpu: int | str, change: Callable[[GpuRecord], None], *events: EventRecord) -> None:
        self._state.update(lambda records: find(records, gpu), change, events)


def event_of(kind: EventType, data: int = 0) -> EventRecord:
    """Only an Xid has data: nvml.h says of eventData that it is 0 for any other event."""
    return EventRecord(int(kind), data)


def positive(what: str, value: int) -> int:
    if not 1 <= value < 1 << 31:
        raise SimulatorError(f"{what} of {value}: a positive number is needed")
    return value


def require_link(record: GpuRecord, link: int) -> None:
    if not 0 <= link < record.nvlinks:
        raise SimulatorError(f"no NVLink {link}: this simulated GPU has {record.nvlinks} links, from 0")
