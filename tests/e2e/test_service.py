"""Daemon and watchdog as systemd services, driven the way systemd drives them (service_manager.py), without systemd.

One daemon lives through it all, in the order of the tests: started, stopped from outside for a while, its front end
killed, killed itself, started again, ended in order.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.footprint import children as children_of
from tests import proc
from tests.e2e.cluster import PROMPTS, Cluster, assert_same, run_streams
from tests.e2e.service_manager import ServiceManager, environment_of, wait_until
from tests.timing import SLACK_S

pytestmark = pytest.mark.e2e

WATCHDOG_S = 4.0
FLAGS = ("--data-parallel-size", "2", "--watchdog", "external")


class Services:
    """The daemon's unit and the watchdog's, in one runtime directory."""

    def __init__(self, home: Path) -> None:
        self.runtime_dir = home / "run"
        self.manager = ServiceManager(home / "notify", WATCHDOG_S)
        self.daemon: Cluster | None = None
        self.began = 0.0

    def start(self) -> Cluster:
        self.began = time.monotonic()
        self.daemon = Cluster(self.runtime_dir, *FLAGS, env=self.manager.environment)
        return self.daemon

    @property
    def cluster(self) -> Cluster:
        assert self.daemon is not None
        return self.daemon


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    services = Services(tmp_path_factory.mktemp("sd"))
    with services.manager, services.start():
        try:
            yield services
        finally:
            services.cluster.stop()


def is_ready(services: Services) -> bool:
    return bool(services.manager.said("READY", services.began))


def test_ready_is_said_when_requests_are_served_and_not_before(services: Services) -> None:
    cluster, manager = services.cluster, services.manager
    wait_until(lambda: is_ready(services), 10, "READY")
    [ready] = manager.said("READY")
    [frontend], [group] = cluster.events("frontend_ready"), cluster.events("regrouping")
    arrived = time.time() - (time.monotonic() - ready.at)
    assert arrived >= max(frontend["time"], group["time"]) - 0.05, "what serves are front end and ranks"
    extensions = [one for one in manager.said("EXTEND_TIMEOUT_USEC") if one.at < ready.at]
    assert extensions, "no more time was asked for while the model loaded"
    assert extensions[0].at - services.began < 10, "far within TimeoutStartSec"
    assert run_streams(cluster, max_tokens=5)[0].error is None


def test_the_sentence_is_that_of_the_control_loop(services: Services) -> None:
    wait_until(lambda: services.manager.status().startswith("serving epoch"), 5, "a sentence")
    assert services.manager.status().startswith("serving epoch 1 with 2 of 2 ranks")


def test_only_the_main_process_speaks(services: Services) -> None:
    """NotifyAccess=main: nobody else has the socket's address."""
    cluster = services.cluster
    assert services.manager.speakers == {cluster.process.pid}
    for pid in cluster.descendants():
        assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & set(environment_of(pid))


def test_pings_come_from_a_loop_that_turns(services: Services) -> None:
    """In time under load, and not at all while the supervisor stands still."""
    cluster, manager = services.cluster, services.manager
    since = time.monotonic()
    run_streams(cluster, max_tokens=60)
    wait_until(lambda: time.monotonic() - since > WATCHDOG_S, 2 * WATCHDOG_S, "the end of a period")
    assert manager.longest_silence("WATCHDOG", since, time.monotonic()) < WATCHDOG_S

    cluster.process.send_signal(signal.SIGSTOP)
    try:
        stopped = time.monotonic() + 0.2
        time.sleep(WATCHDOG_S / 2)  # the time in which two pings are due
        assert not manager.said("WATCHDOG", stopped)
    finally:
        cluster.process.send_signal(signal.SIGCONT)
    resumed = time.monotonic()
    wait_until(lambda: manager.said("WATCHDOG", resumed), 5, "a ping of the loop that turns again")


def test_a_front_end_that_crashes_keeps_ranks_and_serves_again_soon(services: Services) -> None:
    cluster = services.cluster
    cluster.wait_for(lambda: cluster.health()["status"] == "ok")
    reference = run_streams(cluster, PROMPTS[:4], max_tokens=10)
    ranks = [cluster.pid(rank) for rank in range(2)]
    [frontend] = cluster.titled("front end")
    os.kill(frontend, signal.SIGKILL)
    killed = time.monotonic()
    cluster.wait_for(lambda: cluster.control("/readyz").status_code == 503)
    cluster.wait_for(lambda: len(cluster.events("frontend_ready")) == 2 and cluster.health()["status"] == "ok")
    assert cluster.control("/readyz").status_code == 200
    assert_same(run_streams(cluster, PROMPTS[:4], max_tokens=10), reference)
    assert time.monotonic() - killed <= 2.4 + SLACK_S, "bench.frontend_restart has 2.4 s at worst"
    assert [cluster.pid(rank) for rank in range(2)] == ranks
    assert len(services.manager.said("READY")) == 1, "systemd is told once"


def test_a_reload_is_over_when_the_front_end_goes_by_it(services: Services) -> None:
    cluster, manager = services.cluster, services.manager
    began = time.monotonic()
    cluster.process.send_signal(signal.SIGHUP)
    wait_until(lambda: manager.said("READY", began), 10, "READY after a reload")
    [reloading], [ready] = manager.said("RELOADING", began), manager.said("READY", began)
    assert began <= int(reloading.fields["MONOTONIC_USEC"]) / 1e6 <= ready.at
    assert len(cluster.events("reloaded")) == 1
    assert not any("settings_not_adopted" in line for line in cluster.log.splitlines())


def test_a_kill_of_the_supervisor_leaves_nothing_and_a_restart_serves(services: Services) -> None:
    cluster = services.cluster
    processes = cluster.descendants()
    assert len(processes) >= 4  # zygote, front end, two ranks
    cluster.process.kill()
    assert cluster.process.wait(10) == -signal.SIGKILL
    wait_until(lambda: not proc.alive(processes), 5, "an end of all processes")
    with services.start() as again:
        wait_until(lambda: is_ready(services), 10, "READY")
        assert run_streams(again, max_tokens=5)[0].error is None


def test_a_stop_is_announced_and_clean(services: Services) -> None:
    """`with` has stopped the daemon of the test before: what systemd then sees."""
    cluster, manager = services.cluster, services.manager
    assert cluster.process.returncode == 0
    [stopping] = manager.said("STOPPING", services.began)
    assert int(stopping.fields["EXTEND_TIMEOUT_USEC"]) == 25_000_000
    assert not manager.said("READY", stopping.at)


def test_the_watchdog_is_a_service_too(services: Services) -> None:
    """Ready when it watches, pings from the loop that judges, ends cleanly with its children."""
    manager = services.manager
    command = [sys.executable, "-m", "watchdog.cli", "run", "--simulated"]
    places = {"RUNTIME_DIRECTORY": str(services.runtime_dir), "STATE_DIRECTORY": str(services.runtime_dir / "state")}
    began = time.monotonic()
    with subprocess.Popen(command, env={**os.environ, **places, **manager.environment}) as process:
        try:
            wait_until(lambda: manager.said("READY", began), 20, "READY of the watchdog")
            [ready] = manager.said("READY", began)
            assert ready.pid == process.pid
            wait_until(lambda: manager.status().startswith("watching 2 GPUs and 0 ranks"), 5, "a sentence")
            wait_until(lambda: time.monotonic() - ready.at > WATCHDOG_S, 2 * WATCHDOG_S, "the end of a period")
            assert manager.longest_silence("WATCHDOG", ready.at, time.monotonic()) < WATCHDOG_S
            process.send_signal(signal.SIGSTOP)
            stopped = time.monotonic() + 0.2
            time.sleep(WATCHDOG_S / 2)
            assert not manager.said("WATCHDOG", stopped)
            process.send_signal(signal.SIGCONT)
            children = children_of(process.pid)
            process.terminate()
            assert process.wait(10) == 0
            wait_until(lambda: manager.said("STOPPING", stopped), 5, "STOPPING")
            wait_until(lambda: not proc.alive(children), 5, "an end of the children that ask the driver")
        finally:
            process.kill()
