"""Real writer processes that are stopped and killed while a reader watches."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from watchdog.heartbeat.culprit import HeartbeatJudge
from watchdog.heartbeat.findings import Finding, FindingKind
from watchdog.heartbeat.layout import Collective, ProcessState, Snapshot
from watchdog.heartbeat.page import page_path
from watchdog.heartbeat.reader import PageDirectory, PageReader

ROOT = Path(__file__).parents[2]

Start = Callable[[int, str], "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as processes:

        def start(rank: int, mode: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "tests.unit.heartbeat_rank", str(tmp_path), str(rank), mode]
            process = processes.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT))
            processes.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            return process

        yield start


def read_until(reader: PageReader, condition: Callable[[Snapshot], bool], timeout_s: float = 10.0) -> Snapshot:
    deadline = time.monotonic() + timeout_s
    while not condition(page := reader.read()):
        assert time.monotonic() < deadline, f"waited for {timeout_s} s, last {page}"
        time.sleep(0.005)
    return page


def test_every_reading_of_a_busy_writer_is_consistent(start: Start, tmp_path: Path) -> None:
    start(0, "busy")
    with PageReader(page_path(tmp_path, 10)) as reader:
        read_until(reader, lambda page: page.step > 0)
        good, last = 0, 0
        deadline = time.monotonic() + 30
        while good < 200:  # most readings meet an update: this writer does nothing else
            assert time.monotonic() < deadline, f"only {good} readings were whole"
            page = reader.read()
            if page.torn:
                continue
            good += 1
            dispatch, combine = Collective.DISPATCH, Collective.COMBINE
            assert page.step - page.entered[dispatch] in (0, 1)
            assert (
                page.entered[dispatch] >= page.completed[dispatch] >= page.entered[combine] >= page.completed[combine]
            )
            # Five updates a step, after the one that began the epoch: the sequence says what the counters must be.
            updates = page.entered_total + page.completed_total + page.step
            assert page.sequence == 2 * (updates + 1)
            assert page.sequence >= last
            last = page.sequence


def test_a_kill_at_any_moment_leaves_a_readable_page(start: Start, tmp_path: Path) -> None:
    for rank in range(5):
        process = start(rank, "busy")
        with PageReader(page_path(tmp_path, 10 + rank)) as reader:
            read_until(reader, lambda page, least=100 * rank: page.step > least)  # type: ignore[misc]
            process.kill()
            process.wait()
            page = reader.read()
            assert page.process is ProcessState.GONE
            assert page.step > 100 * rank and page.epoch == 3


def test_a_writer_that_ends_in_the_middle_of_an_update(start: Start, tmp_path: Path) -> None:
    process = start(0, "torn")
    with PageReader(page_path(tmp_path, 10)) as reader:
        read_until(reader, lambda page: page.process is ProcessState.STOPPED)
        stopped = reader.read()  # that reading may have been of the page before the stop
        assert stopped.torn and stopped.sequence % 2 == 1
        process.kill()
        process.wait()
        page = reader.read()
    assert (page.torn, page.process, page.epoch) == (True, ProcessState.GONE, 3)


def watch(
    tmp_path: Path, judge: HeartbeatJudge, seconds: float, until: Callable[[list[Finding]], bool]
) -> list[Finding]:
    """What is found first; with nothing in `seconds`, an empty list."""
    pages = PageDirectory(tmp_path)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            snapshots, errors = pages.read()
            assert errors == []
            findings = judge.observe(time.monotonic(), snapshots)
            if findings and until(findings):
                return findings
            time.sleep(0.05)
    finally:
        pages.close()
    return []


def test_stall_stop_and_death_of_idle_ranks(start: Start, tmp_path: Path) -> None:
    processes = [start(rank, "idle") for rank in range(3)]
    judge = HeartbeatJudge()
    assert watch(tmp_path, judge, 0.5, bool) == []

    processes[1].send_signal(signal.SIGSTOP)  # half a second: no finding, also not afterwards
    assert watch(tmp_path, judge, 0.5, bool) == []
    processes[1].send_signal(signal.SIGCONT)
    assert watch(tmp_path, judge, 1.0, bool) == []

    processes[2].send_signal(signal.SIGSTOP)
    # The bar is 3 s; a loaded machine stalls the reader too, and time that it did not see does not count.
    [hung] = watch(tmp_path, judge, 8.0, lambda findings: all(finding.confirmed for finding in findings))
    assert (hung.kind, hung.rank, hung.evidence["process"]) == (FindingKind.HUNG, 2, "stopped")

    processes[0].kill()
    found = watch(tmp_path, judge, 8.0, lambda findings: len(findings) == 2)
    assert [(finding.kind, finding.rank) for finding in found] == [(FindingKind.DEAD, 0), (FindingKind.HUNG, 2)]
