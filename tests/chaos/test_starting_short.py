"""A GPU is lost while the daemon starts: the others serve, and it is made good for as soon as it can be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.cluster import Cluster
from watchdog.simulator.simulator import state_path

pytestmark = pytest.mark.chaos

RANKS, LOST = 4, 1
OPTIONS = ("--data-parallel-size", str(RANKS), "--survive-losses", "2", "--gpu-probation", "1", "--restore", "auto")
WATCHDOG = "--watchdog-flags=--probation 2"
STARTED_S = 180.0


def simulate(cluster: Cluster, fault: str, gpu: int) -> None:
    command = ("simulate", "--runtime-dir", str(cluster.runtime_dir), fault, "--gpu", str(gpu))
    subprocess.run([sys.executable, "-m", "watchdog.cli", *command], check=True, timeout=60)


def answer(health: dict[str, Any]) -> str:
    body = {"model": "tiny-moe", "prompt": "add 384 + 729 =", "max_tokens": 20, "temperature": 0}
    text: str = httpx.post(f"{health['url']}/v1/completions", json=body, timeout=120).json()["choices"][0]["text"]
    return text


def test_a_gpu_that_is_lost_while_the_daemon_starts(tmp_path: Path) -> None:
    """The driver's state is there long before the model is configured: no rank is ready by then."""
    cluster = Cluster(tmp_path / "run", *OPTIONS, WATCHDOG)
    try:
        cluster.wait_for(state_path(cluster.runtime_dir).exists, 60)
        simulate(cluster, "lose", LOST)
        assert not cluster.events("rank_standby"), "too late: a rank is ready"

        short = cluster.wait_for(lambda: (now := cluster.health())["status"] == "degraded" and now, STARTED_S)
        assert short["data_parallel_size"] == {"target": RANKS, "active": RANKS - 1}
        lost = short["ranks"][LOST]
        assert lost["state"] == "excluded"
        assert lost["reason"] in short["reason"]
        text = answer(short)

        simulate(cluster, "heal", LOST)
        whole = cluster.wait_for(lambda: (now := cluster.health())["status"] == "ok" and now, STARTED_S)
        assert whole["data_parallel_size"] == {"target": RANKS, "active": RANKS}
        assert whole["ranks"][LOST]["gpu"] == lost["gpu"]
        assert answer(whole) == text
        cluster.verify_experts()
    finally:
        cluster.stop()
