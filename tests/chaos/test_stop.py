"""A stop under load: what was asked is answered first, whole; what takes too long ends with an error, and counts."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import httpx
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


def ask(cluster: Cluster, stream: bool, begun: Event) -> tuple[int, list[str]]:
    """Status and lines of the answer to what takes longer than the stop may. Raises where it is cut.

    `begun`: set with the first line.
    """
    body = {"prompt": PROMPTS[0], "max_tokens": 1500, "temperature": 0, "ignore_eos": True, "stream": stream}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=60) as answer:
        lines = []
        for line in filter(None, answer.iter_lines()):
            lines.append(line)
            begun.set()
        return answer.status_code, lines


def test_requests_that_do_not_end_in_time_end_with_an_error(tmp_path: Path) -> None:
    arguments = ("--data-parallel-size", "2", "--shutdown-timeout", "3", "--max-model-len", "2048")
    with Cluster(tmp_path / "run", *arguments) as cluster, ThreadPoolExecutor() as clients:
        begun = Event()
        streamed, whole = clients.submit(ask, cluster, True, begun), clients.submit(ask, cluster, False, Event())
        cluster.wait_for(lambda: cluster.health()["in_flight"] == 2)
        assert begun.wait(20)
        os.kill(cluster.process.pid, signal.SIGTERM)
        status, lines = streamed.result(30)
        [error] = [line for line in lines if '"error"' in line]
        assert status == 200
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == 503
        assert "the daemon stops" in error
        status, lines = whole.result(30)
        assert (status, "the daemon stops" in lines[0]) == (503, True)
        assert cluster.process.wait(30) == 0
        [lost] = cluster.logged("requests_lost")
        assert lost["count"] == 2
