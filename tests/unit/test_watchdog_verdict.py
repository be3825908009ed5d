"""The judgement: exhaustively by class, and properties of any evidence."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watchdog.evidence import Evidence
from watchdog.signals import SignalClass, SignalTable, load_table
from watchdog.verdict import (
    Bound,
    GpuHistory,
    Judgement,
    Policy,
    RankView,
    Verdict,
    held_back,
    judge_gpu,
    judge_rank,
    should_quarantine,
)

TABLE = load_table()
POLICY = Policy()
NOW, WALL = 10_000.0, 1_790_000_000.0
INF = float("inf")
CLEAN = GpuHistory()

EXCLUDE = (79, 46, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158)
WATCH = (74, *range(144, 151), 45, 63, 92, 121, 137, 157)
APPLICATION = (13, 31, 32, 39, 40, 41, 68, 69, 80, 94, *range(126, 136))
IGNORED = (43, 44)


def xid(code: int, *ages: float) -> Evidence:
    return Evidence(f"xid:{code}", tuple(NOW - age for age in ages or (0.0,)))


def condition(signal: str, began: float, ended: float | None = None) -> Evidence:
    """Began and ended this long ago; still holds without `ended`."""
    return Evidence(signal, (NOW - began,), INF if ended is None else NOW - ended)


def judge(
    *evidence: Evidence, history: GpuHistory = CLEAN, ranks: tuple[RankView, ...] = (), policy: Policy = POLICY
) -> Judgement:
    return judge_gpu(evidence, TABLE, policy, history, ranks, NOW, WALL)


def test_no_evidence_is_ok() -> None:
    assert judge() == Judgement(Verdict.OK)


@pytest.mark.parametrize("code", EXCLUDE)
def test_fatal_xids_exclude_at_once_and_stay_for_probation(code: int) -> None:
    assert judge(xid(code)).verdict is Verdict.EXCLUDE
    assert judge(xid(code, POLICY.probation_s - 1)).verdict is Verdict.EXCLUDE
    assert judge(xid(code, POLICY.probation_s + 1)).verdict is Verdict.OK


@pytest.mark.parametrize("code", WATCH)
def test_xids_to_look_into_are_suspect_at_first(code: int) -> None:
    assert judge(xid(code)).verdict is Verdict.SUSPECT


@pytest.mark.parametrize("code", IGNORED)
def test_ignored_xids_are_not_even_shown(code: int) -> None:
    assert judge(xid(code, 0.0, 1.0, 2.0)).verdict is Verdict.OK


@pytest.mark.parametrize("code", APPLICATION)
def test_application_xids_need_a_rank_that_stands_still(code: int) -> None:
    moving = RankView(0, 10, "GPU-a", 0.1)
    still = RankView(0, 10, "GPU-a", 2.0)
    assert judge(xid(code, 2.0)).verdict is Verdict.SUSPECT
    assert judge(xid(code, 2.0), ranks=(moving,)).verdict is Verdict.SUSPECT
    assert judge(xid(code, *range(30)), ranks=(moving,)).verdict is Verdict.SUSPECT
    assert judge(xid(code, 2.0), ranks=(still,)).verdict is Verdict.RESTART_RANK


def test_a_rank_that_stood_still_long_before_the_xid_is_another_matter() -> None:
    assert judge(xid(13, 0.5), ranks=(RankView(0, 10, "GPU-a", 50.0),)).verdict is Verdict.SUSPECT


def test_application_xids_of_ranks_without_heartbeat_count_by_repetition() -> None:
    silent = RankView(0, 10, "GPU-a", None)
    assert judge(xid(13, 1.0, 2.0), ranks=(silent,)).verdict is Verdict.SUSPECT
    assert judge(xid(13, 1.0, 2.0, 3.0), ranks=(silent,)).verdict is Verdict.RESTART_RANK


def test_drain_xids_come_again_or_have_company() -> None:
    assert judge(xid(74, 1.0)).verdict is Verdict.SUSPECT
    assert judge(xid(74, 50.0, 1.0)).verdict is Verdict.DRAIN
    assert judge(xid(74, 70.0, 1.0)).verdict is Verdict.SUSPECT
    assert judge(xid(74, 1.0), xid(144, 2.0)).verdict is Verdict.DRAIN
    assert judge(xid(74, 1.0), xid(63, 2.0)).verdict is Verdict.SUSPECT


@pytest.mark.parametrize("companion", [63, 64, 94, 95, 140, 154])
def test_xid_48_with_a_companion(companion: int) -> None:
    assert judge(xid(48, 1.0)).verdict is Verdict.SUSPECT
    assert judge(xid(48, 1.0), xid(companion, 2.0)).verdict is Verdict.EXCLUDE
    if companion in (63, 94, 154):
        assert judge(xid(48, 1.0), xid(companion, 90.0)).verdict is not Verdict.EXCLUDE


def test_xid_154_says_only_to_read_again() -> None:
    assert judge(xid(154)).verdict is Verdict.SUSPECT
    assert judge(xid(154), condition("recovery_action:1", 0.1)).verdict is Verdict.EXCLUDE


@pytest.mark.parametrize(
    "signal", [name for name, rule in TABLE.rules.items() if rule.cls is SignalClass.DRAIN and rule.hold_s > 0]
)
def test_conditions_must_last(signal: str) -> None:
    hold = TABLE.rule(signal).hold_s
    assert judge(condition(signal, hold * 0.9)).verdict is Verdict.SUSPECT
    assert judge(condition(signal, hold * 1.1)).verdict is Verdict.DRAIN
    assert judge(condition(signal, hold * 0.9 + 1, 1)).verdict is Verdict.SUSPECT
    assert judge(condition(signal, hold * 2 + 1, 1)).verdict is Verdict.DRAIN
    assert judge(condition(signal, hold * 0.5 + 20, 20)).verdict is Verdict.OK


def test_two_blips_do_not_confirm_each_other() -> None:
    assert judge(condition("thermal_slowdown", 3), condition("power_brake", 3)).verdict is Verdict.SUSPECT


def test_history() -> None:
    assert judge(history=GpuHistory(quarantined=WALL - 1)).verdict is Verdict.EXCLUDE
    hung = GpuHistory(restarts=(WALL - 30, WALL - 20, WALL - 10))
    assert judge(history=hung).verdict is Verdict.DRAIN
    assert judge(history=hung, policy=Policy(repeat_restarts=0)).verdict is Verdict.OK
    assert judge(history=GpuHistory(restarts=(WALL - 9000, WALL - 20, WALL - 10))).verdict is Verdict.OK
    failures = GpuHistory(failures=(WALL - 30, WALL - 20, WALL - 10))
    assert should_quarantine(failures, POLICY, WALL)
    assert not should_quarantine(failures, POLICY, WALL + 2 * POLICY.quarantine_window_s)
    assert not should_quarantine(failures, Policy(quarantine_failures=0), WALL)


def test_ranks() -> None:
    assert judge_rank((condition("hung", 0),), TABLE, NOW).verdict is Verdict.RESTART_RANK
    assert judge_rank((condition("hung", 5, 1),), TABLE, NOW).verdict is Verdict.OK
    assert judge_rank((condition("straggler", 100),), TABLE, NOW).verdict is Verdict.SUSPECT
    both = judge_rank((condition("straggler", 100), condition("hung", 1)), TABLE, NOW)
    assert both.signal == "hung" and len(both.evidence) == 2


GPUS = {"a": (0,), "b": (1,), "c": (2,), "d": (3, 4)}
HANGS = judge_rank((condition("hung", 1),), TABLE, NOW)
LATELY = (NOW - 10, NOW - 5)


@pytest.mark.parametrize(
    ("verdict", "gpu", "bound", "held"),
    [
        (Verdict.SUSPECT, "a", Bound(GPUS, min_ranks=5), False),
        (Verdict.EXCLUDE, "a", Bound(GPUS, min_ranks=4), False),
        (Verdict.EXCLUDE, "a", Bound(GPUS, min_ranks=5), True),
        (Verdict.EXCLUDE, "d", Bound(GPUS, min_ranks=4), True),
        (Verdict.DRAIN, "a", Bound(GPUS, min_ranks=5), True),
        (Verdict.EXCLUDE, "spare", Bound(GPUS, min_ranks=5), False),
        (Verdict.EXCLUDE, "a", Bound(GPUS, LATELY, min_ranks=1), True),
        (Verdict.EXCLUDE, "a", Bound(GPUS, (NOW - 700, NOW - 5), min_ranks=1), False),
        (Verdict.EXCLUDE, "a", Bound(GPUS, leaving=frozenset("b"), min_ranks=4), True),
        (Verdict.EXCLUDE, "a", Bound(GPUS, leaving=frozenset("a"), min_ranks=5), False),
        (Verdict.RESTART_RANK, None, Bound(GPUS, min_ranks=5), False),
        (Verdict.RESTART_RANK, None, Bound(GPUS, LATELY), False),
        (Verdict.RESTART_RANK, None, Bound(GPUS, restarts=LATELY), True),
        (Verdict.RESTART_RANK, None, Bound(GPUS, restarts=(NOW - 700, NOW - 5)), False),
    ],
)
def test_breaker(verdict: Verdict, gpu: str | None, bound: Bound, held: bool) -> None:
    assert bool(held_back(Judgement(verdict), gpu, bound, POLICY, NOW)) is held


def test_a_rank_that_hangs_is_restarted_for_whatever_else_speaks_against_it() -> None:
    """A site may have stragglers restarted: that alone is limited."""
    site = SignalTable({**TABLE.rules, "straggler": replace(TABLE.rule("straggler"), cls=SignalClass.RESTART_RANK)})
    slow = judge_rank((condition("straggler", 100),), site, NOW)
    both = judge_rank((condition("straggler", 100), condition("hung", 1)), site, NOW)
    bound = Bound(GPUS, LATELY, LATELY, min_ranks=9)
    assert (slow.verdict, both.verdict) == (Verdict.RESTART_RANK,) * 2
    assert held_back(slow, None, bound, POLICY, NOW)
    assert held_back(both, None, bound, POLICY, NOW) is None


AGES = st.floats(0, 500, allow_nan=False)
EVENTS = st.builds(
    lambda code, ages: Evidence(f"xid:{code}", tuple(sorted(NOW - age for age in ages))),
    st.sampled_from([*EXCLUDE, *WATCH, *APPLICATION, *IGNORED, 48, 154, 999]),
    st.lists(AGES, min_size=1, max_size=8),
)
CONDITIONS = st.builds(
    lambda signal, began, share: Evidence(signal, (NOW - began,), INF if share is None else NOW - began * share),
    st.sampled_from(sorted(name for name in TABLE.rules if not name.startswith("xid"))),
    AGES,
    st.none() | st.floats(0, 1),
)
EVIDENCE = st.lists(EVENTS | CONDITIONS, max_size=8, unique_by=lambda one: one.signal)
RANKS = st.lists(st.builds(RankView, st.just(0), st.just(10), st.just("GPU-a"), st.none() | AGES), max_size=3)
HISTORY = st.builds(GpuHistory, st.lists(st.floats(WALL - 9e4, WALL)).map(tuple))


@given(EVIDENCE, RANKS)
def test_verdict_has_its_evidence(evidence: list[Evidence], ranks: list[RankView]) -> None:
    found = judge(*evidence, ranks=tuple(ranks))
    assert (found.verdict is Verdict.OK) == (not found.evidence)
    assert all(one in evidence for one in found.evidence)
    if found.evidence:
        assert found.signal == found.evidence[0].signal and found.reason


@given(EVIDENCE, RANKS, EVENTS | CONDITIONS)
def test_more_evidence_never_makes_it_better(evidence: list[Evidence], ranks: list[RankView], more: Evidence) -> None:
    before = judge(*evidence, ranks=tuple(ranks))
    rest = [one for one in evidence if one.signal != more.signal]
    if len(rest) == len(evidence):
        assert judge(*evidence, more, ranks=tuple(ranks)).verdict.severity >= before.verdict.severity


@given(
    st.lists(
        st.builds(
            lambda code, ages: Evidence(f"xid:{code}", tuple(sorted(NOW - age for age in ages))),
            st.sampled_from([*APPLICATION, *IGNORED]),
            st.lists(AGES, min_size=1, max_size=32),
        ),
        unique_by=lambda one: one.signal,
    ),
    RANKS,
    HISTORY,
)
def test_application_xids_never_exclude(evidence: list[Evidence], ranks: list[RankView], history: GpuHistory) -> None:
    assert judge(*evidence, ranks=tuple(ranks), history=history).verdict.severity <= Verdict.RESTART_RANK.severity


@given(EVIDENCE, RANKS)
def test_only_fatal_classes_skip_hysteresis(evidence: list[Evidence], ranks: list[RankView]) -> None:
    """One fresh report of anything else is at most suspect."""
    for one in evidence:
        fresh = Evidence(one.signal, (NOW,), None if one.until is None else INF)
        rule = TABLE.rule(one.signal)
        if rule.cls is not SignalClass.EXCLUDE and (one.until is None or rule.hold_s > 0):
            assert not judge(fresh).verdict.acts


IN_SERVICE = st.dictionaries(st.sampled_from("abcdefgh"), st.lists(st.integers(0, 9), max_size=3).map(tuple))
MOMENTS = st.lists(st.floats(NOW - 1000, NOW)).map(tuple)
LEAVING = st.sets(st.sampled_from("abcdefgh")).map(frozenset)


@given(IN_SERVICE, MOMENTS, LEAVING, st.integers(0, 12), st.sampled_from("abcdefgh"))
def test_breaker_keeps_enough_ranks(
    ranks: dict[str, tuple[int, ...]], exclusions: tuple[float, ...], leaving: frozenset[str], least: int, gpu: str
) -> None:
    bound = Bound(ranks, exclusions, (), leaving, least)
    exclude = Judgement(Verdict.EXCLUDE)
    if held_back(exclude, gpu, bound, POLICY, NOW) is None and gpu not in leaving and ranks.get(gpu):
        left = sum(len(mine) for one, mine in ranks.items() if one not in leaving and one != gpu)
        assert left >= least
        assert sum(time >= NOW - POLICY.exclusion_window_s for time in exclusions) < POLICY.max_exclusions


@given(IN_SERVICE, MOMENTS, MOMENTS, LEAVING, st.integers(0, 12), st.integers(0, 3))
def test_breaker_never_keeps_a_rank_that_hangs(
    ranks: dict[str, tuple[int, ...]],
    exclusions: tuple[float, ...],
    restarts: tuple[float, ...],
    leaving: frozenset[str],
    least: int,
    most: int,
) -> None:
    bound, policy = Bound(ranks, exclusions, restarts, leaving, least), Policy(max_exclusions=most)
    assert held_back(HANGS, None, bound, policy, NOW) is None
    lately = sum(time >= NOW - policy.exclusion_window_s for time in restarts)
    assert bool(held_back(Judgement(Verdict.RESTART_RANK), None, bound, policy, NOW)) is (lately >= most)
