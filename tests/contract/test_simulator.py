"""The unmodified pynvml, in processes of its own, against the simulated driver."""

from __future__ import annotations

import fcntl
import mmap
import re
import shutil
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pynvml
import pytest

from tests.contract.nvml_child import NvmlChild, NvmlError
from watchdog.simulator import (
    MAX_GPUS,
    NVLINKS,
    BuildError,
    Feature,
    NoState,
    NotBuilt,
    Simulator,
    SimulatorError,
    Throttle,
    UnknownGpu,
    build_libraries,
    control,
    create,
    driver_environment,
    library,
    library_dir,
)
from watchdog.simulator.layout import EVENT_SLOTS, GpuRecord
from watchdog.simulator.simulator import state_path

pytestmark = [pytest.mark.contract, pytest.mark.timeout(60)]

LOST = pynvml.NVML_ERROR_GPU_IS_LOST
RESET = pynvml.NVML_ERROR_RESET_REQUIRED
UNSUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED
INVALID = pynvml.NVML_ERROR_INVALID_ARGUMENT
TIMEOUT = pynvml.NVML_ERROR_TIMEOUT

RELEASE_S = 0.3
"""A call that has not returned for this long hangs."""

FIELD = "[(v.nvmlReturn, v.value.ullVal) for v in n.nvmlDeviceGetFieldValues(gpu(1), {})]"

FABRIC = """
def fabric(device, kind):
    info = kind()
    n.nvmlDeviceGetGpuFabricInfoV(device, n.byref(info))
    return [info.state, info.status, info.cliqueId, info.healthMask, getattr(info, "healthSummary", None)]
"""

LISTEN = """
def listen(*indices, types=n.nvmlEventTypeXidCriticalError):
    events = n.nvmlEventSetCreate()
    for index in indices:
        n.nvmlDeviceRegisterEvents(gpu(index), types, events)
    return events

def wait(events, timeout_ms=5000):
    data = n.nvmlEventSetWait_v2(events, timeout_ms)
    return [n.nvmlDeviceGetIndex(data.device), data.eventType, data.eventData]

def drain(events):
    found = []
    try:
        while True:
            found.append(wait(events, 0)[2])
    except n.NVMLError_Timeout:
        return found
"""


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    build_libraries()


@pytest.fixture
def simulator(tmp_path: Path) -> Iterator[Simulator]:
    with create(tmp_path, gpus=4) as simulator:
        yield simulator


@pytest.fixture
def child(simulator: Simulator, tmp_path: Path) -> Iterator[NvmlChild]:
    with NvmlChild(driver_environment(tmp_path)) as child:
        yield child


def code_of(child: NvmlChild, source: str) -> int:
    """The NVML error that this raises in the child."""
    with pytest.raises(NvmlError) as caught:
        child(source)
    return caught.value.code


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
    "fabric": (lambda s: s.fabric_unhealthy(1), "fabric(gpu(1), n.c_nvmlGpuFabricInfo_v3_t)", [3, 0, 1, 0x19A, 2]),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Simulator, NvmlChild]]:
    """One child for the tests that heal what they break."""
    directory = tmp_path_factory.mktemp("shared")
    with create(directory, gpus=4) as simulator, NvmlChild(driver_environment(directory)) as child:
        child(FABRIC)
        child(LISTEN)
        yield simulator, child


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


EVENTS: dict[str, tuple[Callable[[Simulator], object], list[int]]] = {
    "xid": (lambda s: s.xid(2, 79), [2, pynvml.nvmlEventTypeXidCriticalError, 79]),
    "uncorrectable": (lambda s: s.ecc(2), [2, pynvml.nvmlEventTypeDoubleBitEccError, 0]),
    "corrected": (lambda s: s.ecc(2, corrected=True), [2, pynvml.nvmlEventTypeSingleBitEccError, 0]),
    "recovery-action": (lambda s: s.recovery_action(2, 1), [2, pynvml.nvmlEventTypeGpuRecoveryAction, 0]),
}


@pytest.mark.parametrize("name", EVENTS)
def test_an_event_arrives_once(shared: tuple[Simulator, NvmlChild], name: str) -> None:
    simulator, child = shared
    fault, event = EVENTS[name]
    child("e = listen(0, 1, 2, 3, types=0xff9f); other = listen(2, types=n.nvmlEventTypePState)")
    fault(simulator)
    assert child("wait(e)") == event
    assert code_of(child, "wait(e, 20)") == TIMEOUT
    assert code_of(child, "wait(other, 0)") == TIMEOUT
    child("n.nvmlEventSetFree(e); n.nvmlEventSetFree(other)")
    simulator.heal(2)


def test_the_event_of_a_gpu_that_is_lost(simulator: Simulator, child: NvmlChild) -> None:
    child(LISTEN)
    child("h = gpu(2); e = listen(0, 2, types=n.nvmlEventTypeGpuUnavailableError)")
    simulator.lose(2, event=True)
    child("data = n.nvmlEventSetWait_v2(e, 1000)")
    # Its UUID cannot be asked any more: the handle says which it is.
    assert code_of(child, "n.nvmlDeviceGetUUID(data.device)") == LOST
    assert child("n.cast(data.device, n.c_void_p).value == n.cast(h, n.c_void_p).value")


def test_each_set_gets_what_it_registered_for_since_then(simulator: Simulator, child: NvmlChild) -> None:
    child(LISTEN)
    child("first = listen(0, 1)")
    simulator.xid(0, 31)
    child("second = listen(0)")
    simulator.xid(1, 43)
    simulator.xid(0, 48)
    child("n.nvmlDeviceRegisterEvents(gpu(1), n.nvmlEventTypeXidCriticalError, second)")
    simulator.xid(1, 13)
    assert [child("drain(first)"), child("drain(second)")] == [[31, 43, 48, 13], [48, 13]]
    assert code_of(child, "n.nvmlEventSetWait_v2(n.c_nvmlEventSet_t(), 0)") == INVALID
    child("n.nvmlShutdown()")
    assert code_of(child, "wait(first, 0)") == pynvml.NVML_ERROR_UNINITIALIZED


def test_events_that_nobody_took_are_overwritten_oldest_first(simulator: Simulator, child: NvmlChild) -> None:
    child(LISTEN)
    child("e = listen(0)")
    for code in range(1, EVENT_SLOTS + 101):
        simulator.xid(0, code)
    assert child("drain(e)") == list(range(101, EVENT_SLOTS + 101))


def test_two_processes_see_one_injection(simulator: Simulator, child: NvmlChild, tmp_path: Path) -> None:
    with NvmlChild(driver_environment(tmp_path)) as other, Simulator.open(tmp_path) as injector:
        for one in (child, other):
            one(LISTEN)
            one("e = listen(3)")
            one.send("wait(e)")
        injector.xid(simulator.list()[3].uuid, 62)
        assert [one.answer(wait_s=2) for one in (child, other)] == [[3, pynvml.nvmlEventTypeXidCriticalError, 62]] * 2
        assert [code_of(one, "wait(e, 0)") for one in (child, other)] == [TIMEOUT] * 2


def test_an_event_wakes_a_blocked_wait_at_once(simulator: Simulator, child: NvmlChild) -> None:
    child(LISTEN)
    child("e = listen(0)")
    late = []
    for _ in range(30):
        child.send("wait(e) and time.monotonic()")
        time.sleep(0.01)  # it is asleep by then; if not, the trial is only easier
        injected = time.monotonic()
        simulator.xid(0, 79)
        late.append(child.answer() - injected)
    print(f"event latency: median {statistics.median(late) * 1e3:.2f} ms, max {max(late) * 1e3:.2f} ms")
    assert statistics.median(late) <= 0.010


def test_a_wait_ends_at_its_time(child: NvmlChild) -> None:
    child(LISTEN)
    child("e = listen(0); before = time.monotonic()")
    assert code_of(child, "wait(e, 100)") == TIMEOUT
    assert 0.1 <= child("time.monotonic() - before") < 2


@pytest.mark.parametrize("call", ["n.nvmlDeviceGetTemperature(h, 0)", "gpu(1)", "n.nvmlDeviceGetHandleByUUID(u)"])
def test_a_hanging_gpu_never_answers_until_it_is_healed(simulator: Simulator, child: NvmlChild, call: str) -> None:
    child("h = gpu(1); u = n.nvmlDeviceGetUUID(h); before = time.process_time()")
    simulator.hang(1)
    child.send(f"{call} and None")
    with pytest.raises(TimeoutError):
        child.answer(RELEASE_S)
    simulator.temperature(1, 50)  # a change that is no cure
    with pytest.raises(TimeoutError):
        child.answer(RELEASE_S)
    simulator.heal(1)
    child.answer()
    assert child("time.process_time() - before") < RELEASE_S  # it slept


def test_a_hang_leaves_other_gpus_and_events_alone(simulator: Simulator, child: NvmlChild) -> None:
    child(LISTEN)
    child("e = listen(0, 1)")
    simulator.hang(1)
    assert child("n.nvmlDeviceGetTemperature(gpu(0), 0)") == 45
    simulator.xid(1, 119)
    assert child("n.nvmlEventSetWait_v2(e, 1000).eventData") == 119
    child.restart_nvml()
    child.send("gpu(1)")
    with pytest.raises(TimeoutError):
        child.answer(RELEASE_S)
    child.process.kill()
    assert child.process.wait(5) == -9


def test_replacing_a_hanging_gpu_ends_the_call(simulator: Simulator, child: NvmlChild) -> None:
    child("h = gpu(1)")
    simulator.hang(1)
    child.send("n.nvmlDeviceGetTemperature(h, 0)")
    simulator.replace(1)
    with pytest.raises(NvmlError) as caught:
        child.answer()
    assert caught.value.code == LOST


def test_latency_delays_each_call(simulator: Simulator, child: NvmlChild) -> None:
    child("h = gpu(1)")
    simulator.latency(1, timedelta(milliseconds=150))
    took = "(time.monotonic(), n.nvmlDeviceGetTemperature({}, 0), time.monotonic())"
    start, _, end = child(took.format("h"))
    assert end - start >= 0.15
    start, _, end = child(took.format("gpu(0)"))
    assert end - start < 0.15
    simulator.latency(1, timedelta(hours=1))
    child.send("n.nvmlDeviceGetTemperature(h, 0)")
    simulator.latency(1, timedelta(0))
    assert child.answer() == 45


def test_flapping_goes_by_the_clock(simulator: Simulator, child: NvmlChild) -> None:
    child("h = gpu(1)")
    child("""
def watch(seconds):
    changes, before, end = [], False, time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            n.nvmlDeviceGetTemperature(h, 0)
            lost = False
        except n.NVMLError_GpuIsLost:
            lost = True
        if lost != before:
            changes.append((lost, time.monotonic()))
        before = lost
        time.sleep(0.005)
    return changes
""")
    period = 0.4
    simulator.flap(1, timedelta(seconds=period))
    started = time.monotonic()
    changes = child(f"watch({2.6 * period})")
    assert [lost for lost, _ in changes] == [i % 2 == 0 for i in range(len(changes))]
    assert 5 <= len(changes) <= 6
    for number, (_, when) in enumerate(changes[1:], 1):
        assert abs(when - started - number * period / 2) < period / 4
    simulator.heal(1)
    assert child("n.nvmlDeviceGetTemperature(h, 0)") == 45


def test_a_replacement_has_a_new_uuid_and_no_faults(simulator: Simulator, child: NvmlChild) -> None:
    child(LISTEN)
    child("h = gpu(1); e = listen(1)")
    simulator.ecc(1)
    old = simulator.list()[1].uuid
    new = simulator.replace(1)
    assert new != old and simulator.list()[1].uuid == new and not simulator.list()[1].faults
    assert code_of(child, "n.nvmlDeviceGetUUID(h)") == LOST
    simulator.xid(1, 79)
    assert code_of(child, "wait(e, 0)") == TIMEOUT  # it was registered for the old one
    child.restart_nvml()
    assert child("[n.nvmlDeviceGetCount(), n.nvmlDeviceGetUUID(gpu(1))]") == [4, new]


def test_a_full_rack(tmp_path: Path) -> None:
    with create(tmp_path, gpus=64, spares=8) as simulator, NvmlChild(driver_environment(tmp_path)) as child:
        child(LISTEN)
        child("e = listen(*range(72))")
        uuids = child("[n.nvmlDeviceGetUUID(gpu(i)) for i in range(n.nvmlDeviceGetCount())]")
        assert uuids == [gpu.uuid for gpu in simulator.list()]
        assert len(set(uuids)) == MAX_GPUS
        assert [gpu.spare for gpu in simulator.list()] == [False] * 64 + [True] * 8
        for index in range(MAX_GPUS):
            simulator.xid(index, index + 1)
        assert child("sorted(wait(e) for _ in range(72))") == [[i, 8, i + 1] for i in range(MAX_GPUS)]


@pytest.mark.parametrize(("gpus", "spares"), [(0, 0), (73, 0), (70, 3), (-1, 4), (4, -1)])
def test_numbers_of_gpus_that_do_not_fit(tmp_path: Path, gpus: int, spares: int) -> None:
    with pytest.raises(SimulatorError, match="1 to 72"):
        create(tmp_path, gpus, spares)
    assert not state_path(tmp_path).exists()


def test_powering_up_again_keeps_the_uuids_and_clears_the_faults(simulator: Simulator, child: NvmlChild) -> None:
    runtime_dir = Path(child("__import__('os').environ['ELASTIC_NVML_SIMULATOR']")).parent
    uuids = [gpu.uuid for gpu in simulator.list()]
    simulator.lose(1)
    with create(runtime_dir, gpus=5, spares=1) as again:
        assert [gpu.uuid for gpu in again.list()][:4] == uuids
        assert not any(gpu.faults for gpu in again.list())
    assert child("n.nvmlDeviceGetUUID(gpu(1))") == uuids[1]
    child.restart_nvml()
    assert child("n.nvmlDeviceGetCount()") == 6


INJECT = """
import sys
from pathlib import Path
from watchdog.simulator import Simulator
with Simulator.open(Path(sys.argv[1])) as simulator:
    for _ in range(int(sys.argv[2])):
        simulator.ecc(0)
        simulator.xid(1, 31)
"""


def test_injections_at_once_are_neither_lost_nor_torn(simulator: Simulator, child: NvmlChild, tmp_path: Path) -> None:
    each, threads = 200, 2
    child(LISTEN)
    child("e = listen(1); found = []; torn = 0")
    processes = [subprocess.Popen([sys.executable, "-c", INJECT, str(tmp_path), str(each)]) for _ in range(2)]

    def inject() -> None:
        for _ in range(each):
            simulator.ecc(0)
            simulator.xid(1, 31)

    workers = [threading.Thread(target=inject) for _ in range(threads)]
    for worker in workers:
        worker.start()
    total = each * (threads + len(processes))
    # Both counters are in one record, which one call reads: they differ only in a torn one.
    child(
        f"""
end = time.monotonic() + 30
while len(found) < {total} and time.monotonic() < end:
    found += drain(e)
    values = [value.value.ullVal for value in n.nvmlDeviceGetFieldValues(gpu(0), [4, 6])]
    torn += values[0] != values[1]
""",
        wait_s=40,
    )
    for worker in workers:
        worker.join(10)
    assert [process.wait(10) for process in processes] == [0, 0]
    assert child("[len(found), torn, n.nvmlDeviceGetTotalEccErrors(gpu(0), 1, 0)]") == [total, 0, total]


FIRST_SLOT = 32
"""offsetof(struct sim_state, slots), which begins with the sequence number."""


def test_a_record_that_is_being_written_is_not_read(simulator: Simulator, child: NvmlChild, tmp_path: Path) -> None:
    temperature = FIRST_SLOT + 8 + GpuRecord.temperature_c.offset
    child("h = gpu(0)")
    with state_path(tmp_path).open("r+b") as file, mmap.mmap(file.fileno(), 0) as state:
        (before,) = struct.unpack_from("<I", state, FIRST_SLOT)
        fcntl.flock(file, fcntl.LOCK_EX)
        struct.pack_into("<I", state, FIRST_SLOT, before + 1)
        struct.pack_into("<I", state, temperature, 99)
        child.send("n.nvmlDeviceGetTemperature(h, 0)")
        with pytest.raises(TimeoutError):
            child.answer(RELEASE_S)
        struct.pack_into("<I", state, temperature, 60)
        struct.pack_into("<I", state, FIRST_SLOT, before + 2)
        assert child.answer() == 60


def test_a_writer_that_died_half_way_stops_nobody(simulator: Simulator, child: NvmlChild, tmp_path: Path) -> None:
    with state_path(tmp_path).open("r+b") as file, mmap.mmap(file.fileno(), 0) as state:
        (before,) = struct.unpack_from("<I", state, FIRST_SLOT)
        struct.pack_into("<I", state, FIRST_SLOT, before + 1)
        assert child("n.nvmlDeviceGetTemperature(gpu(0), 0)") == 45
        simulator.temperature(0, 60)
        (after,) = struct.unpack_from("<I", state, FIRST_SLOT)
        assert before % 2 == 0 and after == before + 2
    assert child("n.nvmlDeviceGetTemperature(gpu(0), 0)") == 60


def test_a_writer_that_never_finishes_is_not_waited_for(
    simulator: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LOCK_TIMEOUT_MS", 50)
    with state_path(tmp_path).open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SimulatorError, match="another process"):
            simulator.lose(0)
    simulator.lose(0)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, pynvml.NVML_ERROR_DRIVER_NOT_LOADED),
        (b"", pynvml.NVML_ERROR_DRIVER_NOT_LOADED),
        (b"something else" * 100, pynvml.NVML_ERROR_DRIVER_NOT_LOADED),
        (b"NVMLSIM1" + struct.pack("<II", 2, 4096) + bytes(4080), pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH),
        (b"NVMLSIM1" + struct.pack("<II", 1, 100) + bytes(84), pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH),
    ],
    ids=["none", "empty", "other", "layout", "size"],
)
def test_a_state_file_that_is_none(tmp_path: Path, content: bytes | None, code: int) -> None:
    if content is not None:
        state_path(tmp_path).write_bytes(content)
    with NvmlChild(driver_environment(tmp_path), start=False) as child:
        assert code_of(child, "n.nvmlInit()") == code
    with pytest.raises(NoState):
        Simulator.open(tmp_path)
    with create(tmp_path, gpus=1) as simulator:
        assert len(simulator.list()) == 1


def test_without_the_variable_there_is_no_driver(tmp_path: Path) -> None:
    environment = {"LD_LIBRARY_PATH": driver_environment(tmp_path)["LD_LIBRARY_PATH"], "ELASTIC_NVML_SIMULATOR": ""}
    with NvmlChild(environment, start=False) as child:
        assert code_of(child, "n.nvmlInit()") == pynvml.NVML_ERROR_DRIVER_NOT_LOADED


def test_who_injects_does_not_load_the_driver(simulator: Simulator) -> None:
    simulator.list()
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert library.CONTROL in maps
    assert str(library_dir() / library.DRIVER) not in maps


def test_values_that_are_refused_change_nothing(simulator: Simulator) -> None:
    before = simulator.list()
    for refused in (
        lambda: simulator.xid(0, 0),
        lambda: simulator.ecc(0, -1),
        lambda: simulator.recovery_action(0, -1),
        lambda: simulator.temperature(0, 1000),
        lambda: simulator.latency(0, timedelta(milliseconds=-1)),
        lambda: simulator.flap(0, timedelta(0)),
        lambda: simulator.nvlink_down(0, NVLINKS),
    ):
        with pytest.raises(SimulatorError):
            refused()
    for name in (4, "4", "GPU-", "-1", ""):
        with pytest.raises(UnknownGpu):
            simulator.lose(name)
    assert simulator.list() == before


def test_the_sources_compile_without_a_warning(tmp_path: Path) -> None:
    library.compile_into(tmp_path, "-Werror", "-Wshadow", "-Wstrict-prototypes")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(library.PARTS)


def test_building(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "lib")
    with pytest.raises(NotBuilt, match="make setup"):
        library_dir()
    builders = [threading.Thread(target=build_libraries) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
    assert sorted(path.name for path in (tmp_path / "lib").iterdir()) == sorted(library.PARTS)
    made = (library_dir() / library.DRIVER).stat()
    assert build_libraries() is False
    assert (library_dir() / library.DRIVER).stat() == made


def test_a_build_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "lib")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(BuildError, match="install one"):
        build_libraries()
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(BuildError, match="no such header"):
        build_libraries()
    with pytest.raises(NotBuilt):
        library_dir()


def test_a_library_directory_belongs_to_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "native"
    shutil.copytree(library.SOURCES, sources)
    monkeypatch.setattr(library, "SOURCES", sources)
    path = library.library_path.__wrapped__
    same = path()
    assert same == library_dir()
    (sources / "state.h").write_text((sources / "state.h").read_text() + "\n")
    assert path() != same
    assert re.fullmatch(r"simulator-[0-9a-f]{12}", path().name)
