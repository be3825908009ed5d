"""Tokens of the GPU drill: which changed, which were near-ties, and what a request that is asked for again tells."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.gpu.life import RUNNER_VARIABLE
from bench.gpu.repeats import compared
from bench.gpu.resumed import resumable, resumed
from bench.gpu.tokens import Judged, token_change
from elastic_daemon.drill.report import StreamResult
from elastic_daemon.drill.sampling import GREEDY, PENALISED, Sampling, constrained, seeded
from tests.unit.drill_stream import stream_of as stream


def test_same_tokens_are_no_change() -> None:
    assert token_change(stream(1, 2), stream(1, 2)) is None


def test_near_tie_in_both_runs() -> None:
    expected = stream(1, 2, 3, logprobs=({1: -0.1}, {2: -0.70, 5: -0.71}, {3: 0.0}))
    actual = stream(1, 5, 3, logprobs=({1: -0.1}, {2: -0.72, 5: -0.70}, {3: 0.0}))
    change = token_change(expected, actual)
    assert change is not None
    assert (change.position, change.expected, change.actual, change.near_tie) == (1, 2, 5, True)
    assert (change.expected_gap, change.actual_gap) == pytest.approx((0.01, 0.02))
    assert "near-tie" in str(change)


def test_error_is_no_near_tie() -> None:
    expected = stream(1, 2, logprobs=({1: 0.0, 9: -8.0}, {2: -0.001, 5: -7.0}))
    actual = stream(1, 5, logprobs=({1: 0.0, 9: -8.0}, {5: -0.1, 2: -2.0}))
    change = token_change(expected, actual)
    assert change is not None and change.near_tie is False
    assert "not a near-tie" in str(change)


@pytest.mark.parametrize(
    "actual",
    [
        stream(1, 5),  # no logprobs
        stream(1, 5, logprobs=({1: 0.0}, {5: -0.1, 7: -2.0})),  # the expected one is not among the likeliest
        stream(1, logprobs=({1: 0.0},)),  # ended too early
    ],
)
def test_gap_that_is_not_known(actual: StreamResult) -> None:
    change = token_change(stream(1, 2, logprobs=({1: 0.0}, {2: -0.001, 5: -7.0})), actual)
    assert change is not None and change.near_tie is None


@pytest.mark.parametrize(("sampling", "near_tie"), [(seeded(1), None), (PENALISED, None), (constrained(2), True)])
def test_logprobs_do_not_judge_what_they_do_not_decide(sampling: Sampling, near_tie: bool | None) -> None:
    tie = ({1: -0.1}, {2: -0.7, 5: -0.7})
    change = token_change(stream(1, 2, logprobs=tie, sampling=sampling), stream(1, 5, logprobs=tie, sampling=sampling))
    assert change is not None and change.near_tie is near_tie
    assert ("gap not known" in str(change)) is (near_tie is None)


def test_a_request_asked_for_again_tells_where_it_differs() -> None:
    expected, other = stream(1, 2), stream(1, 5)
    failed = replace(stream(1), error="cut")
    repeats = compared(expected, [[expected], [expected, other, failed], [other] * 5])
    assert repeats.differ == {1: 0, 3: 1, 5: 5}
    assert str(repeats) == f"{expected.prompt!r} again, undisturbed: 0 of 1, 1 of 3, 5 of 5 differ"


def test_a_stream_taken_up_tells_its_first_other_token() -> None:
    expected = stream(1, 2, 3, 4)
    assert resumed(expected, 2, [3, 4, 9, 9]).change is None
    for tokens, actual in (([2, 7, 4], 7), ([2], None)):
        change = resumed(expected, 1, tokens).change
        assert change is not None
        assert (change.position, change.expected, change.actual) == (2, 3, actual)


def test_a_request_asked_for_again_tells_what_came_from_its_middle() -> None:
    expected = stream(1, 2, 3, 4)
    taken_up = [resumed(expected, 1, [2, 3, 4]), resumed(expected, 2, [7, 4])]
    said = str(replace(compared(expected, [[expected]]), resumed=taken_up))
    assert "0 of 1 differ; taken up from its middle: 1 of 2, " in said
    assert f"taken up after 2 tokens: {expected.prompt!r}: token 2 is 7, not 3" in said


@pytest.mark.parametrize(
    ("sampling", "device", "runner", "can"),
    [
        (GREEDY, "cpu", "0", True),
        (seeded(1), "cuda", None, True),
        (seeded(1), "cuda", "1", True),
        (seeded(1), "cuda", "0", False),  # V1 draws by how often it has drawn
        (seeded(1), "cpu", None, False),  # a CPU has V1 alone
        (PENALISED, "cuda", None, False),
        (constrained(2), "cuda", None, False),
    ],
)
def test_what_a_client_can_take_up(
    sampling: Sampling, device: str, runner: str | None, can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(RUNNER_VARIABLE, raising=False)
    if runner is not None:
        monkeypatch.setenv(RUNNER_VARIABLE, runner)
    assert resumable(sampling, device) is can


def test_changes_are_counted_with_the_streams() -> None:
    judged = Judged()
    judged.count(stream(1, 2), stream(1, 2))
    judged.count(stream(1, 2), stream(1, error="ReadError"))
    tie = ({1: -0.1}, {2: -0.7, 5: -0.7})
    judged.count(stream(1, 2, logprobs=tie), stream(1, 5, logprobs=tie))
    both = Judged()
    both.add(judged)
    both.add(judged)
    assert {name: value for name, value in both.to_json().items() if isinstance(value, int)} == {
        "streams": 6,
        "lost": 2,
        "refused": 0,
        "changed": 2,
        "near_ties": 2,
    }
    assert [change["position"] for change in both.to_json()["changes"]] == [1, 1]
