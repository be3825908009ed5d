"""Faults that show over time: calls that hang or are slow, GPUs that come and go."""

from __future__ import annotations

import time
from datetime import timedelta

import pynvml
import pytest

from tests.contract.nvml_child import LISTEN, RELEASE_S, NvmlChild, NvmlError, code_of
from watchdog.simulator import Simulator

pytestmark = [pytest.mark.contract, pytest.mark.timeout(60), pytest.mark.usefixtures("driver_library")]

LOST = pynvml.NVML_ERROR_GPU_IS_LOST
TIMEOUT = pynvml.NVML_ERROR_TIMEOUT


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
    quick = min((end - start for start, _, end in (child(took.format("gpu(0)")) for _ in range(5))))
    assert quick < 0.15
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
    period = 2.0
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
