"""How long silence may last."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watchdog.heartbeat.intervals import Estimate, IntervalHistory, IntervalPolicy, SilenceLimits
from watchdog.heartbeat.layout import Phase

POLICY = IntervalPolicy()


def history(*intervals: float) -> IntervalHistory:
    found = IntervalHistory(POLICY, Estimate(0.25, 0.1))
    for interval in intervals:
        found.add(interval)
    return found


@given(st.lists(st.floats(-1.0, 1e6), max_size=1000))
def test_limits_keep_their_bounds(intervals: list[float]) -> None:
    limit = history(*intervals).limit_s
    assert POLICY.floor_s <= limit <= POLICY.ceiling_s


@given(st.lists(st.floats(0.0, 0.4), min_size=400, max_size=600))
def test_the_window_alone_counts(intervals: list[float]) -> None:
    forgotten = history(*[5.0] * 50, *intervals).limit_s
    assert forgotten == pytest.approx(history(*intervals).limit_s, abs=1e-6)


@given(st.integers(0, 12))
def test_stalls_of_half_a_second_keep_a_stop_detectable_in_time(stalls: int) -> None:
    mixed = history(*[0.1] * (100 - stalls), *[0.6] * stalls)
    assert 1.0 <= mixed.limit_s + POLICY.confirm_s <= 2.6


def test_regular_beats_give_a_short_limit_and_slow_ones_a_long_one() -> None:
    assert history(*[0.1] * 400).limit_s == pytest.approx(0.1 + 5.612 * 0.1 + 0.5, abs=1e-3)
    assert history(*[2.0] * 400).limit_s > 2.5


def test_one_hang_that_passed_does_not_blind() -> None:
    assert history(*[0.1] * 399, 3600.0).limit_s < 1.8


def test_a_rank_that_has_become_slow_widens_the_limit_step_by_step() -> None:
    limits = [history(*[0.1] * 400, *[5.0] * slow).limit_s for slow in (0, 1, 20, 100)]
    assert limits == sorted(limits)
    assert limits[1] - limits[0] < 0.2
    assert history(*[5.0] * 400).limit_s > 5.5


def test_phi_grows_with_silence() -> None:
    regular = history(*[0.1] * 400)
    values = [regular.phi(silent) for silent in (0.1, 0.5, 1.0, 1.1, 2.0, 100.0)]
    assert values == sorted(values)
    assert regular.phi(regular.limit_s) == pytest.approx(8.0, abs=0.05)
    assert values[-1] == math.inf


def test_slow_phases_have_wide_limits_that_nothing_shortens() -> None:
    limits = SilenceLimits(POLICY)
    for phase in Phase:
        for _ in range(500):
            limits.learn(phase, 0.05)
    assert limits.limit_s(Phase.LOADING) == limits.limit_s(Phase.COMPILING) == 900.0
    assert limits.limit_s(Phase.REGROUPING) == 60.0
    assert limits.limit_s(Phase.IDLE) < 1.3
    assert limits.phi(Phase.LOADING, 5.0) is None


def test_every_phase_has_a_limit() -> None:
    limits = SilenceLimits(POLICY)
    assert all(limits.limit_s(phase) >= POLICY.floor_s for phase in Phase)
