"""The daemon itself stands still in the middle of a recovery: that is nobody else's delay."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from elastic_daemon.control.policy import Policy
from tests.e2e.cluster import Cluster, assert_same, run_streams

pytestmark = pytest.mark.chaos

FENCE_TIMEOUT_S = Policy(target=1, experts=1, slots=1).fence_timeout_s


class Log:
    """A pipe that a daemon logs to, and what reads it into a file, except while nobody does."""

    def __init__(self, file: Path) -> None:
        self._reading, self.writing = os.pipe()
        fcntl.fcntl(self.writing, fcntl.F_SETPIPE_SZ, 4096)
        self._read = threading.Event()
        self._read.set()
        self._thread = threading.Thread(target=self._copy, args=(file,))
        self._thread.start()

    def _copy(self, file: Path) -> None:
        with open(self._reading, "rb") as source, file.open("wb") as target:
            while chunk := source.read1(4096):
                target.write(chunk)
                target.flush()
                self._read.wait()

    @contextmanager
    def unread(self) -> Iterator[None]:
        """Full, and nobody reads: who writes a line waits."""
        self._read.clear()
        own = os.open(f"/proc/self/fd/{self.writing}", os.O_WRONLY | os.O_NONBLOCK)
        try:
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:  # the reader may be about to take one more chunk
                try:
                    os.write(own, b"\n")
                except BlockingIOError:
                    time.sleep(0.01)
            yield
        finally:
            os.close(own)
            self._read.set()

    def close(self) -> None:
        os.close(self.writing)
        self._thread.join()


@pytest.mark.timeout(300)
def test_a_supervisor_that_stood_still_between_a_decision_and_the_fence_gives_nobody_up(tmp_path: Path) -> None:
    """It logs the death of a rank before it fences the others, and for longer than they have to answer, it cannot."""
    log = Log(tmp_path / "run.log")  # where the cluster looks
    try:
        with Cluster(tmp_path / "run", stdout=log.writing) as cluster:
            reference = run_streams(cluster)

            def kill_unheard() -> None:
                victim = cluster.pid(1)
                with log.unread():
                    os.kill(victim, signal.SIGKILL)
                    time.sleep(FENCE_TIMEOUT_S + 1)

            assert_same(run_streams(cluster, during=kill_unheard), reference)
            assert cluster.active() == [0, 2, 3]
            [stalled] = cluster.events("supervisor_stalled")
            assert stalled["seconds"] > FENCE_TIMEOUT_S
            assert "ranks to park: 0, 2, 3" in stalled["doing"]
    finally:
        log.close()
