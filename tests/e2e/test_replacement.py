"""A GPU goes, and what becomes of the rank that was on it: a replacement, quarantine, and an operator's release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.cluster import START_TIMEOUT_S, Cluster, assert_same, run_streams
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
        if cluster.health()["watchdog"]["state"] != "alive":
            return False
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


def test_a_spare_gpu_that_somebody_else_uses_is_left_alone(tmp_path: Path) -> None:
    with (
        Cluster(tmp_path / "run", *OPTIONS, "--spare-gpus", "1", WATCHDOG) as cluster,
        Simulator.open(tmp_path / "run") as sim,
    ):
        until_heard(cluster, RANKS + 1)
        spare = sim.list()[RANKS].uuid
        sim.occupy(RANKS, 4711)
        until_heard(cluster, RANKS + 1)
        cluster.wait_for(lambda: spare_gpu(cluster, spare)["used_by"] == [4711], 20)
        written = read_status(cluster.runtime_dir)["written"]
        cluster.wait_for(lambda: read_status(cluster.runtime_dir)["written"] > written)  # the daemon has been told
        sim.lose(1)
        cluster.wait_for(lambda: "waits for a usable GPU" in cluster.health()["reason"], 20)
        sim.heal(RANKS)
        until_serving_on(cluster, 1, spare)


def spare_gpu(cluster: Cluster, spare: str) -> dict[str, Any]:
    gpus: list[dict[str, Any]] = read_status(cluster.runtime_dir)["gpus"]
    return next(gpu for gpu in gpus if gpu["uuid"] == spare)


def test_a_gpu_on_which_no_rank_starts_stays_barred_over_a_restart(tmp_path: Path) -> None:
    options = (*OPTIONS, WATCHDOG, "--state-dir", str(tmp_path / "state"))
    stored = tmp_path / "state" / "barred-gpus.json"
    with Cluster(tmp_path / "run", *options) as cluster:
        gpu = row(cluster, 2)["gpu"]
        cluster.kill(2)
        for attempt in range(2, 5):
            cluster.wait_for(lambda: (now := row(cluster, 2))["state"] == "starting" and now["pids"], 20)
            cluster.kill(2)
            cluster.wait_for(lambda n=attempt: len(cluster.events("rank_excluded")) == n)
        [barred] = cluster.events("gpu_barred")
        assert (barred["gpu"], barred["rank"]) == (gpu, 2)
        cluster.wait_for(stored.exists)
        assert json.loads(stored.read_text())["barred"].keys() == {gpu}

    restarted = Cluster(tmp_path / "run", *options)
    try:
        restarted.wait_for(lambda: restarted.health()["status"] == "degraded", START_TIMEOUT_S)
        assert f"waits for a usable GPU; {gpu}: rank 2 did not start on it" in restarted.health()["reason"]
        assert [event["gpus"].keys() for event in restarted.events("gpus_still_barred")] == [{gpu}]
        assert release(restarted, gpu).status_code == 200
        until_serving_on(restarted, 2, gpu)
        assert json.loads(stored.read_text())["barred"] == {}
    finally:
        restarted.stop()
