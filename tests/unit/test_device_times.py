"""What is made of CUDA events around collectives, on a stream that is simulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_daemon.engine.device_times import EVERY, LONGEST_PAUSE_NS, ORDINARY_NS, DeviceTimes, Times
from watchdog.heartbeat.layout import Collective, Granularity, Phase, Snapshot
from watchdog.heartbeat.straggler import StragglerPolicy, StragglerWatch

US, MS = 1_000, 1_000_000
LAYERS = 3


@dataclass
class Stream:
    """A host that launches and a device that follows. `now`: of the host; `free`: when all launched work is done."""

    now: int = 0
    free: int = 0
    made: int = 0
    records: int = 0

    def launch(self, host_ns: int, device_ns: int) -> None:
        self.now += host_ns
        self.free = max(self.free, self.now) + device_ns

    def make(self) -> RecordedEvent:
        self.made += 1
        return RecordedEvent(self)


@dataclass
class RecordedEvent:
    stream: Stream
    at: int = 0

    def record(self) -> None:
        self.stream.records += 1
        self.at = self.stream.free = max(self.stream.free, self.stream.now)

    def query(self) -> bool:
        return self.at <= self.stream.now

    def elapsed_time(self, end: RecordedEvent) -> float:
        assert self.query() and end.query(), "CUDA refuses that"
        return (end.at - self.at) / 1e6


@dataclass
class Rank:
    """`host`: ns to launch a part of a layer. Others, on the device; `sampling`: at the end of a step."""

    host: int = 0
    experts: int = 100 * US
    attention: int = 50 * US
    collective: int = 20 * US
    sampling: int = 200 * US
    stream: Stream = field(default_factory=Stream)
    number: int = 0
    told: list[Times] = field(default_factory=list)
    freeing: bool = False  # memory of an older group

    def __post_init__(self) -> None:
        self.times = DeviceTimes(self.stream.make, lambda: self.stream.now, lambda: self.freeing)

    def step(self, lost_turn: int = 0, waits: bool = True) -> None:
        """`lost_turn`: so long another process has the device at first. `waits`: the host does, for the output."""
        self.number += 1
        if (times := self.times.begin_step(self.number)) is not None:
            self.told.append(times)
        self.stream.launch(0, lost_turn)
        for _ in range(LAYERS):
            self.stream.launch(self.host, self.attention)
            self._collective(Collective.DISPATCH)
            self.stream.launch(self.host, self.experts)
            self._collective(Collective.COMBINE)
        self.stream.launch(0, self.sampling)
        if waits:
            self.land()

    def land(self) -> None:
        self.stream.now = max(self.stream.now, self.stream.free)
        self.times.landed(newest=True)

    def _collective(self, kind: Collective) -> None:
        self.times.enter(kind)
        self.stream.launch(0, self.collective)
        self.times.complete(kind)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()


def timed(rank: Rank) -> Times:
    """Of the first step that is."""
    rank.steps(EVERY + 2)
    (times,) = rank.told
    return times


def test_experts_are_work_and_collectives_are_waiting() -> None:
    assert timed(Rank()) == Times(LAYERS * 100 * US, 2 * LAYERS * 20 * US, 0, LAYERS)


@given(st.integers(0, 50 * MS))
def test_attention_of_its_own_prompts_makes_no_rank_slow(attention: int) -> None:
    assert timed(Rank(attention=attention)).worked <= LAYERS * 100 * US + max(0, attention - ORDINARY_NS + 200 * US)


@given(host=st.integers(0, MS), experts=st.integers(0, MS))
def test_a_device_never_seems_slower_than_it_is(host: int, experts: int) -> None:
    times = timed(Rank(host=host, experts=experts))
    assert times.worked >= times.starved
    assert times.worked - times.starved <= LAYERS * experts
    assert times.worked <= LAYERS * (host + experts)


def test_a_device_behind_its_host_does_not_starve() -> None:
    """The host has launched all long before, since the others of the group are waited for."""
    assert timed(Rank(host=10 * US, collective=5 * MS)).starved == 0


def test_a_turn_that_is_lost_when_a_step_begins_is_work() -> None:
    rank = Rank()
    rank.steps(EVERY)
    rank.step(lost_turn=6 * MS)
    rank.step()
    # What else is in there: sampling before and attention behind.
    assert rank.told[0].worked == LAYERS * 100 * US + 6 * MS + 250 * US - ORDINARY_NS


def test_a_turn_that_is_lost_once_the_host_is_ahead_is_work() -> None:
    rank = Rank(host=10 * US)
    rank.steps(EVERY - 1)
    rank.step(waits=False)
    rank.step(lost_turn=6 * MS, waits=False)
    rank.land()
    rank.step()
    assert rank.told[0].worked >= LAYERS * 100 * US + 6 * MS - ORDINARY_NS


def test_a_host_that_comes_late_takes_no_turn_from_its_device() -> None:
    """It has launched a step behind another one, is busy otherwise, and then asks for the output of the first."""
    rank = Rank(host=10 * US)
    rank.steps(EVERY - 1)
    rank.step(waits=False)
    rank.stream.now += 20 * MS
    rank.times.landed(newest=False)
    rank.steps(2)
    assert rank.told[0].worked == LAYERS * 100 * US


def test_a_host_that_was_waiting_for_a_step_before_is_behind_from_then_on() -> None:
    rank = Rank(host=10 * US)
    rank.steps(EVERY - 1)
    rank.step(lost_turn=9 * MS, waits=False)
    rank.stream.now += 9 * MS  # until the output of the step before came, late as well
    rank.times.landed(newest=False)
    rank.stream.now += 2 * MS
    rank.step(lost_turn=6 * MS)
    rank.step()
    # Less by what was left of the step before when that output came: the host went on meanwhile.
    assert LAYERS * 100 * US + 5 * MS - ORDINARY_NS <= rank.told[0].worked <= LAYERS * 100 * US + 6 * MS


def test_a_pause_between_two_steps_is_none() -> None:
    rank = Rank()
    rank.steps(EVERY)
    rank.stream.now += LONGEST_PAUSE_NS + MS
    rank.step(lost_turn=6 * MS)
    rank.step()
    assert rank.told[0].worked == LAYERS * 100 * US


def test_an_exchange_of_experts_behind_a_step_is_none() -> None:
    rank = Rank()
    rank.steps(EVERY)
    rank.times.begin_step(EVERY + 1)
    rank.stream.launch(0, 9 * MS)
    rank._collective(Collective.COMBINE)
    rank.land()
    assert rank.times.begin_step(EVERY + 2) == Times(LAYERS * 100 * US, 2 * LAYERS * 20 * US, 0, LAYERS)


def test_one_step_in_a_few_is_timed_with_the_same_events() -> None:
    rank = Rank()
    rank.steps(5 * EVERY)
    each = 4 * LAYERS + 1
    assert (rank.stream.made, rank.stream.records) == (each, 5 * each - 1)
    assert len(rank.told) == 4


def test_nothing_is_read_before_the_device_has_come_to_it() -> None:
    rank = Rank(collective=MS)
    rank.steps(EVERY)
    for _ in range(3 * EVERY):
        rank.step(waits=False)  # its host is ahead by more and more, and never waits
    assert rank.told == []
    rank.land()
    rank.step()
    assert len(rank.told) == 1


def test_nothing_is_timed_while_memory_of_an_older_group_is_freed() -> None:
    """A query may not return before the kernels of this one have ended, and a fence could not be heard meanwhile."""
    rank = Rank(freeing=True)
    rank.steps(2 * EVERY)
    assert rank.stream.made == 0
    rank.freeing = False
    rank.steps(EVERY + 2)
    assert len(rank.told) == 1


def test_steps_without_collectives_are_none() -> None:
    """Of a group of one."""
    rank = Rank()
    assert all(rank.times.begin_step(number) is None for number in range(1, 100))
    assert rank.stream.made == 0


@pytest.mark.parametrize(
    ("ranks", "slow"),
    [
        ([Rank(), Rank(), Rank(), Rank()], set()),
        ([Rank(attention=800 * US), Rank(), Rank(), Rank()], set()),  # prefills all the time
        ([Rank(host=200 * US), Rank(), Rank(), Rank()], set()),  # its host is the slowest
        ([Rank(), Rank(host=200 * US), Rank(host=200 * US), Rank(host=200 * US)], set()),
        ([Rank(experts=400 * US), Rank(), Rank(), Rank()], {0}),
        ([Rank(experts=400 * US), Rank(host=200 * US), Rank(), Rank()], {0}),
    ],
    ids=["alike", "prefill", "slow-host", "fast-host", "slow", "slow-and-slow-host"],
)
def test_who_is_named(ranks: list[Rank], slow: set[int]) -> None:
    stragglers = StragglerWatch(StragglerPolicy())
    sums = [Times(0, 0, 0, 0)] * len(ranks)
    named: Mapping[int, float] = {}
    for _ in range(30):
        for number, rank in enumerate(ranks):
            rank.steps(5 * EVERY)
            sums[number] = Times(*map(sum, zip(sums[number], *rank.told, strict=True)))
            rank.told = []
        named = stragglers.observe([page(number, times) for number, times in enumerate(sums)], 1, 0.5)
    assert set(named) == slow


def page(rank: int, times: Times) -> Snapshot:
    return Snapshot(
        rank,
        10 + rank,
        100 + rank,
        epoch=1,
        phase=Phase.DECODE,
        granularity=Granularity.DEVICE,
        worked_ns=times.worked,
        waited_ns=times.waited,
        starved_ns=times.starved,
        timed=times.timed,
    )
