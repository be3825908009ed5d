"""A rank that is stopped, its sockets open: the others wait for it, and the watchdog has it taken out."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, assert_same, run_streams
from watchdog.status import read_status

pytestmark = pytest.mark.e2e

NAMED_WITHIN_S = 6.0
"""Twice the bar, which bench/detection.py holds: machines that run tests are busy."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    options = ("--data-parallel-size", "5", "--survive-losses", "3")
    with Cluster(tmp_path_factory.mktemp("hr", numbered=True) / "run", *options) as running:
        yield running


def until_watched(cluster: Cluster) -> None:
    """The watchdog reads the page of every rank in this epoch."""

    def watched() -> bool:
        if cluster.health()["watchdog"]["state"] != "alive":
            return False
        status, health = read_status(cluster.runtime_dir), cluster.health()
        findings = [rank["finding"] for rank in status["ranks"]]
        return status["epoch"] == health["epoch"] and findings == ["ok"] * health["data_parallel_size"]["active"]

    cluster.wait_for(watched, 30)
    time.sleep(1)  # the judge has seen what healthy ranks do


def until_lost(cluster: Cluster, rank: int) -> dict[str, Any]:
    def report() -> dict[str, Any] | None:
        last = cluster.health()["last_shrink"]
        return last if last and last["ranks"] == [rank] and cluster.health()["status"] == "degraded" else None

    found: dict[str, Any] = cluster.wait_for(report, 20)
    return found


def test_stopped_in_decode_and_then_idle(cluster: Cluster) -> None:
    """Three in a row: more than the exclusions that the watchdog's breaker lets through in that time."""
    reference = run_streams(cluster)
    until_watched(cluster)
    stopped: list[float] = []

    def stop(rank: int) -> None:
        stopped.append(time.time())
        os.kill(cluster.pid(rank), signal.SIGSTOP)

    assert_same(run_streams(cluster, during=lambda: stop(2)), reference)
    report = until_lost(cluster, 2)
    assert report["cause"].startswith("rank 2: hung")
    assert report["requests"]["lost"] == 0
    assert report["requests"]["replayed"] > 0
    cluster.verify_experts()
    pages = {page.name for page in (cluster.runtime_dir / "heartbeats").iterdir()}
    assert pages == {f"rank-{one['incarnation']}.page" for one in cluster.control("/watchdog/bindings").json()["ranks"]}

    for rank in (0, 4):
        until_watched(cluster)
        stop(rank)
        assert until_lost(cluster, rank)["cause"].startswith(f"rank {rank}: hung")
    named = [event for event in cluster.events("verdict") if event["act"]]
    assert [(event["rank"], event["verdict"]) for event in named] == [(rank, "restart-rank") for rank in (2, 0, 4)]
    gone = [event["time"] for event in cluster.events("rank_excluded")]
    assert all(seen - at < NAMED_WITHIN_S for seen, at in zip(gone, stopped, strict=True)), (gone, stopped)
    assert_same(run_streams(cluster), reference)
