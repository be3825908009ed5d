"""Death at every boundary of an expert rearrangement: no half-moved expert is ever in use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, assert_same, run_streams

pytestmark = pytest.mark.chaos

BALANCING = json.dumps({"step_interval": 40, "window_size": 30})


@pytest.mark.parametrize(("layer", "point"), [(0, "transfer"), (2, "transfer"), (2, "commit"), (2, "done")])
def test_death_in_a_rearrangement(tmp_path: Path, layer: int, point: str) -> None:
    """Rank 2 kills itself at the boundary, in the first rearrangement; stock vLLM would then serve wrong text."""
    fault = {"rank": 2, "layer": layer, "point": point, "rearrangement": 1}
    with Cluster(
        tmp_path / "run", "--eplb-config", BALANCING, env={"ELASTIC_FAULT_TRANSFER": json.dumps(fault)}
    ) as cluster:
        first = run_streams(cluster, max_tokens=30)  # a rearrangement comes every 40 steps: the first in the second run
        for _ in range(3):
            assert_same(run_streams(cluster, max_tokens=30), first)
        cluster.wait_for(lambda: cluster.active() == [0, 1, 3])
        assert cluster.health()["last_shrink"]["ranks"] == [2]
        cluster.verify_experts()
        assert_same(run_streams(cluster, max_tokens=30), first)
