"""Events of the simulated driver, in processes that wait for them with pynvml."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pynvml
import pytest

from tests.contract.nvml_child import LISTEN, NvmlChild, code_of
from tests.timing import SLACK_S
from watchdog.simulator import (
    Simulator,
    driver_environment,
)
from watchdog.simulator.layout import EVENT_SLOTS

pytestmark = [pytest.mark.contract, pytest.mark.timeout(60), pytest.mark.usefixtures("driver_library")]

LOST = pynvml.NVML_ERROR_GPU_IS_LOST
INVALID = pynvml.NVML_ERROR_INVALID_ARGUMENT
TIMEOUT = pynvml.NVML_ERROR_TIMEOUT

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
    assert statistics.median(late) <= 0.1, "ten times what it takes"


def test_a_wait_ends_at_its_time(child: NvmlChild) -> None:
    child(LISTEN)
    child("e = listen(0); before = time.monotonic()")
    assert code_of(child, "wait(e, 100)") == TIMEOUT
    assert 0.1 <= child("time.monotonic() - before") < 0.1 + SLACK_S
