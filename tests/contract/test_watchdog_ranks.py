"""The watchdog and real processes that write heartbeats: who is named when one stops, slows down or dies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.watchdog_daemon import DaemonRoutes, Watchdog, serving, until, watching
from tests.contract.watchdog_rank import incarnation_of
from tests.timing import SLACK_S
from watchdog.heartbeat.page import HeartbeatWriter, page_path
from watchdog.simulator import create
from watchdog.status import render

pytestmark = pytest.mark.contract

RANKS = 4
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def group(directory: Path, mode: str, work_s: dict[int, float] | None = None) -> Iterator[tuple[Watchdog, list[int]]]:
    """A watchdog and four ranks that beat; the pids of the ranks."""
    sim = create(directory, RANKS)
    daemon = DaemonRoutes(directory / "http.sock")
    with contextlib.ExitStack() as stack:
        pids = []
        for rank in range(RANKS):
            work = (work_s or {}).get(rank, 0.01)
            command = [
                sys.executable,
                "-m",
                "tests.contract.watchdog_rank",
                str(directory),
                str(rank),
                str(RANKS),
                mode,
            ]
            process = subprocess.Popen([*command, str(work)], stdout=subprocess.PIPE, cwd=ROOT)
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            pids.append(process.pid)
        daemon.bind(
            [gpu.uuid for gpu in sim.list()],
            {rank: page_path(directory, incarnation_of(rank)) for rank in range(RANKS)},
        )
        stack.enter_context(serving(daemon))
        watchdog = stack.enter_context(watching(directory, sim, daemon))
        until(lambda: all(one["phase"] in ("idle", "decode") for one in watchdog.status()["ranks"]), "heartbeats", 10)
        time.sleep(2.0)  # intervals to learn from
        assert work_s or not [body for _, body in daemon.verdicts if "rank" in body], "a healthy rank was accused"
        yield watchdog, pids


@pytest.mark.parametrize("mode", ["idle", "decode"])
def test_stopped_rank_is_named_within_three_seconds(tmp_path: Path, mode: str) -> None:
    with group(tmp_path, mode) as (watchdog, pids):
        started = time.monotonic()
        os.kill(pids[2], signal.SIGSTOP)
        at, verdict = watchdog.verdict(verdict="restart-rank")
        assert at - started <= 3.0 + SLACK_S
        assert (verdict["rank"], verdict["incarnation"], verdict["signal"]) == (2, incarnation_of(2), "hung")
        assert verdict["act"] and "gpu" not in verdict
        time.sleep(1.0)
        assert not watchdog.daemon.of(verdict="exclude") and len(watchdog.daemon.of(verdict="restart-rank")) == 1


def test_short_stall_accuses_nobody(tmp_path: Path) -> None:
    with group(tmp_path, "decode") as (watchdog, pids):
        for pid in pids[:3]:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.5)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.5)
        assert not watchdog.daemon.of(act=True)


def test_straggler_is_named_and_kept(tmp_path: Path) -> None:
    with group(tmp_path, "decode", {1: 0.03}) as (watchdog, _):
        _, verdict = watchdog.verdict(20, signal="straggler")
        assert verdict["rank"] == 1 and verdict["verdict"] == "suspect"
        assert verdict["evidence"][0]["detail"]["slowdown"] > 1.5
        time.sleep(2.0)
        assert not watchdog.daemon.of(act=True)
        assert {body["rank"] for _, body in watchdog.daemon.verdicts if "rank" in body} == {1}


def test_a_new_epoch_is_followed_at_once(tmp_path: Path) -> None:
    """Ranks say it first; bindings are otherwise read once a second. Before the first group there is no epoch."""
    sim = create(tmp_path, 1)
    daemon = DaemonRoutes(tmp_path / "http.sock", epoch=0)
    page = HeartbeatWriter(tmp_path, 0, incarnation_of(0))
    daemon.bind([gpu.uuid for gpu in sim.list()], {0: page.path})
    with serving(daemon), watching(tmp_path, sim, daemon) as watchdog:
        until(lambda: watchdog.status()["ranks"], "the rank", 5)
        assert "no group yet (1 ranks bound)" in render({**watchdog.status(), "age_s": 0.0})
        delays = []
        for epoch in range(1, 6):
            asked, began = daemon.asked, time.monotonic()
            daemon.epoch = epoch
            page.begin_epoch(epoch)
            until(lambda asked=asked: daemon.asked > asked, "a question", 3)
            delays.append(time.monotonic() - began)
            until(lambda epoch=epoch: watchdog.status()["epoch"] == epoch, "the epoch", 3)
        assert sorted(delays)[2] < 0.5, "out of turn"
        assert "epoch 5" in render({**watchdog.status(), "age_s": 0.0})
        asked, began = daemon.asked, time.monotonic()
        page.begin_epoch(9)  # that the daemon does not know of
        time.sleep(3.0)
        assert daemon.asked - asked <= time.monotonic() - began + 2
    page.close()


def test_dead_rank_is_left_to_the_daemon(tmp_path: Path) -> None:
    with group(tmp_path, "decode") as (watchdog, pids):
        os.kill(pids[1], signal.SIGKILL)
        until(lambda: watchdog.status()["ranks"][1]["finding"] == "dead", "the finding", 5)
        time.sleep(2.0)
        assert not watchdog.daemon.of(act=True)
