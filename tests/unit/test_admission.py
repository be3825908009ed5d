"""Who is refused, and told to come again when. Ordinary use and recoveries refuse nobody."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_daemon.admission import FEWEST, LONGEST_RETRY_S, WINDOW_S, Departures, Limits, Queue, retry_after
from elastic_daemon.config import Settings

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


@given(st.lists(st.tuples(st.sampled_from(["arrive", "join", "begin", "leave"]), st.integers(0, 5)), max_size=60))
def test_the_queue_counts_each_once(steps: list[tuple[str, int]]) -> None:
    queue = Queue()
    arriving: dict[int, object] = {}
    ends = {}
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
