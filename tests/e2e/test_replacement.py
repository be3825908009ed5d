"""A GPU goes, and what becomes of the rank that was on it: a replacement, quarantine, and an operator's release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.cluster import Cluster, assert_same, run_streams
from watchdog.simulator import Simulator
from watchdog.status import read_status

pytestmark = pytest.mark.e2e

RANKS = 3
OPTIONS = ("--data-parallel-size", str(RANKS), "--survive-losses", "1", "--gpu-probation", "1", "--restore", "auto")
WATCHDOG = "--watchdog-flags=--quarantine-failures 1 --probation 2"
RESTORED_S = 60.0


def row(cluster: Cluster, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = cluster.health()["ranks"][rank]
    return found


def until_heard(cluster: Cluster, gpus: int) -> None:
    """The watchdog knows the ranks and waits for events of so many GPUs."""

    def heard() -> bool:
        status = read_status(cluster.runtime_dir)
        return status["epoch"] == cluster.health()["epoch"] and len(status["driver"]["listening"]) == gpus

    cluster.wait_for(heard, 30)


def until_serving_on(cluster: Cluster, rank: int, gpu: str) -> None:
    def serves() -> bool:
        now = row(cluster, rank)
        return now["gpu"] == gpu and now["state"] in ("active", "suspect") and cluster.health()["status"] == "ok"

    cluster.wait_for(serves, RESTORED_S)


def release(cluster: Cluster, gpu: str) -> httpx.Response:
    transport = httpx.HTTPTransport(uds=str(cluster.runtime_dir / "http.sock"))
    with httpx.Client(transport=transport, base_url="http://daemon", timeout=30) as client:
        return client.post(f"/gpus/{gpu}/release", json={})


def test_a_rank_comes_back_on_a_replacement_and_on_a_gpu_that_is_released(tmp_path: Path) -> None:
    with Cluster(tmp_path / "run", *OPTIONS, WATCHDOG) as cluster, Simulator.open(tmp_path / "run") as sim:
        until_heard(cluster, RANKS)
        reference = run_streams(cluster)
        gpus = [gpu.uuid for gpu in sim.list()]

        assert_same(run_streams(cluster, during=lambda: sim.lose(1)), reference)
        cluster.wait_for(lambda: cluster.health()["status"] == "degraded" and row(cluster, 1)["state"] == "excluded")
        starts = len(cluster.events("rank_starting"))

        new = sim.replace(1)
        assert new not in gpus
        until_serving_on(cluster, 1, new)
        assert len(cluster.events("rank_starting")) == starts + 1
        assert_same(run_streams(cluster), reference)

        until_heard(cluster, RANKS)
        sim.xid(2, 79)  # a fault that passes: the GPU works on, and has failed too often
        cluster.wait_for(lambda: row(cluster, 2)["state"] == "excluded")

        def quarantined() -> bool:
            gpu = next(gpu for gpu in read_status(cluster.runtime_dir)["gpus"] if gpu["uuid"] == gpus[2])
            return gpu["signal"] == "quarantine"  # and of nothing else: its probation is over

        cluster.wait_for(quarantined, 15)
        assert len(cluster.events("rank_starting")) == starts + 1, "a rank was put on a GPU in quarantine"
        assert release(cluster, gpus[2]).status_code == 200
        until_serving_on(cluster, 2, gpus[2])
        assert_same(run_streams(cluster), reference)
        cluster.verify_experts()
