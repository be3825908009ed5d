"""A watchdog's eye on a running daemon: the real judge over the real pages, ten times a second."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from tests.e2e.cluster import Cluster
from watchdog.heartbeat.culprit import HeartbeatJudge
from watchdog.heartbeat.findings import Finding, FindingKind
from watchdog.heartbeat.layout import Phase, ProcessState, Snapshot
from watchdog.heartbeat.reader import PageDirectory

PERIOD_S = 0.1


@dataclass(frozen=True)
class Seen:
    """A confirmed finding. `blind`: of the judge that is not told what the kernel says about the processes."""

    at: float
    finding: Finding
    blind: bool


class Judging:
    """`with Judging(runtime_dir) as judging:` watches all pages, in a thread.

    Two judges look at the same pages. The blind one takes stopped processes for running ones: it has the pages alone
    to tell who does not move, as with a rank that spins or waits for a lock.
    """

    def __init__(self, runtime_dir: Path) -> None:
        self.confirmed: list[Seen] = []
        self.history: list[list[Snapshot]] = []
        self._pages = PageDirectory(runtime_dir)
        self._judges = {False: HeartbeatJudge(), True: HeartbeatJudge()}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="judging")

    def __enter__(self) -> Judging:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._pages.close()

    def _watch(self) -> None:
        while not self._ended.wait(PERIOD_S):
            snapshots, errors = self._pages.read()
            assert not errors
            self.history.append(snapshots)
            now = time.monotonic()
            for blind, judge in self._judges.items():
                told = [_blinded(page) for page in snapshots] if blind else snapshots
                self.confirmed += [Seen(now, found, blind) for found in judge.observe(now, told) if found.confirmed]

    def wait_for(self, condition: Callable[[], object], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self._thread.is_alive(), "the judge broke"
            assert time.monotonic() < deadline, f"not within {timeout_s} s; last seen: {self.history[-1]}"
            time.sleep(0.02)

    def phases(self) -> set[Phase]:
        """All that were seen so far."""
        return {page.phase for seen in self.history for page in seen}

    def accused(self) -> set[tuple[FindingKind, int | None]]:
        return {(seen.finding.kind, seen.finding.rank) for seen in self.confirmed}


def _blinded(page: Snapshot) -> Snapshot:
    return page if page.process is ProcessState.GONE else replace(page, process=ProcessState.RUNNING)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[float]:
    """The process does not run meanwhile. Yields when it stopped."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield time.monotonic()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def stopped_where(cluster: Cluster, rank: int, inside: bool, timeout_s: float = 10.0) -> Iterator[float]:
    """Stop a rank within a step: inside a collective, or between two."""
    pages = PageDirectory(cluster.runtime_dir)
    pid = cluster.pid(rank)
    deadline = time.monotonic() + timeout_s
    pause_s = 0.0
    try:
        while True:
            assert time.monotonic() < deadline, f"rank {rank} was never seen {'in' if inside else 'out'}side"
            with stopped(pid) as at:
                [page] = [page for page in pages.read()[0] if page.pid == pid]
                if page.phase is Phase.DECODE and page.in_collective is inside and not page.torn:
                    yield at
                    return
            pause_s = (pause_s + 0.0037) % 0.05
            time.sleep(pause_s)
    finally:
        pages.close()
