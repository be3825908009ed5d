"""Counters of collectives in stream order: what is written, and what is done where no device can write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from elastic_daemon.engine.device_times import EVERY, DeviceTimes, Times
from elastic_daemon.engine.heartbeat import Steps, open_page
from elastic_daemon.engine.stream_counters import CollectiveCount, StreamCounters
from watchdog.heartbeat.layout import COMPLETED, ENTERED, Collective, Granularity, Phase
from watchdog.heartbeat.reader import PageDirectory

pytestmark = pytest.mark.contract


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, which maps the page")
def test_without_a_gpu_whole_steps_are_counted(tmp_path: Path) -> None:
    with capture_logs() as said:
        counters = StreamCounters(torch.device("cuda", 0))
        page = open_page({"heartbeat_dir": str(tmp_path), "rank": 0, "incarnation": 1}, counters.map)
    assert page.granularity is Granularity.STEP
    assert counters.count() is None
    assert "heartbeat_per_step" in [one["event"] for one in said]
    page.close()


def test_each_group_counts_from_the_start_and_each_kind_for_itself() -> None:
    written: list[tuple[int, int]] = []
    for _ in range(2):
        # No step has begun: none is timed, and no event is made.
        count = CollectiveCount(lambda word, value: written.append((word, value)), DeviceTimes(pytest.fail))
        count.enter(Collective.DISPATCH)
        count.complete(Collective.DISPATCH)
        count.enter(Collective.COMBINE)
        count.complete(Collective.COMBINE)
        count.enter(Collective.DISPATCH)
    dispatch, combine = Collective.DISPATCH, Collective.COMBINE
    assert written == 2 * [
        (ENTERED + dispatch, 1),
        (COMPLETED + dispatch, 1),
        (ENTERED + combine, 1),
        (COMPLETED + combine, 1),
        (ENTERED + dispatch, 2),
    ]


def test_a_host_that_syncs_looks_up_from_that_and_not_from_what_its_device_is_in(tmp_path: Path) -> None:
    page = open_page({"heartbeat_dir": str(tmp_path), "rank": 0, "incarnation": 1})
    steps = Steps(page)
    steps.begin_epoch(1)
    steps.begin(Phase.DECODE)
    page.enter(Collective.DISPATCH)  # as its device would
    page.enter(Collective.SYNC)
    pages = PageDirectory(tmp_path)
    (both,), _ = pages.read()
    page.complete(Collective.SYNC)
    (device,), _ = pages.read()
    assert (both.waited_for, both.collective) == (Collective.SYNC, Collective.DISPATCH)
    assert device.waited_for is Collective.DISPATCH
    pages.close()
    page.close()


class TimedSteps(StreamCounters):
    """Has always just learnt what a step took."""

    landings = 0

    def begin_step(self, number: int) -> Times | None:
        return Times(9, 8, 7, 2) if number == EVERY else None

    def landed(self, newest: bool) -> None:
        assert newest
        self.landings += 1


def test_times_of_steps_get_onto_the_page(tmp_path: Path) -> None:
    counters = TimedSteps(torch.device("cuda", 0))
    page = open_page({"heartbeat_dir": str(tmp_path), "rank": 0, "incarnation": 1}, lambda page: Granularity.DEVICE)
    steps = Steps(page, counters)
    steps.begin_epoch(1)
    for _ in range(EVERY):
        steps.begin(Phase.DECODE)
        steps.end()
    pages = PageDirectory(tmp_path)
    (read,), _ = pages.read()
    assert (read.worked_ns, read.waited_ns, read.starved_ns, read.timed) == (9, 8, 7, 2)
    assert counters.landings == EVERY
    pages.close()
    page.close()
