"""SIGKILL of ranks under load: no client may notice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.cluster import START_TIMEOUT_S, Cluster, assert_same, run_streams

pytestmark = pytest.mark.chaos

StartCluster = Callable[..., Cluster]


@pytest.mark.parametrize(("victim", "block_size"), [(0, "32"), (2, "128")])
def test_kill_in_decode_then_the_next_while_idle_then_unavailable(
    start_cluster: StartCluster, victim: int, block_size: str
) -> None:
    """One life of a deployment: a kill in decode, one while idle, and a third that leaves too few slots.

    With small blocks a replayed request finds more of itself in the prefix cache than its prompt.
    """
    cluster = start_cluster("--hold-timeout", "2", "--block-size", block_size)
    reference = run_streams(cluster)

    disturbed = run_streams(cluster, during=lambda: cluster.kill(victim))
    assert_same(disturbed, reference)
    cluster.verify_experts()
    report = cluster.health()["last_shrink"]
    assert report["ranks"] == [victim]
    assert report["requests"]["lost"] == 0
    assert report["requests"]["kept"] > 0
    assert report["requests"]["replayed"] > 0

    idle_victim = next(rank for rank in (1, 3) if rank != victim)
    cluster.kill(idle_victim)
    cluster.wait_for(lambda: cluster.health()["data_parallel_size"]["active"] == 2)
    cluster.wait_for(lambda: cluster.health()["status"] == "degraded")
    assert_same(run_streams(cluster), reference)
    cluster.verify_experts()

    cluster.kill(cluster.active()[0])
    cluster.wait_for(lambda: cluster.health()["status"] == "unavailable")
    health = cluster.health()
    assert "16 experts need 16 slots" in health["reason"]
    assert health["survivable_losses"] == -1
    started = time.monotonic()
    (refused,) = run_streams(cluster, prompts=["count 5 from 5"])
    assert refused.error is not None
    assert refused.error.startswith("503")
    assert "16 slots" in refused.error
    assert time.monotonic() - started < 10


def test_a_rank_killed_while_the_others_start_is_started_again(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "run", "--data-parallel-size", "2")
    try:
        cluster.wait_for(lambda: len([row for row in cluster.health()["ranks"] if row["pids"]]) == 2, START_TIMEOUT_S)
        assert {row["state"] for row in cluster.health()["ranks"]} == {"starting"}
        cluster.kill(1)
        with cluster:  # waits until it is ok, by itself
            assert [event["attempt"] for event in cluster.events("rank_starting") if event["rank"] == 1] == [1, 2]
            assert cluster.active() == [0, 1]
            assert all(seen.error is None for seen in run_streams(cluster, max_tokens=10))
            cluster.verify_experts()
    finally:
        cluster.stop()


def test_two_ranks_at_once(start_cluster: StartCluster) -> None:
    cluster = start_cluster()
    reference = run_streams(cluster)
    disturbed = run_streams(cluster, during=lambda: cluster.kill(0, 1))
    assert_same(disturbed, reference)
    cluster.verify_experts()
    assert cluster.active() == [2, 3]


def test_second_death_during_the_recovery_of_the_first(start_cluster: StartCluster) -> None:
    cluster = start_cluster()
    reference = run_streams(cluster)

    def kill_both() -> None:
        first, second = cluster.pid(3), cluster.pid(1)
        os.kill(first, signal.SIGKILL)
        cluster.wait_for(lambda: cluster.events("recovery_started")[-1]["cause"] != "start")
        os.kill(second, signal.SIGKILL)

    disturbed = run_streams(cluster, during=kill_both)
    assert_same(disturbed, reference)
    cluster.verify_experts()
    assert cluster.active() == [0, 2]


def test_kill_in_prefill(start_cluster: StartCluster) -> None:
    """Prompts are long and the step that prefills them is cut: what it registered in the prefix cache is void."""
    cluster = start_cluster("--max-num-batched-tokens", "64", "--max-num-seqs", "16")
    prompts = [f"count {i} from {i + 1} " + "1 2 3 4 5 6 7 8 9 " * 25 for i in range(12)]
    reference = run_streams(cluster, prompts, max_tokens=16)
    disturbed = run_streams(cluster, prompts, max_tokens=16, during=lambda: cluster.kill(2), at_tokens=3)
    assert_same(disturbed, reference)
    assert_same(run_streams(cluster, prompts, max_tokens=16), reference)
    cluster.verify_experts()


def test_missing_experts_come_from_the_checkpoint(start_cluster: StartCluster) -> None:
    """Five ranks with five slots: most experts have one copy only, and go with the rank that holds them."""
    options = ("--data-parallel-size", "5", "--eplb-config", '{"num_redundant_experts": 9}')
    cluster = start_cluster(*options, "--host-expert-copies", "off")
    assert cluster.health()["expert_safety"] == 0
    reference = run_streams(cluster)
    disturbed = run_streams(cluster, during=lambda: cluster.kill(4))
    assert_same(disturbed, reference)
    assert cluster.events("regrouping")[-1]["loads"] > 0
    cluster.verify_experts()


def test_three_of_five_ranks_may_go(start_cluster: StartCluster) -> None:
    cluster = start_cluster("--data-parallel-size", "5", "--survive-losses", "3")
    reference = run_streams(cluster)
    for victims in ((0,), (1, 2)):
        disturbed = run_streams(cluster, during=lambda victims=victims: cluster.kill(*victims))
        assert_same(disturbed, reference)
        cluster.verify_experts()
    assert cluster.active() == [3, 4]


@pytest.fixture
def start_cluster(tmp_path: Path) -> object:
    running: list[Cluster] = []

    def start(*arguments: str) -> Cluster:
        cluster = Cluster(tmp_path / f"run{len(running)}", *arguments)
        running.append(cluster)
        return cluster.__enter__()

    yield start
    for cluster in running:
        cluster.stop()
