"""Hangs, fences and regroups teach the judge nothing: the fiftieth is seen as fast as the first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest

from watchdog.heartbeat.culprit import HeartbeatJudge
from watchdog.heartbeat.findings import FindingKind
from watchdog.heartbeat.layout import Collective, Granularity, Phase, ProcessState, Snapshot

RANKS, VICTIM = 4, 2
PERIOD_S = 0.1
HANGS = 50


@dataclass
class Group:
    """Four ranks that step in unison at each look of the reader. `granularity`: as ranks on CPU or on GPUs count."""

    granularity: Granularity
    judge: HeartbeatJudge = field(default_factory=HeartbeatJudge)
    now: float = 1000.0
    epoch: int = 1
    step: int = 0
    beats: int = 0

    def __post_init__(self) -> None:
        self.pages = [self._page(rank) for rank in range(RANKS)]

    def work(self, seconds: float) -> None:
        for _ in range(round(seconds / PERIOD_S)):
            self.step += 1
            self.pages = [self._page(rank) for rank in range(RANKS)]
            assert not self._look(), "nobody is to be accused"

    def hang(self, seconds: float, stopped: bool) -> float:
        """The victim does nothing before the collective that its peers wait in. Seconds until it is named."""
        self.step += 1
        process = ProcessState.STOPPED if stopped else ProcessState.RUNNING
        waiting = [self._page(rank, waits=True) for rank in range(RANKS)]
        self.pages = [replace(self.pages[VICTIM], process=process) if r == VICTIM else waiting[r] for r in range(RANKS)]
        started, named = self.now, None
        while self.now - started < seconds:
            if self.granularity is Granularity.COLLECTIVE:  # its peers look up from the wait
                self.beats += 1
                self.pages = [
                    page if page.rank == VICTIM else replace(page, sequence=page.sequence + self.beats * 2)
                    for page in self.pages
                ]
            if VICTIM in self._look() and named is None:
                named = self.now - started
        assert named is not None, f"not named within {seconds} s"
        return named

    def regroup(self, seconds: float) -> None:
        """Fenced, parked, and together again in another epoch."""
        for phase, share in ((Phase.PARKED, 0.5), (Phase.REGROUPING, 0.5)):
            self.pages = [replace(page, phase=phase, sequence=page.sequence + 2) for page in self.pages]
            for _ in range(round(seconds * share / PERIOD_S)):
                self._look()
        self.epoch, self.step = self.epoch + 1, 0

    def _page(self, rank: int, waits: bool = False) -> Snapshot:
        kind = Collective.STEP if self.granularity is Granularity.STEP else Collective.DISPATCH
        completed = [0, 0, 0, 0]
        completed[kind] = self.step - waits
        entered = [0, 0, 0, 0]
        entered[kind] = self.step
        return Snapshot(
            rank,
            10 + rank,
            100 + rank,
            granularity=self.granularity,
            sequence=(self.epoch * 100_000 + self.step) * 10,
            epoch=self.epoch,
            step=self.step,
            phase=Phase.DECODE,
            entered=(entered[0], entered[1], entered[2], entered[3]),
            completed=(completed[0], completed[1], completed[2], completed[3]),
        )

    def _look(self) -> set[int | None]:
        """Ranks that are named."""
        self.now += PERIOD_S
        findings = self.judge.observe(self.now, self.pages, self.epoch)
        return {one.rank for one in findings if one.confirmed and one.kind is FindingKind.HUNG}


def hangs(group: Group, stopped: bool, regroup: bool) -> Iterator[float]:
    for _ in range(HANGS):
        group.work(1.0)
        yield group.hang(5.0, stopped)
        if regroup:
            group.regroup(2.0)


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("regroup", [False, True])
def test_hangs_do_not_blunt_the_judge(granularity: Granularity, stopped: bool, regroup: bool) -> None:
    group = Group(granularity)
    group.work(60.0)
    times = list(hangs(group, stopped, regroup))
    assert times[0] < 3.0
    assert max(times) <= times[0] + PERIOD_S + 0.01, times
