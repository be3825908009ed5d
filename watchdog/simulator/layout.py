"""The state file as Python sees it. `native/state.h` is the definition; `control.py` compares the two at load."""

from __future__ import annotations

from ctypes import Structure, c_char, c_uint8, c_uint32, c_uint64
from enum import IntFlag

LAYOUT = 1
MAX_GPUS = 72
NVLINKS = 18
NVLINK_COUNTERS = 5
EVENT_SLOTS = 1024


class Feature(IntFlag):
    """What a GPU can lack; calls for it then answer NVML_ERROR_NOT_SUPPORTED."""

    ECC = 1 << 0
    REMAPPED_ROWS = 1 << 1
    RECOVERY_ACTION = 1 << 2
    NVLINK = 1 << 3
    FABRIC = 1 << 4
    PCIE_REPLAY = 1 << 5
    CLOCK_REASONS = 1 << 6
    TEMPERATURE = 1 << 7
    EVENTS = 1 << 8
    NEW_EVENTS = 1 << 9  # GPU unavailable, recovery action


class EventType(IntFlag):
    """As in nvml.h (nvidia-ml-py 13.615.71, `nvmlEventType*`)."""

    SINGLE_BIT_ECC = 0x1
    DOUBLE_BIT_ECC = 0x2
    XID = 0x8
    GPU_UNAVAILABLE = 0x4000
    RECOVERY_ACTION = 0x8000


class GpuRecord(Structure):
    """`struct sim_gpu`."""

    _fields_ = [
        ("uuid", c_char * 48),
        ("name", c_char * 64),
        ("generation", c_uint32),
        ("spare", c_uint32),
        ("lost", c_uint32),
        ("reset_required", c_uint32),
        ("hang", c_uint32),
        ("latency_ms", c_uint32),
        ("flap_start_ns", c_uint64),
        ("flap_period_ns", c_uint64),
        ("unsupported", c_uint64),
        ("clock_reasons", c_uint64),
        ("memory_total", c_uint64),
        ("memory_used", c_uint64),
        ("ecc", c_uint64 * 2 * 2),
        ("temperature_c", c_uint32),
        ("power_mw", c_uint32),
        ("utilization_percent", c_uint32),
        ("recovery_action", c_uint32),
        ("remapped_corrected", c_uint32),
        ("remapped_uncorrected", c_uint32),
        ("remap_pending", c_uint32),
        ("remap_failure", c_uint32),
        ("pcie_replays", c_uint32),
        ("nvlinks", c_uint32),
        ("nvlinks_up", c_uint64),
        ("nvlink_errors", c_uint64 * NVLINK_COUNTERS * NVLINKS),
        ("fabric_state", c_uint32),
        ("fabric_status", c_uint32),
        ("fabric_clique", c_uint32),
        ("fabric_health", c_uint32),
        ("fabric_summary", c_uint32),
        ("error", c_uint32),
        ("process", c_uint32),
        ("fabric_cluster", c_uint8 * 16),
    ]


class EventRecord(Structure):
    """What an injection asks for: `struct sim_event` without its sequence number."""

    _fields_ = [("type", c_uint64), ("data", c_uint64)]
