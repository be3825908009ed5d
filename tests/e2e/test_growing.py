"""More ranks than at the start, by an operator's order, and still so many after a restart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.e2e.cluster import Cluster

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


def _answer(cluster: Cluster) -> str:
    body = {"model": "tiny-moe", "prompt": "add 384 + 729 =", "max_tokens": 20, "temperature": 0}
    text: str = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    return text
