"""Who is refused, and told to come again when. Ordinary use and recoveries refuse nobody."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_daemon.config import Settings
from elastic_daemon.gates.admission import FEWEST, LONGEST_RETRY_S, WINDOW_S, Departures, Limits, Queue, retry_after

LIMITS = Limits(max_waiting=100, queue_timeout_s=30.0)
RATES = st.none() | st.floats(0.01, 1e4)


@given(st.integers(0, 10_000), RATES, st.booleans())
def test_refused_is_who_would_wait_too_long_and_nobody_else(waiting: int, rate: float | None, serving: bool) -> None:
    seconds = retry_after(waiting, rate, LIMITS, serving=serving)
    full = waiting >= LIMITS.max_waiting
    late = serving and rate is not None and waiting / rate > LIMITS.queue_timeout_s
    assert (seconds is not None) == (full or late)
    assert seconds is None or 1 <= seconds <= LONGEST_RETRY_S


@given(st.integers(0, 99), RATES)
def test_in_a_pause_only_a_full_queue_refuses(waiting: int, rate: float | None) -> None:
    assert retry_after(waiting, rate, LIMITS, serving=False) is None
    assert retry_after(LIMITS.max_waiting, rate, LIMITS, serving=False) is not None


@given(st.integers(0, 5000), st.floats(0.1, 1e3))
def test_who_comes_again_as_told_gets_in(waiting: int, rate: float) -> None:
    seconds = retry_after(waiting, rate, LIMITS, serving=True)
    if seconds is not None and seconds < LONGEST_RETRY_S and waiting < LIMITS.max_waiting:
        left = max(0, waiting - math.floor(seconds * rate))
        assert left / rate <= LIMITS.queue_timeout_s + 1 / rate


@pytest.mark.parametrize("streams", [1, 16, 64, 512, 4095])
def test_ordinary_use_is_never_refused_by_the_defaults(streams: int) -> None:
    settings = Settings()
    limits = Limits(settings.max_waiting, settings.queue_timeout)
    for rate in (None, 8.0, 100.0):
        assert retry_after(streams, rate, limits, serving=True) is None
        assert retry_after(streams, rate, limits, serving=False) is None


def test_a_pause_says_nothing_about_the_rate() -> None:
    departures = Departures()
    departures.serving(True, 0.0)
    for second in range(21):
        departures.left(float(second))
    before = departures.rate(20.0)
    departures.serving(False, 20.0)
    departures.serving(True, 1020.0)
    assert before == departures.rate(1020.0) == pytest.approx(21 / 20)
    assert departures.rate(1020.0 + 2 * WINDOW_S) is None, "nobody has left lately: there is nothing to go by"


def test_too_few_departures_say_nothing() -> None:
    departures = Departures()
    departures.serving(True, 0.0)
    for number in range(FEWEST):
        assert departures.rate(float(number)) is None
        departures.left(float(number))
    assert departures.rate(float(FEWEST)) == pytest.approx(1.0)


@given(gap=st.floats(0.5, 1000.0), watched=st.floats(WINDOW_S, 600.0))
def test_a_slow_pace_is_told_and_never_told_too_low(gap: float, watched: float) -> None:
    departures = Departures()
    departures.serving(True, 0.0)
    departures.somebody_waits(0.0)
    for number in range(1, int(watched / gap) + 1):
        departures.left(number * gap)
    rate = departures.rate(watched)
    assert rate is not None
    assert 1 / gap <= rate * (1 + 1e-9)
    assert rate <= FEWEST / (FEWEST - 1) / gap + 2 / WINDOW_S


def test_few_departures_tell_only_of_a_queue_that_was_there_all_the_time() -> None:
    departures = Departures()
    departures.serving(True, 0.0)
    assert departures.rate(10 * WINDOW_S) is None, "idle"
    departures.somebody_waits(1000.0)
    assert departures.rate(1000.0 + WINDOW_S - 1) is None, "a first burst"
    departures.left(1059.0)
    assert departures.rate(1000.0 + WINDOW_S) == pytest.approx(2 / WINDOW_S)
    assert departures.rate(1000.0 + 3 * WINDOW_S) == pytest.approx(1 / WINDOW_S), "nobody has left lately"
    departures.nobody_waits()
    departures.somebody_waits(1200.0)
    assert departures.rate(1200.0 + WINDOW_S - 1) is None, "it was empty in between"
    departures.serving(False, 1200.0 + WINDOW_S - 1)
    assert departures.rate(9000.0) is None, "a pause does not count"
    departures.serving(True, 9000.0)
    assert departures.rate(9001.0) == pytest.approx(1 / WINDOW_S)


SLOW = Limits(max_waiting=4096, queue_timeout_s=30.0)


def test_a_queue_that_hardly_moves_is_not_joined_for_ever() -> None:
    queue = Queue()
    queue.departures.serving(True, 0.0)
    for number in range(10):
        assert queue.retry_after(SLOW, 0.0) is None
        queue.arrive()
        queue.join(str(number))
    queue.begin("0", 20.0)
    assert queue.retry_after(SLOW, WINDOW_S - 1) is None, "that may still be a start"
    seconds = queue.retry_after(SLOW, WINDOW_S)
    assert seconds == math.ceil(9 / (2 / WINDOW_S) - 30.0), "nine wait, one left, one may come"
    queue.leave(map(str, range(10)))
    assert queue.retry_after(SLOW, WINDOW_S + 1) is None, "nobody waits any more"
    assert queue.refused == 1
    queue.arrive()()


@given(
    idle=st.sampled_from([0.0, 1.0, 1e4]),
    steps=st.lists(st.tuples(st.floats(0.0, WINDOW_S * 0.999), st.booleans()), max_size=100),
)
def test_a_first_burst_is_never_refused(idle: float, steps: list[tuple[float, bool]]) -> None:
    """Of a service that has just started, or had nothing to do: whatever its pace, in its first minute."""
    queue = Queue()
    queue.departures.serving(True, 0.0)
    assert queue.retry_after(SLOW, 0.0) is None
    queue.arrive()
    queue.join("one before")
    queue.begin("one before", 0.0)
    waiting: list[str] = []
    departed = 0
    for number, (after, comes) in enumerate(sorted(steps)):
        if comes:
            assert queue.retry_after(SLOW, idle + after) is None
            queue.arrive()
            queue.join(str(number))
            waiting.append(str(number))
        elif waiting and departed < FEWEST - 2:
            queue.begin(waiting.pop(0), idle + after)
            departed += 1
    queue.leave(waiting)
    assert queue.waiting == 0
    queue.arrive()()


@given(st.lists(st.tuples(st.sampled_from(["arrive", "join", "begin", "leave"]), st.integers(0, 5)), max_size=60))
def test_the_queue_counts_each_once(steps: list[tuple[str, int]]) -> None:
    queue = Queue()
    arriving: dict[int, object] = {}
    ends: dict[int, Any] = {}
    unstarted: set[int] = set()
    newest = None
    for what, who in steps:
        if what == "arrive":
            arriving[key := len(ends)] = True
            ends[key] = queue.arrive()
            newest = key
        elif what == "join":
            queue.join(str(who))
            unstarted.add(who)
            arriving.pop(newest, None)  # type: ignore[arg-type]
        elif what == "begin":
            queue.begin(str(who), 0.0)
            unstarted.discard(who)
        else:
            queue.leave([str(who)])
            unstarted.discard(who)
        assert queue.waiting == len(arriving) + len(unstarted)
    for end in ends.values():
        end()
        end()
    queue.leave(map(str, range(6)))
    assert queue.waiting == 0
    # No other test may be taken for the last of these requests.
    queue.arrive()()


def test_refusals_are_counted() -> None:
    queue, limits = Queue(), Limits(1, 30.0)
    assert queue.retry_after(limits, 0.0) is None
    end = queue.arrive()
    assert queue.retry_after(limits, 0.0) == 5
    end()
    assert queue.retry_after(limits, 0.0) is None
    assert queue.refused == 1


def test_who_would_be_refused_is_told_and_counts_for_nothing() -> None:
    queue, full = Queue(), Limits(10, 30.0)
    queue.departures.serving(True, 0.0)
    assert queue.refusal(full, 0.0) is None
    assert queue.departures.rate(10 * WINDOW_S) is None, "nobody has come, so nobody waits"
    for number in range(10):
        assert queue.retry_after(full, 600.0) is None
        queue.arrive()
        queue.join(str(number))
    assert queue.refusal(full, 600.0) == "10 requests wait already, and no more may"
    assert queue.refusal(SLOW, 600.0 + WINDOW_S) == "a request would wait 600 s, and may for 30 s"
    queue.departures.serving(False, 600.0 + WINDOW_S)
    assert queue.refusal(SLOW, 600.0 + WINDOW_S) is None, "a recovery makes requests wait"
    assert queue.refusal(full, 600.0 + WINDOW_S) is not None
    queue.leave(map(str, range(10)))
    assert queue.refusal(full, 600.0 + WINDOW_S) is None
    assert queue.refused == 0
    queue.arrive()()


@given(st.integers(0, 30), st.integers(0, 30), st.booleans(), st.floats(0.0, 200.0))
def test_refusal_and_admission_agree(waiting: int, left: int, serving: bool, now: float) -> None:
    queue, limits = Queue(), Limits(20, 10.0)
    queue.departures.serving(True, 0.0)
    queue.departures.somebody_waits(0.0)
    for _ in range(left):
        queue.departures.left(now / 2)
    queue.departures.serving(serving, now)
    for number in range(waiting):
        queue.join(str(number))
    assert (queue.refusal(limits, now) is None) == (queue.retry_after(limits, now) is None)
