"""Faults that come again after each regroup, and that nobody dies of: they end, one way or the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, assert_same, run_streams

pytestmark = pytest.mark.chaos


def broken_links(rank: int | None) -> dict[str, str]:
    """No step of this rank (None: of any) succeeds in a group."""
    return {"ELASTIC_FAULT_LINKS": json.dumps({"rank": rank, "every_s": 0.001})}


def test_a_rank_that_keeps_no_connection_is_given_up_and_nothing_is_lost(tmp_path: Path) -> None:
    with Cluster(tmp_path / "run", env=broken_links(1)) as cluster:
        disturbed = run_streams(cluster, max_tokens=20)
        assert cluster.active() == [0, 2, 3]
        [excluded] = cluster.events("rank_excluded")
        assert excluded["rank"] == 1
        assert "10 faults in a row before any request got a token, the last: rank" in excluded["reason"]
        cluster.verify_experts()
        assert_same(disturbed, run_streams(cluster, max_tokens=20))


def test_requests_that_no_step_succeeds_with_are_ended(tmp_path: Path) -> None:
    """Two ranks that need each other: none can be given up, so the clients are told."""
    small = ("--data-parallel-size", "2", "--survive-losses", "0")
    with Cluster(tmp_path / "run", *small, env=broken_links(None)) as cluster:
        for seen in run_streams(cluster, max_tokens=20):
            assert seen.error is not None
            assert "10 faults in a row before any request got a token" in seen.error
        assert cluster.wait_for(lambda: cluster.health()["in_flight"] == 0)
        assert not cluster.events("rank_excluded")
