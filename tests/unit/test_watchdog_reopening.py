"""When NVML is initialised again."""

from __future__ import annotations

from itertools import pairwise

import pytest

from watchdog.reopening import REOPEN_S, Reopening

FAST_S = 0.01


def times(reopening: Reopening, gone: set[str], present: int, since: float, until: float, took_s: float) -> list[float]:
    """Polled every quarter of a second, as by the child that reads GPUs."""
    steps = int((until - since) / 0.25)
    moments = [since + 0.25 * step for step in range(steps)]
    return [now for now in moments if reopening.due(gone, present, took_s, now)]


def test_never_while_all_are_there() -> None:
    assert times(Reopening(), set(), 4, 0, 60, FAST_S) == []


def test_empty_place_is_looked_at_often_however_long_it_has_been_empty() -> None:
    reopening = Reopening()
    times(reopening, set(), 4, 0, 10, FAST_S)
    found = times(reopening, {"a"}, 3, 10, 700, FAST_S)
    assert found[0] == 10 + REOPEN_S[0]
    assert max(later - earlier for earlier, later in pairwise(found)) <= REOPEN_S[0]


def test_replaced_gpu_is_hardly_waited_for() -> None:
    reopening = Reopening()
    times(reopening, set(), 4, 0, 1, FAST_S)
    times(reopening, {"a"}, 3, 1, 5, FAST_S)
    found = times(reopening, {"a"}, 4, 5, 95, FAST_S)
    assert len(found) == 3
    assert times(reopening, {"a", "b"}, 3, 95, 97, FAST_S) != []  # another place is empty


def test_gpu_that_was_gone_at_the_start_has_an_empty_place() -> None:
    reopening = Reopening()
    assert times(reopening, set(), 3, 0, 1, FAST_S) == [], "whom ranks are bound to is not known yet"
    reopening.expect(4)
    found = times(reopening, {"a"}, 3, 1, 60, FAST_S)
    assert found[0] == 1 + REOPEN_S[0]
    assert max(later - earlier for earlier, later in pairwise(found)) <= REOPEN_S[0]


@pytest.mark.parametrize(("took_s", "pause_s"), [(0.1, 2.0), (1.0, 20.0), (9.0, 30.0)])
def test_slow_driver_is_spared(took_s: float, pause_s: float) -> None:
    reopening = Reopening()
    times(reopening, set(), 4, 0, 1, took_s)
    found = times(reopening, {"a"}, 3, 1, 70, took_s)
    assert found[1] - found[0] == pause_s
