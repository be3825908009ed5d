"""Whether a loop stood still, told from how long its turns take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_daemon.control.pace import TOLERANCE_S, Pace

SECONDS = st.floats(0.0, 60.0)


@given(st.lists(st.tuples(SECONDS, st.floats(0.0, TOLERANCE_S * 0.99)), max_size=20))
def test_turns_that_end_when_they_mean_to_are_no_stall(turns: list[tuple[float, float]]) -> None:
    """However long the waits, and also if something ends them early."""
    now, pace = 100.0, Pace(100.0)
    for meant_s, late_s in turns:
        assert pace.stalled_s(now + meant_s / 2, meant_s) == 0.0
        now += meant_s / 2 + meant_s + late_s
        assert pace.stalled_s(now, meant_s) == 0.0


@given(SECONDS, st.floats(TOLERANCE_S * 1.01, 1e5))
def test_a_stall_is_what_a_turn_took_longer(meant_s: float, stall_s: float) -> None:
    pace = Pace(100.0)
    now = 100.0 + meant_s + stall_s
    assert pace.stalled_s(now, meant_s) == pytest.approx(stall_s)
    assert pace.stalled_s(now + meant_s, meant_s) == 0.0, "told once"
