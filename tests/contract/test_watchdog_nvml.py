"""The whole watchdog over the real pynvml and the simulated driver, end to end to the daemon's routes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.contract.watchdog_daemon import (
    ROOT,
    DaemonRoutes,
    Watchdog,
    serving,
    start,
    until,
    watching,
    watching_quickly,
)
from tests.timing import SLACK_S
from watchdog.simulator import Feature, Simulator, create
from watchdog.status import render

pytestmark = pytest.mark.contract

GPUS = 8


@pytest.fixture(scope="module")
def watchdog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watchdog]:
    with watching_quickly(tmp_path_factory.mktemp("watchdog"), GPUS) as watchdog:
        yield watchdog


@pytest.fixture
def gpu(watchdog: Watchdog) -> Iterator[str]:
    """GPU 2, healthy; healed afterwards."""
    uuid = watchdog.sim.list()[2].uuid
    until(lambda: watchdog.gpu(uuid).get("verdict") in ("ok", "suspect"), "a GPU that is not out of service", 10)
    watchdog.until_listening()
    watchdog.daemon.verdicts.clear()
    yield uuid
    watchdog.sim.heal(2)


def only_this_gpu(watchdog: Watchdog, uuid: str) -> None:
    others = [body for _, body in watchdog.daemon.verdicts if body["act"] and body.get("gpu") != uuid]
    assert not others, "a healthy GPU or a rank was accused"


def test_xid_79_excludes_within_a_tenth_of_a_second(watchdog: Watchdog, gpu: str) -> None:
    started = time.monotonic()
    watchdog.sim.xid(gpu, 79)
    at, verdict = watchdog.verdict(gpu=gpu, verdict="exclude")
    assert at - started <= 0.1 + SLACK_S
    assert verdict["signal"] == "xid:79" and verdict["act"] and verdict["epoch"] == watchdog.daemon.epoch
    assert verdict["evidence"][0]["count"] == 1
    logged = next(line for line in watchdog.events("verdict") if line["id"] == verdict["id"])
    assert logged["evidence"]["xid:79"]["count"] == 1
    only_this_gpu(watchdog, gpu)


def test_lost_gpu_excludes_within_a_second_and_comes_back(watchdog: Watchdog, gpu: str) -> None:
    started = time.monotonic()
    watchdog.sim.lose(gpu)
    at, verdict = watchdog.verdict(gpu=gpu, verdict="exclude")
    assert at - started <= 1.0 + SLACK_S
    assert verdict["signal"] == "gpu_lost"
    until(lambda: any(one["signal"] == "gpu_missing" for one in watchdog.gpu(gpu)["evidence"]), "the shorter list", 5)
    only_this_gpu(watchdog, gpu)
    watchdog.sim.heal(gpu)
    watchdog.verdict(15, gpu=gpu, verdict="ok")


def test_wedged_driver_excludes_within_two_seconds_and_others_are_still_read(watchdog: Watchdog, gpu: str) -> None:
    before = watchdog.status()["driver"]["children"]["poll"]
    started = time.monotonic()
    watchdog.sim.hang(gpu)
    at, verdict = watchdog.verdict(gpu=gpu, verdict="exclude")
    assert at - started <= 2.0 + SLACK_S
    assert verdict["signal"] == "driver_wedged"
    assert "driver_late" in {one["signal"] for one in verdict["evidence"]}
    assert not os.path.exists(f"/proc/{before}"), "the child that hung was not replaced"
    other = watchdog.gpus[5]
    started = time.monotonic()
    watchdog.sim.lose(other)
    at, _ = watchdog.verdict(gpu=other, verdict="exclude")
    assert at - started <= 1.0 + SLACK_S
    watchdog.sim.heal(other)
    until(lambda: watchdog.status()["driver"]["isolated"] == [gpu], "a child of its own", 15)
    assert watchdog.status()["driver"]["stuck"] == {}
    watchdog.sim.heal(gpu)
    until(lambda: gpu not in watchdog.status()["driver"]["isolated"], "the GPU among the others again", 60)


def test_slow_driver_is_suspect_only(watchdog: Watchdog, gpu: str) -> None:
    watchdog.sim.latency(gpu, timedelta(seconds=0.2))
    watchdog.verdict(gpu=gpu, verdict="suspect", signal="driver_slow")
    until(lambda: gpu in watchdog.status()["driver"]["isolated"], "a child of its own", 15)
    time.sleep(1.0)
    assert not watchdog.daemon.of(act=True)
    watchdog.sim.heal(gpu)
    until(lambda: not watchdog.status()["driver"]["isolated"], "the GPU among the others again", 20)


def test_replaced_gpu_is_known_by_its_new_uuid(watchdog: Watchdog) -> None:
    old = watchdog.sim.list()[7].uuid
    new = watchdog.sim.replace(7)
    watchdog.verdict(gpu=old, verdict="exclude")
    until(lambda: watchdog.gpu(new).get("verdict") == "ok", "the new GPU", 8)
    watchdog.until_listening()
    started = time.monotonic()
    watchdog.sim.xid(new, 79)
    at, _ = watchdog.verdict(gpu=new, verdict="exclude")
    assert at - started <= 0.5 + SLACK_S


def test_a_gpu_whose_events_are_not_heard_is_shown(tmp_path: Path) -> None:
    """While nobody waits for events, what the driver says is lost: `status` must not claim otherwise."""
    sim = create(tmp_path, 2)
    daemon = DaemonRoutes(tmp_path / "http.sock")
    with serving(daemon), watching(tmp_path, sim, daemon) as watchdog:
        assert render({**watchdog.status(), "age_s": 0.0}).count("heard") == 2

        def deaf() -> dict[str, Any] | None:
            status = watchdog.status()
            if not status["driver"]["listening"]:
                return status
            with contextlib.suppress(ProcessLookupError):
                os.kill(status["driver"]["children"]["events"], signal.SIGKILL)
            return None

        status = until(deaf, "notice that nobody listens", 15)
        assert status is not None
        assert [(gpu["present"], gpu["listening"]) for gpu in status["gpus"]] == [(True, False)] * 2
        assert render({**status, "age_s": 0.0}).count("NOT YET") == 2
        watchdog.until_listening()
        sim.xid(1, 79)
        watchdog.verdict(gpu=watchdog.gpus[1], verdict="exclude")


def test_flapping_gpu_stays_out(watchdog: Watchdog, gpu: str) -> None:
    watchdog.sim.flap(gpu, timedelta(seconds=1))
    watchdog.verdict(gpu=gpu, verdict="exclude")
    time.sleep(2)
    assert watchdog.gpu(gpu)["verdict"] == "exclude"


def test_status_prints_each_gpu(watchdog: Watchdog, gpu: str) -> None:
    watchdog.sim.remap_failure(gpu)  # a fault that lasts: a program takes its time to start
    watchdog.verdict(gpu=gpu, verdict="exclude")
    until(lambda: watchdog.gpu(gpu)["verdict"] == "exclude", "the status", 15)
    command = [sys.executable, "-m", "watchdog.cli", "status", "--runtime-dir", str(watchdog.runtime_dir)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = next(line for line in shown.splitlines() if gpu in line)
    assert "exclude" in line and "could not be remapped" in line and "heard" in line
    body = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert {one["uuid"] for one in body["gpus"]} >= {one.uuid for one in watchdog.sim.list()}
    assert (watchdog.runtime_dir / "watchdog.json").stat().st_mode & 0o777 == 0o600


def test_is_frugal(tmp_path: Path) -> None:
    """Less than 3% of one core and 120 MB, children included, with 8 GPUs.

    Proportional set size: what the machine has less of. The resident sets of three processes that run the same
    interpreter count its pages three times.
    """
    sim = create(tmp_path, GPUS)
    daemon = DaemonRoutes(tmp_path / "http.sock")
    daemon.bind([gpu.uuid for gpu in sim.list()])
    with serving(daemon), watching(tmp_path, sim, daemon) as watchdog:
        pids = [watchdog.process.pid, *watchdog.status()["driver"]["children"].values()]
        used, started = sum(map(cpu_s, pids)), time.monotonic()
        time.sleep(5)
        share = (sum(map(cpu_s, pids)) - used) / (time.monotonic() - started)
        assert share < 3 * 0.03, "three times the bar: slower machines"
        assert sum(map(proportional_mib, pids)) < 120


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def proportional_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024


@pytest.mark.parametrize("module", ["watchdog.nvml_child", "watchdog.service"])
def test_nothing_heavy_is_imported(module: str) -> None:
    heavy = {"httpx", "structlog", "tenacity", "pydantic", "numpy", "torch", "rich", "fastapi", "elastic_daemon"}
    if module == "watchdog.nvml_child":
        heavy |= {"asyncio", "ssl", "logging"}
    else:
        heavy.add("pynvml")
    source = f"import sys, {module}; print(*sorted(set(sys.modules) & {heavy}))"
    found = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.split() == []


@pytest.fixture
def simulated(tmp_path: Path) -> tuple[Simulator, DaemonRoutes]:
    sim = create(tmp_path, 4)
    daemon = DaemonRoutes(tmp_path / "http.sock")
    daemon.bind([gpu.uuid for gpu in sim.list()])
    return sim, daemon


def test_limits_of_the_breaker_and_observe_mode(tmp_path: Path, simulated: tuple[Simulator, DaemonRoutes]) -> None:
    sim, daemon = simulated
    daemon.min_ranks = 2
    with serving(daemon), watching(tmp_path, sim, daemon, "--max-exclusions", "3") as watchdog:
        for index in range(3):
            sim.lose(index)
            watchdog.verdict(gpu=watchdog.gpus[index], verdict="exclude")
        assert [body["act"] for _, body in daemon.of(verdict="exclude")] == [True, True, False]
        assert "2 must stay" in daemon.of(verdict="exclude")[-1][1]["held"]
    sim = create(tmp_path, 4)
    with serving(daemon), watching(tmp_path, sim, daemon, "--mode", "observe") as watchdog:
        daemon.verdicts.clear()
        sim.lose(3)
        _, verdict = watchdog.verdict(gpu=watchdog.gpus[3], verdict="exclude")
        assert not verdict["act"] and verdict["held"] == "observe mode"
        assert not watchdog.gpu(watchdog.gpus[3])["failures"]


def test_waits_for_the_daemon_and_outlives_it(tmp_path: Path, simulated: tuple[Simulator, DaemonRoutes]) -> None:
    sim, daemon = simulated
    process, log = start(tmp_path)

    def reachable() -> bool:
        status: bool = json.loads((tmp_path / "watchdog.json").read_bytes())["daemon"]["reachable"]
        return status

    try:
        until((tmp_path / "watchdog.json").exists, "a status file", 10, log.read_text)
        sim.lose(1)
        time.sleep(1.5)
        with serving(daemon):
            until(lambda: daemon.of(verdict="exclude"), "the verdict kept for the daemon", 5, log.read_text)
            daemon.verdicts.clear()
            daemon.instance = "second"  # a daemon that was restarted between two questions and knows nothing
            until(lambda: daemon.of(verdict="exclude"), "the verdict said again", 5, log.read_text)
        daemon.verdicts.clear()
        until(lambda: not reachable(), "notice that the daemon is gone", 10, log.read_text)
        with serving(daemon):
            until(lambda: daemon.of(verdict="exclude"), "the verdict said again", 5, log.read_text)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert sum(line["event"] == "daemon_unreachable" for line in lines) <= 3, "said at each attempt"
    finally:
        process.terminate()
        assert process.wait(10) == 0
    assert not (tmp_path / "watchdog.json").exists()


def test_nobody_is_missed_before_the_driver_has_listed_its_gpus(
    tmp_path: Path, simulated: tuple[Simulator, DaemonRoutes]
) -> None:
    """A slow driver: who waits for events has opened all GPUs long before who reads them has read each once."""
    sim, daemon = simulated
    for gpu in sim.list():
        sim.latency(gpu.uuid, timedelta(seconds=0.2))
    process, log = start(tmp_path)

    def status() -> dict[str, Any]:
        return json.loads((tmp_path / "watchdog.json").read_bytes())

    try:
        until((tmp_path / "watchdog.json").exists, "a status file", 10, log.read_text)
        until(lambda: len(status()["driver"]["listening"]) == 4, "somebody who waits for events", 20, log.read_text)
        assert not any(gpu["present"] for gpu in status()["gpus"]), "too late to tell"
        with serving(daemon):
            until(lambda: status()["epoch"] == daemon.epoch, "bindings", 5, log.read_text)
            until(lambda: sum(gpu["present"] for gpu in status()["gpus"]) == 4, "the list", 30, log.read_text)
            assert not daemon.of(verdict="exclude"), "a GPU that is there was missed"
    finally:
        process.terminate()
        assert process.wait(10) == 0


def test_stale_epoch_is_judged_again(tmp_path: Path, simulated: tuple[Simulator, DaemonRoutes]) -> None:
    sim, daemon = simulated
    with serving(daemon), watching(tmp_path, sim, daemon) as watchdog:
        asked = daemon.asked
        until(lambda: daemon.asked > asked, "fresh bindings", 15)
        daemon.epoch = 2  # the watchdog learns of it by the refusal
        sim.xid(0, 79)
        _, verdict = watchdog.verdict(gpu=watchdog.gpus[0], verdict="exclude")
        assert verdict["epoch"] == 2
        assert all(body["epoch"] == 1 for body in daemon.refused)


def test_children_end_with_the_watchdog(tmp_path: Path, simulated: tuple[Simulator, DaemonRoutes]) -> None:
    sim, daemon = simulated
    with serving(daemon), watching(tmp_path, sim, daemon) as watchdog:
        pids = list(watchdog.status()["driver"]["children"].values())
        sim.hang(2)  # one of them is inside the driver then
        time.sleep(0.5)
        watchdog.process.kill()
        watchdog.process.wait()
        until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), "the end of all children", 5)


def test_killed_and_stopped_children_accuse_nobody(tmp_path: Path, simulated: tuple[Simulator, DaemonRoutes]) -> None:
    sim, daemon = simulated
    with serving(daemon), watching(tmp_path, sim, daemon) as watchdog:
        children = watchdog.status()["driver"]["children"]
        os.kill(children["events"], signal.SIGKILL)
        os.kill(children["poll"], signal.SIGSTOP)
        time.sleep(2.0)
        os.kill(children["poll"], signal.SIGCONT)
        fresh = until(
            lambda: watchdog.status()["driver"]["children"].get("events") not in (None, children["events"]),
            "another child",
            5,
        )
        assert fresh
        watchdog.until_listening()
        sim.xid(1, 79)
        watchdog.verdict(gpu=watchdog.gpus[1], verdict="exclude")
        assert {body.get("gpu") for _, body in daemon.verdicts if body["act"]} == {watchdog.gpus[1]}


def test_quarantine_outlives_a_restart_until_released(
    tmp_path: Path, simulated: tuple[Simulator, DaemonRoutes]
) -> None:
    sim, daemon = simulated
    options = ("--quarantine-failures", "1", "--probation", "0.2")
    with serving(daemon), watching(tmp_path, sim, daemon, *options) as watchdog:
        sim.xid(0, 79)
        watchdog.verdict(gpu=watchdog.gpus[0], verdict="exclude")
        until(lambda: watchdog.gpu(watchdog.gpus[0])["quarantined"], "quarantine", 15)
        until((tmp_path / "state" / "watchdog-state.json").exists, "the state file", 15)
    daemon.verdicts.clear()
    with serving(daemon), watching(tmp_path, sim, daemon, *options) as watchdog:
        _, verdict = watchdog.verdict(gpu=watchdog.gpus[0], verdict="exclude")
        assert verdict["signal"] == "quarantine"
        daemon.released = {watchdog.gpus[0]: time.time()}
        watchdog.verdict(gpu=watchdog.gpus[0], verdict="ok")


def test_what_a_gpu_lacks_is_noted_once(tmp_path: Path, simulated: tuple[Simulator, DaemonRoutes]) -> None:
    sim, daemon = simulated
    sim.unsupported(1, Feature.NVLINK | Feature.FABRIC | Feature.ECC | Feature.REMAPPED_ROWS | Feature.NEW_EVENTS)
    with serving(daemon), watching(tmp_path, sim, daemon) as watchdog:
        time.sleep(1.5)
        notes = [line for line in watchdog.events("gpu_lacks_signals") if line["gpu"] == watchdog.gpus[1]]
        assert [note["role"] for note in sorted(notes, key=lambda note: note["role"])] == ["events", "poll"]
        assert {"ecc", "links", "fabric"} <= set(notes[0]["signals"]) | set(notes[1]["signals"])
        sim.lose(1)
        watchdog.verdict(gpu=watchdog.gpus[1], verdict="exclude")


def test_only_one_watchdog_per_runtime_directory(tmp_path: Path, simulated: tuple[Simulator, DaemonRoutes]) -> None:
    sim, daemon = simulated
    with serving(daemon), watching(tmp_path, sim, daemon):
        second, log = start(tmp_path)
        assert second.wait(10) == 3
        assert "already runs" in log.read_text()
