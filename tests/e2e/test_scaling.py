"""Operators' orders: clients see none of them, and what was ordered outlives a restart."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.e2e.cluster import PROMPTS, Cluster, assert_same, run_streams

pytestmark = pytest.mark.e2e

FLAGS = ("--data-parallel-size", "2", "--survive-losses", "0", "--max-ranks", "3", "--watchdog", "off")


def test_a_rank_is_added_and_remembered(tmp_path: Path) -> None:
    with Cluster(tmp_path / "run", *FLAGS) as cluster:
        before = _answer(cluster)
        scaled = subprocess.run(
            [sys.executable, "-m", "elastic_daemon.cli", "scale", "3", "--runtime-dir", str(cluster.runtime_dir)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (scaled.returncode, cluster.active()) == (0, [0, 1, 2]), scaled.stderr
        assert scaled.stdout.startswith("scale 2 -> 3: done after ")
        assert "starting ranks, ranks 2 (2 serve)" in scaled.stderr
        cluster.verify_experts()
        assert [_answer(cluster) for _ in range(6)] == [before] * 6, "the new rank computes some of these"
        too_many = httpx.post(f"{cluster.url}/scale_elastic_ep", json={"new_data_parallel_size": 4})
        assert (too_many.status_code, cluster.active()) == (400, [0, 1, 2])
    with Cluster(tmp_path / "run", *FLAGS) as again:
        assert again.active() == [0, 1, 2]
        (restored,) = again.events("target_restored")
        assert (restored["target"], restored["data_parallel_size"]) == (3, 2)
        assert _answer(again) == before


def test_clients_see_no_order(tmp_path: Path) -> None:
    with Cluster(tmp_path / "run", env={"ELASTIC_RESTORE": "auto"}) as cluster:
        reference = run_streams(cluster, PROMPTS)

        def during(order: Callable[[], httpx.Response], *active: int) -> None:
            answers: list[httpx.Response] = []
            disturbed = run_streams(cluster, PROMPTS, during=lambda: answers.append(order()))
            assert [answer.status_code for answer in answers] == [200], answers[0].text
            assert_same(disturbed, reference)
            cluster.wait_for(lambda: cluster.active() == list(active), 60)
            cluster.verify_experts()

        scale, deed = partial(_scale, cluster), partial(_deed, cluster)
        during(lambda: scale(3), 0, 1, 2)
        during(lambda: scale(4), 0, 1, 2, 3)
        during(lambda: scale(2, retire_ranks=[1, 0]), 2, 3)
        assert "at least 2" in scale(1).json()["error"]["message"]
        assert "2 ranks are needed" in deed(3, "drain").json()["error"]["message"]
        during(lambda: scale(4), 0, 1, 2, 3)
        during(lambda: deed(0, "drain"), 1, 2, 3)
        assert cluster.health()["status"] == "degraded"
        during(lambda: deed(0, "release"), 0, 1, 2, 3)
        during(lambda: deed(2, "exclude"), 0, 1, 3)
        assert cluster.health()["last_shrink"]["requests"]["lost"] == 0


def _scale(cluster: Cluster, size: int, **more: object) -> httpx.Response:
    body = {"new_data_parallel_size": size, "drain_timeout": 60, **more}
    return httpx.post(f"{cluster.url}/scale_elastic_ep", json=body, timeout=90)


def _deed(cluster: Cluster, rank: int, deed: str) -> httpx.Response:
    return httpx.post(f"{cluster.url}/ranks/{rank}/{deed}", json={"drain_timeout": 60}, timeout=90)


def _answer(cluster: Cluster) -> str:
    body = {"model": "tiny-moe", "prompt": "add 384 + 729 =", "max_tokens": 20, "temperature": 0}
    text: str = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    return text
