"""A lost rank comes back under load, and no client notices either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, assert_same, run_streams

pytestmark = pytest.mark.chaos

CYCLES = 3


def _grown(cluster: Cluster, rank: int) -> dict[str, Any] | None:
    """/health, once the rank's return is over: the group serves a moment before."""
    health = cluster.health()
    grown = health["status"] == "ok" and (health["last_grow"] or {}).get("ranks") == [rank]
    return health if grown else None


def test_kill_and_rejoin_again_and_again(tmp_path: Path) -> None:
    """Kill -> shrink -> start -> grow, under load each time; the last victim is lost before it has joined."""
    with Cluster(tmp_path / "run", env={"ELASTIC_RESTORE": "auto"}) as cluster:
        reference = run_streams(cluster)
        for victim in (2, 0, 3)[:CYCLES]:
            before = cluster.pid(victim)
            assert_same(run_streams(cluster, during=lambda victim=victim: cluster.kill(victim)), reference)
            health = cluster.wait_for(lambda victim=victim: _grown(cluster, victim), 60)
            assert health["last_grow"]["requests"]["lost"] == 0
            assert cluster.pid(victim) != before
            cluster.wait_for(lambda: cluster.health()["expert_safety"] >= 1, 30)  # single copies go to host memory
            cluster.verify_experts()
        assert_same(run_streams(cluster), reference)

        cluster.kill(1)
        cluster.wait_for(lambda: [event for event in cluster.events("rank_starting") if event["rank"] == 1][1:], 30)
        cluster.wait_for(lambda: cluster.pid(1))
        cluster.kill(1)
        assert_same(run_streams(cluster), reference)
        cluster.wait_for(lambda: cluster.health()["status"] == "ok", 60)
        assert_same(run_streams(cluster), reference)
        cluster.verify_experts()
