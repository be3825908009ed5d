"""One GPU's record: what it is when healthy, and what can be read off it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from watchdog.simulator.errors import UnknownGpu
from watchdog.simulator.layout import GpuRecord

NAME = b"Elastic Simulated GPU"
MEMORY_BYTES = 80 << 30
MEMORY_USED_BYTES = 1 << 30
TEMPERATURE_C = 45
POWER_MW = 120_000
UTILIZATION_PERCENT = 0

FABRIC_COMPLETED = 3
FABRIC_HEALTHY_MASK = 0x1AA  # bandwidth, routes and access good, configuration right (NVML_GPU_FABRIC_HEALTH_MASK_*)
FABRIC_ROUTE_UNHEALTHY_MASK = FABRIC_HEALTHY_MASK & ~0x30 | 0x10
FABRIC_HEALTHY, FABRIC_UNHEALTHY = 1, 2  # NVML_GPU_FABRIC_HEALTH_SUMMARY_*


class Throttle(StrEnum):
    """Why clocks are lowered. Values of a hardware slowdown set its general bit too, as the driver does."""

    NONE = "none"
    THERMAL = "thermal"
    POWER_BRAKE = "power-brake"
    SW_THERMAL = "sw-thermal"
    HW_SLOWDOWN = "hw-slowdown"  # the general bit alone: a reason that the driver does not give
    POWER_CAP = "power-cap"


CLOCK_REASONS = {
    Throttle.NONE: 0x0,
    Throttle.THERMAL: 0x40 | 0x8,
    Throttle.POWER_BRAKE: 0x80 | 0x8,
    Throttle.SW_THERMAL: 0x20,
    Throttle.HW_SLOWDOWN: 0x8,
    Throttle.POWER_CAP: 0x4,
}
"""nvmlClocksEventReason* of nvidia-ml-py."""


@dataclass(frozen=True)
class GpuState:
    """One simulated GPU as `list` shows it. `faults` is empty for a healthy one."""

    index: int
    uuid: str
    name: str
    spare: bool
    lost: bool  # now; changes with time while it flaps
    temperature_c: int
    recovery_action: int
    faults: tuple[str, ...]


def new_uuid() -> bytes:
    return f"GPU-{uuid.uuid4()}".encode()


def make_healthy(record: GpuRecord) -> None:
    """Clear all faults and counters; identity, links and unsupported features stay."""
    fresh = GpuRecord(
        uuid=record.uuid,
        name=record.name or NAME,
        generation=record.generation,
        spare=record.spare,
        unsupported=record.unsupported,
        memory_total=MEMORY_BYTES,
        memory_used=MEMORY_USED_BYTES,
        temperature_c=TEMPERATURE_C,
        power_mw=POWER_MW,
        utilization_percent=UTILIZATION_PERCENT,
        nvlinks=record.nvlinks,
        nvlinks_up=(1 << record.nvlinks) - 1,
        fabric_state=FABRIC_COMPLETED,
        fabric_clique=1,
        fabric_health=FABRIC_HEALTHY_MASK,
        fabric_summary=FABRIC_HEALTHY,
    )
    fresh.fabric_cluster[:] = range(16)
    for name, *_ in GpuRecord._fields_:
        setattr(record, name, getattr(fresh, name))


def find(records: Sequence[GpuRecord], gpu: int | str) -> int:
    """The index of a GPU named by index (also as text) or UUID. Raises UnknownGpu."""
    text = str(gpu)
    if text.isascii() and text.isdigit():
        if int(text) < len(records):
            return int(text)
        raise UnknownGpu(f"no simulated GPU {text}: the indices are 0 to {len(records) - 1}")
    for index, record in enumerate(records):
        if record.uuid.decode() == text:
            return index
    raise UnknownGpu(
        f"no simulated GPU {text!r}: give an index from 0 to {len(records) - 1} or a UUID that `list` shows"
    )


def describe(index: int, record: GpuRecord, now_ns: int) -> GpuState:
    """What `list` shows of one GPU at `now_ns` of the monotonic clock."""
    return GpuState(
        index=index,
        uuid=record.uuid.decode(),
        name=record.name.decode(),
        spare=bool(record.spare),
        lost=is_lost(record, now_ns),
        temperature_c=record.temperature_c,
        recovery_action=record.recovery_action,
        faults=tuple(faults(record)),
    )


def is_lost(record: GpuRecord, now_ns: int) -> bool:
    """The rule of `sim_lost` in native/state.c."""
    if record.lost or not record.flap_period_ns:
        return bool(record.lost)
    return int((now_ns - record.flap_start_ns) // (record.flap_period_ns // 2)) % 2 == 0


def faults(record: GpuRecord) -> list[str]:
    """The faults in a record, one short text each."""
    found = []
    if record.lost:
        found.append("lost")
    if record.reset_required:
        found.append("reset required")
    if record.error:
        found.append(f"error {record.error}")
    if record.hang:
        found.append("hangs")
    if record.latency_ms:
        found.append(f"latency {record.latency_ms} ms")
    if record.flap_period_ns:
        found.append(f"flaps every {record.flap_period_ns / 1e9:g} s")
    if record.recovery_action:
        found.append(f"recovery action {record.recovery_action}")
    if record.ecc[1][0]:
        found.append(f"{record.ecc[1][0]} uncorrectable ECC errors")
    if record.ecc[0][0]:
        found.append(f"{record.ecc[0][0]} corrected ECC errors")
    if record.remap_failure:
        found.append("row remapping failed")
    if record.remap_pending:
        found.append("row remapping pending")
    found += [f"throttled: {reason}" for reason, bits in CLOCK_REASONS.items() if bits and record.clock_reasons == bits]
    if record.temperature_c != TEMPERATURE_C:
        found.append(f"temperature {record.temperature_c} C")
    down = [link for link in range(record.nvlinks) if not record.nvlinks_up >> link & 1]
    if down:
        found.append("NVLink down: " + ", ".join(map(str, down)))
    if any(any(link) for link in record.nvlink_errors):
        found.append("NVLink errors")
    if record.fabric_summary == FABRIC_UNHEALTHY:
        found.append("fabric unhealthy")
    if record.process:
        found.append(f"in use by process {record.process}")
    if record.pcie_replays:
        found.append(f"{record.pcie_replays} PCIe replays")
    return found
