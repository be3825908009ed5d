"""A stop under load: what was asked is answered first, whole, and nothing counts as lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.e2e.cluster import PROMPTS, Cluster, assert_same, run_streams

pytestmark = pytest.mark.chaos

STREAMS, TOKENS = 8, 80


def test_running_requests_end_before_the_daemon_does(tmp_path: Path) -> None:
    with Cluster(tmp_path / "run", "--data-parallel-size", "3", "--shutdown-timeout", "60") as cluster:
        reference = run_streams(cluster, PROMPTS[:STREAMS], TOKENS)

        def stop() -> None:
            os.kill(cluster.process.pid, signal.SIGTERM)

        assert_same(run_streams(cluster, PROMPTS[:STREAMS], TOKENS, stop, at_tokens=5 * STREAMS), reference)
        assert cluster.process.wait(30) == 0
        assert "requests_lost" not in cluster.log
