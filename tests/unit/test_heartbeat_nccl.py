"""NCCL's asynchronous errors as a second witness: they support a finding, and accuse nobody by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_heartbeat_learning import VICTIM, Group
from watchdog.bindings import Binding, Bindings
from watchdog.docket import Docket, Mode
from watchdog.heartbeat.culprit import HeartbeatJudge
from watchdog.heartbeat.findings import Finding, FindingKind
from watchdog.heartbeat.intervals import IntervalPolicy
from watchdog.heartbeat.layout import Granularity, Phase, ProcessState
from watchdog.heartbeat.page import HeartbeatWriter
from watchdog.heartbeats import Heartbeats
from watchdog.signals import load_table
from watchdog.state import State
from watchdog.verdict import Policy, Verdict

REMOTE, CUDA = 6, 1
PERIOD_S = 0.1


def hang(errors: Mapping[int, int], process: ProcessState = ProcessState.RUNNING) -> tuple[float, Finding]:
    """The victim of four hangs, and these ranks report errors. Seconds until it is named, confirmed; the finding."""
    group = Group(Granularity.STEP)
    group.work(60.0)
    group.step += 1
    pages = [replace(group._page(rank, waits=True), async_error=errors.get(rank, 0)) for rank in range(4)]
    pages[VICTIM] = replace(group.pages[VICTIM], async_error=errors.get(VICTIM, 0), process=process)
    started = group.now
    while group.now - started < 10:
        group.now += PERIOD_S
        for finding in group.judge.observe(group.now, pages, group.epoch):
            if finding.confirmed and finding.kind is FindingKind.HUNG:
                return group.now - started, finding
    raise AssertionError("nobody was named")


def test_a_witness_confirms_what_else_needs_more_time() -> None:
    alone_s, alone = hang({})
    with_witness_s, finding = hang({0: REMOTE, 3: REMOTE})
    assert alone_s - with_witness_s == pytest.approx(IntervalPolicy().confirm_s, abs=PERIOD_S * 1.5)
    assert finding.rank == alone.rank == VICTIM
    assert finding.seconds >= finding.limit_s, "the limit holds for witnesses too"
    assert finding.evidence["nccl_witnesses"] == [0, 3] and alone.evidence["nccl_witnesses"] == []


@pytest.mark.parametrize("errors", [{VICTIM: REMOTE}, {0: CUDA}, {0: 3}, {0: 5}])
def test_what_is_no_witness(errors: Mapping[int, int]) -> None:
    """The one that is blamed, and errors that are of the rank that reports them."""
    assert hang(errors)[0] == hang({})[0]


def test_errors_alone_accuse_nobody() -> None:
    """All report that a peer is gone, all go on: nobody is to blame."""
    group = Group(Granularity.STEP)
    for _ in range(100):
        group.step += 1
        group.now += PERIOD_S
        pages = [replace(group._page(rank), async_error=REMOTE) for rank in range(4)]
        assert group.judge.observe(group.now, pages, group.epoch) == []


def test_a_death_explains_what_its_peers_report() -> None:
    judge = HeartbeatJudge()
    group = Group(Granularity.STEP, judge)
    group.work(10.0)
    group.step += 1
    pages = [replace(group._page(rank, waits=True), async_error=REMOTE) for rank in range(4)]
    pages[3] = replace(group.pages[3], process=ProcessState.GONE)
    pages[VICTIM] = group.pages[VICTIM]
    for _ in range(30):
        group.now += PERIOD_S
        found = judge.observe(group.now, pages, group.epoch)
        hung = [one for one in found if one.kind is FindingKind.HUNG]
        assert all(one.evidence["nccl_witnesses"] == [] for one in hung)


class Desk:
    """A docket and the pages of two ranks of this process."""

    def __init__(self, directory: Path) -> None:
        self.docket = Docket(load_table(), Policy(), Mode.ACT, State.load(directory / "state"))
        self.writers = [HeartbeatWriter(directory, rank, 10 + rank) for rank in range(2)]
        self.heartbeats = Heartbeats()
        self.now = 1000.0
        self.bind(1)

    def bind(self, epoch: int) -> None:
        ranks = tuple(Binding(rank, 10 + rank, None, (), writer.path) for rank, writer in enumerate(self.writers))
        self.docket.bind(Bindings(epoch, ranks))

    def look(self) -> list[Any]:
        self.now += PERIOD_S
        self.heartbeats.observe(self.docket.bindings, self.docket, self.now)
        return self.docket.review(self.now, 1_790_000_000.0)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()
        self.heartbeats.close()


def test_it_is_shown_with_the_rank_and_is_no_verdict_on_it(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    for writer in desk.writers:
        writer.begin_epoch(1, Phase.DECODE)
    assert desk.look() == []
    assert [state.nccl_error for state in desk.heartbeats.states] == [None, None]
    desk.writers[1].report_async_error(REMOTE)
    assert desk.look() == []
    assert [state.nccl_error for state in desk.heartbeats.states] == [None, "remote error (6)"]
    case = desk.docket.ranks[1, 11]
    (evidence,) = [one for one in case.log.all(desk.now) if one.signal == "nccl_async_error"]
    assert evidence.active and evidence.detail["error"] == "remote error (6)"
    assert case.judgement.verdict is Verdict.OK
    desk.close()


def test_of_an_epoch_that_is_over_it_is_forgotten(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    for writer in desk.writers:
        writer.begin_epoch(1, Phase.DECODE)
        writer.report_async_error(REMOTE)
    desk.look()
    assert all(state.nccl_error for state in desk.heartbeats.states)
    desk.bind(2)
    desk.look()
    assert not any(state.nccl_error for state in desk.heartbeats.states), "fenced, not yet regrouped"
    for writer in desk.writers:
        writer.report_async_error(0)  # of the new group
        writer.begin_epoch(2)
    desk.look()
    assert not any(state.nccl_error for state in desk.heartbeats.states)
    assert not any(one.active for case in desk.docket.ranks.values() for one in case.log.all(desk.now))
    desk.close()
