"""A queue that is full: who asks whether the daemon is ready is told what a request would be told."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.cluster import Cluster

pytestmark = pytest.mark.e2e


def complete(cluster: Cluster) -> httpx.Response:
    body = {"prompt": "12+34=", "max_tokens": 4, "temperature": 0}
    return httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)


def test_a_full_queue_is_not_ready_until_it_has_room(tmp_path: Path) -> None:
    arguments = ("--data-parallel-size", "2", "--max-waiting", "2", "--watchdog", "off")
    with Cluster(tmp_path / "run", *arguments) as cluster, ThreadPoolExecutor() as clients:
        assert complete(cluster).status_code == 200
        ready = cluster.control("/readyz")
        assert (ready.status_code, ready.json()["reason"]) == (200, None)
        ranks = [cluster.pid(rank) for rank in range(2)]
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        try:
            waiting = [clients.submit(complete, cluster) for _ in range(2)]
            cluster.wait_for(lambda: cluster.control("/readyz").status_code == 503)
            reason = cluster.control("/readyz").json()["reason"]
            assert reason == "2 requests wait already, and no more may"
            assert complete(cluster).status_code == 503
            assert cluster.health()["status"] == "ok"
        finally:
            for pid in ranks:
                os.kill(pid, signal.SIGCONT)
        assert [answer.result().status_code for answer in waiting] == [200, 200]
        cluster.wait_for(lambda: cluster.control("/readyz").status_code == 200)
