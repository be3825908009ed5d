"""The unmodified pynvml against the simulated driver: what it answers to each call, and with each fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml
import pytest

from tests.contract.nvml_child import FABRIC, NvmlChild, code_of
from watchdog.simulator import (
    NVLINKS,
    Feature,
    Simulator,
    Throttle,
    create,
    driver_environment,
)

pytestmark = [pytest.mark.contract, pytest.mark.timeout(60), pytest.mark.usefixtures("driver_library")]

LOST = pynvml.NVML_ERROR_GPU_IS_LOST
RESET = pynvml.NVML_ERROR_RESET_REQUIRED
UNSUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED
INVALID = pynvml.NVML_ERROR_INVALID_ARGUMENT

FIELD = "[(v.nvmlReturn, v.value.ullVal) for v in n.nvmlDeviceGetFieldValues(gpu(1), {})]"


# What a healthy GPU answers: (call on GPU 1, value).
HEALTHY: list[tuple[str, Any]] = [
    ("n.nvmlSystemGetDriverVersion()", "580.0-simulated"),
    ("n.nvmlSystemGetNVMLVersion()", "13.580.0-simulated"),
    ("n.nvmlSystemGetCudaDriverVersion()", 13000),
    ("n.nvmlSystemGetCudaDriverVersion_v2()", 13000),
    ("n.nvmlErrorString(15)", "GPU is lost"),
    ("n.nvmlDeviceGetCount()", 4),
    ("n.nvmlDeviceGetName(gpu(1))", "Elastic Simulated GPU"),
    ("n.nvmlDeviceGetIndex(gpu(1))", 1),
    ("n.nvmlDeviceGetMinorNumber(gpu(1))", 1),
    ("n.nvmlDeviceGetPciInfo(gpu(1)).busId", "00000000:02:00.0"),
    ("n.nvmlDeviceGetPciInfo(gpu(1)).busIdLegacy", "0000:02:00.0"),
    ("n.nvmlDeviceGetIndex(n.nvmlDeviceGetHandleByPciBusId('00000000:02:00.0'))", 1),
    ("n.nvmlDeviceGetIndex(n.nvmlDeviceGetHandleByUUID(n.nvmlDeviceGetUUID(gpu(1))))", 1),
    ("n.nvmlDeviceGetMemoryInfo(gpu(1)).total", 80 << 30),
    ("n.nvmlDeviceGetMemoryInfo(gpu(1), version=n.nvmlMemory_v2).free", 79 << 30),
    ("n.nvmlDeviceGetTemperature(gpu(1), n.NVML_TEMPERATURE_GPU)", 45),
    ("n.nvmlDeviceGetTemperatureV(gpu(1), n.NVML_TEMPERATURE_GPU)", 45),
    ("n.nvmlDeviceGetTemperatureThreshold(gpu(1), n.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN)", 89),
    ("n.nvmlDeviceGetUtilizationRates(gpu(1)).gpu", 0),
    ("n.nvmlDeviceGetPowerUsage(gpu(1))", 120_000),
    ("n.nvmlDeviceGetEnforcedPowerLimit(gpu(1))", 700_000),
    ("n.nvmlDeviceGetComputeRunningProcesses(gpu(1))", []),
    ("n.nvmlDeviceGetPersistenceMode(gpu(1))", 1),
    ("n.nvmlDeviceGetMigMode(gpu(1))", [0, 0]),
    ("n.nvmlDeviceGetArchitecture(gpu(1))", pynvml.NVML_DEVICE_ARCH_HOPPER),
    ("n.nvmlDeviceGetCudaComputeCapability(gpu(1))", [9, 0]),
    ("n.nvmlDeviceGetEccMode(gpu(1))", [1, 1]),
    ("n.nvmlDeviceGetTotalEccErrors(gpu(1), 1, 0)", 0),
    ("n.nvmlDeviceGetRemappedRows(gpu(1))", [0, 0, 0, 0]),
    ("n.nvmlDeviceGetPcieReplayCounter(gpu(1))", 0),
    ("n.nvmlDeviceGetCurrentClocksEventReasons(gpu(1))", 0),
    ("n.nvmlDeviceGetSupportedClocksEventReasons(gpu(1))", 0x1FF),
    ("n.nvmlDeviceGetCurrentClocksThrottleReasons(gpu(1))", 0),
    ("n.nvmlDeviceGetSupportedEventTypes(gpu(1))", 0xFF9F),
    ("[n.nvmlDeviceGetNvLinkState(gpu(1), link) for link in range(18)]", [1] * NVLINKS),
    ("n.nvmlDeviceGetNvLinkRemoteDeviceType(gpu(1), 0)", pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH),
    ("n.nvmlDeviceGetNvLinkRemotePciInfo(gpu(1), 1).busId", "00000000:E1:00.0"),
    ("n.nvmlDeviceGetNvLinkErrorCounter(gpu(1), 0, n.NVML_NVLINK_ERROR_DL_REPLAY)", 0),
    ("fabric(gpu(1), n.c_nvmlGpuFabricInfo_v2_t)", [3, 0, 1, 0x1AA, None]),
    ("fabric(gpu(1), n.c_nvmlGpuFabricInfo_v3_t)", [3, 0, 1, 0x1AA, 1]),
    (FIELD.format([230, 999, (161, 0), (162, 1), (163, 2), 91]), [[0, 0], [3, 0], [0, 0], [0, 0], [0, 0], [0, 18]]),
]


def test_a_healthy_gpu_answers_everything(child: NvmlChild) -> None:
    child(FABRIC)
    assert [(call, child(call)) for call, _ in HEALTHY] == HEALTHY


def test_arguments_that_nvml_refuses(child: NvmlChild) -> None:
    assert code_of(child, "gpu(4)") == INVALID
    assert code_of(child, "n.nvmlDeviceGetUUID(n.c_nvmlDevice_t())") == INVALID
    assert code_of(child, "n.nvmlDeviceGetHandleByUUID('GPU-none')") == pynvml.NVML_ERROR_NOT_FOUND
    assert code_of(child, "n.nvmlDeviceGetNvLinkState(gpu(0), 18)") == INVALID
    assert code_of(child, "n.nvmlDeviceGetTotalEccErrors(gpu(0), 2, 0)") == INVALID
    assert code_of(child, "n.nvmlDeviceGetMemoryInfo(gpu(0), version=7)") == pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH
    assert code_of(child, "n.nvmlDeviceGetRetiredPagesPendingStatus(gpu(0))") == UNSUPPORTED
    assert code_of(child, "n.nvmlDeviceGetFanSpeed(gpu(0))") == pynvml.NVML_ERROR_FUNCTION_NOT_FOUND
    child("n.nvmlShutdown()")
    assert code_of(child, "n.nvmlDeviceGetCount()") == pynvml.NVML_ERROR_UNINITIALIZED
    assert code_of(child, "n.nvmlShutdown()") == pynvml.NVML_ERROR_UNINITIALIZED


# What one fault changes: (fault, call on GPU 1, value).
FAULTS: dict[str, tuple[Callable[[Simulator], object], str, Any]] = {
    "uncorrectable-total": (lambda s: s.ecc(1, 3), "n.nvmlDeviceGetTotalEccErrors(gpu(1), 1, 0)", 3),
    "uncorrectable-aggregate": (lambda s: s.ecc(1, 3), "n.nvmlDeviceGetTotalEccErrors(gpu(1), 1, 1)", 3),
    "corrected-total": (lambda s: s.ecc(1, 5, corrected=True), "n.nvmlDeviceGetTotalEccErrors(gpu(1), 0, 0)", 5),
    "ecc-location": (
        lambda s: s.ecc(1, 3),
        "[n.nvmlDeviceGetMemoryErrorCounter(gpu(1), 1, 0, where) for where in range(8)]",
        [0, 0, 3, 0, 0, 0, 0, 0],
    ),
    "ecc-detail": (lambda s: s.ecc(1), "n.nvmlDeviceGetDetailedEccErrors(gpu(1), 1, 0).deviceMemory", 1),
    "ecc-fields": (lambda s: s.ecc(1, 2), FIELD.format([3, 4, 5, 6]), [[0, 0], [0, 2], [0, 0], [0, 2]]),
    "remap-failure": (lambda s: s.remap_failure(1), "n.nvmlDeviceGetRemappedRows(gpu(1))", [0, 1, 0, 1]),
    "remap-pending": (lambda s: s.remap_pending(1), "n.nvmlDeviceGetRemappedRows(gpu(1))", [0, 1, 1, 0]),
    "remap-fields": (
        lambda s: s.remap_failure(1),
        FIELD.format([142, 143, 144, 145]),
        [[0, 0], [0, 1], [0, 0], [0, 1]],
    ),
    "recovery-action": (lambda s: s.recovery_action(1, 4), FIELD.format([230]), [[0, 4]]),
    "thermal": (lambda s: s.throttle(1), "n.nvmlDeviceGetCurrentClocksEventReasons(gpu(1))", 0x48),
    "power-brake": (
        lambda s: s.throttle(1, Throttle.POWER_BRAKE),
        "n.nvmlDeviceGetCurrentClocksEventReasons(gpu(1))",
        0x88,
    ),
    "hw-slowdown": (
        lambda s: s.throttle(1, Throttle.HW_SLOWDOWN),
        "n.nvmlDeviceGetCurrentClocksEventReasons(gpu(1))",
        0x8,
    ),
    "temperature": (lambda s: s.temperature(1, 91), "n.nvmlDeviceGetTemperature(gpu(1), 0)", 91),
    "pcie-replays": (lambda s: s.pcie_replays(1, 7), "n.nvmlDeviceGetPcieReplayCounter(gpu(1))", 7),
    "pcie-field": (lambda s: s.pcie_replays(1, 7), FIELD.format([94]), [[0, 7]]),
    "nvlink-down": (
        lambda s: s.nvlink_down(1, 17),
        "[n.nvmlDeviceGetNvLinkState(gpu(1), link) for link in (0, 16, 17)]",
        [1, 1, 0],
    ),
    "nvlink-state-field": (lambda s: s.nvlink_down(1, 2), FIELD.format([(165, 2), (165, 3)]), [[0, 0], [0, 1]]),
    "nvlink-errors": (
        lambda s: s.nvlink_errors(1, 3, 6),
        "[n.nvmlDeviceGetNvLinkErrorCounter(gpu(1), 3, kind) for kind in range(5)]",
        [6] * 5,
    ),
    "nvlink-fields": (
        lambda s: (s.nvlink_errors(1, 3, 6), s.nvlink_errors(1, 4)),
        FIELD.format([(161, 3), (162, 4), (163, 5), (161, 0xFFFFFFFF), 38, 160]),
        [[0, 6], [0, 1], [0, 0], [0, 7], [0, 7], [0, 7]],
    ),
    "process": (
        lambda s: s.occupy(1, 4711),
        "[(one.pid, one.usedGpuMemory >> 20) for one in n.nvmlDeviceGetComputeRunningProcesses(gpu(1))]",
        [[4711, 512]],
    ),
    "fabric": (lambda s: s.fabric_unhealthy(1), "fabric(gpu(1), n.c_nvmlGpuFabricInfo_v3_t)", [3, 0, 1, 0x19A, 2]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_shows_and_heals(shared: tuple[Simulator, NvmlChild], name: str) -> None:
    simulator, child = shared
    fault, call, value = FAULTS[name]
    healthy = child(call)
    other = call.replace("gpu(1)", "gpu(2)")
    assert healthy != value
    fault(simulator)
    assert child(call) == value
    assert child(other) == healthy
    assert simulator.list()[1].faults
    simulator.heal(1)
    assert child(call) == healthy
    assert not simulator.list()[1].faults


# Every call with a handle, on `h`.
CALLS = [call.replace("gpu(1)", "h") for call, _ in HEALTHY if "gpu(1)" in call]
IDENTITY = ("UUID", "Name", "Index", "MinorNumber", "PciInfo", "Architecture", "ComputeCapability")


def test_every_call_on_a_lost_gpu_says_so(shared: tuple[Simulator, NvmlChild]) -> None:
    simulator, child = shared
    child("h = gpu(1)")
    simulator.lose(1)
    try:
        assert {code_of(child, call) for call in [*CALLS, "gpu(1)", "listen(1)"]} == {LOST}
        assert child("n.nvmlDeviceGetCount()") == 4
    finally:
        simulator.heal(1)
    child(CALLS[0])


def test_a_lost_gpu_is_not_counted_after_a_new_start(simulator: Simulator, child: NvmlChild) -> None:
    uuids = [gpu.uuid for gpu in simulator.list()]
    simulator.lose(uuids[1])
    child.restart_nvml()
    assert child("[n.nvmlDeviceGetUUID(gpu(i)) for i in range(n.nvmlDeviceGetCount())]") == uuids[:1] + uuids[2:]
    assert code_of(child, f"n.nvmlDeviceGetHandleByUUID({uuids[1]!r})") == pynvml.NVML_ERROR_NOT_FOUND
    simulator.heal(uuids[1])
    assert child("n.nvmlDeviceGetCount()") == 3
    child.restart_nvml()
    assert child("n.nvmlDeviceGetCount()") == 4


def test_reset_required_leaves_identity_and_the_recovery_action(shared: tuple[Simulator, NvmlChild]) -> None:
    simulator, child = shared
    child("h = gpu(1)")
    simulator.reset_required(1)
    simulator.recovery_action(1, 1)
    try:
        for call in CALLS:
            if any(f"DeviceGet{name}" in call for name in IDENTITY) or "FieldValues" in call:
                child(call)
            elif "Cuda" not in call:
                assert code_of(child, call) == RESET, call
        assert child(FIELD.format([230, 94])) == [[0, 1], [RESET, 0]]
    finally:
        simulator.heal(1)


def test_an_unexpected_error_leaves_identity(shared: tuple[Simulator, NvmlChild]) -> None:
    simulator, child = shared
    child("h = gpu(1)")
    simulator.driver_error(1)
    try:
        for call in CALLS:
            if any(f"DeviceGet{name}" in call for name in IDENTITY):
                child(call)
            elif "Cuda" not in call:
                assert code_of(child, call) == pynvml.NVML_ERROR_UNKNOWN, call
    finally:
        simulator.heal(1)


@pytest.mark.parametrize(
    ("feature", "calls", "fields"),
    [
        (Feature.ECC, ["n.nvmlDeviceGetTotalEccErrors(gpu(1), 1, 0)", "n.nvmlDeviceGetEccMode(gpu(1))"], [4]),
        (Feature.REMAPPED_ROWS, ["n.nvmlDeviceGetRemappedRows(gpu(1))"], [145]),
        (Feature.RECOVERY_ACTION, [], [230]),
        (Feature.NVLINK, ["n.nvmlDeviceGetNvLinkState(gpu(1), 0)"], [(161, 0), (162, 0), (163, 0), 91]),
        (Feature.FABRIC, ["fabric(gpu(1), n.c_nvmlGpuFabricInfo_v2_t)"], []),
        (Feature.PCIE_REPLAY, ["n.nvmlDeviceGetPcieReplayCounter(gpu(1))"], [94]),
        (Feature.CLOCK_REASONS, ["n.nvmlDeviceGetCurrentClocksEventReasons(gpu(1))"], []),
        (Feature.TEMPERATURE, ["n.nvmlDeviceGetTemperature(gpu(1), 0)"], []),
        (Feature.EVENTS, ["n.nvmlDeviceGetSupportedEventTypes(gpu(1))", "listen(1)"], []),
        (Feature.NEW_EVENTS, ["listen(1, types=n.nvmlEventTypeGpuRecoveryAction)"], []),
    ],
)
def test_what_a_gpu_lacks_is_not_supported(
    shared: tuple[Simulator, NvmlChild], feature: Feature, calls: list[str], fields: list[object]
) -> None:
    simulator, child = shared
    simulator.unsupported(1, feature)
    try:
        assert [code_of(child, call) for call in calls] == [UNSUPPORTED] * len(calls)
        if fields:
            assert child(FIELD.format(fields)) == [[UNSUPPORTED, 0]] * len(fields)
        assert child(FIELD.format([1 if feature is not Feature.ECC else 94]))[0][0] == 0
    finally:
        simulator.unsupported(1, Feature(0))


def test_gpus_without_nvlinks(tmp_path: Path) -> None:
    with create(tmp_path, gpus=1, nvlinks=0), NvmlChild(driver_environment(tmp_path)) as child:
        assert code_of(child, "n.nvmlDeviceGetNvLinkState(gpu(0), 0)") == UNSUPPORTED
        assert child("n.nvmlDeviceGetFieldValues(gpu(0), [161])[0].nvmlReturn") == UNSUPPORTED
