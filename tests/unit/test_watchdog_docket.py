"""The docket: which rulings are issued when, and that they are not repeated, lost or multiplied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from watchdog.bindings import Binding, Bindings, parse_bindings
from watchdog.docket import Docket, Mode, Ruling
from watchdog.errors import DaemonError
from watchdog.evidence import Counter
from watchdog.signals import load_table
from watchdog.state import State
from watchdog.verdict import Policy, RankView, Verdict

TABLE = load_table()
WALL = 1_790_000_000.0
FINE: dict[str, Any] = {"status": "ok", "recovery": 0, "ecc": 0, "celsius": 40, "reasons": 0}


def bindings(*gpus: str, epoch: int = 1, incarnation: int = 10, least: int = 1, **more: Any) -> Bindings:
    ranks = tuple(Binding(rank, incarnation + rank, gpu) for rank, gpu in enumerate(gpus))
    return Bindings(epoch, ranks, least, **more)


def docket(directory: Path, policy: Policy | None = None, mode: Mode = Mode.ACT) -> Docket:
    made = Docket(TABLE, policy or Policy(), mode, State.load(directory))
    made.bind(bindings("a", "b", "c", "d"))
    for gpu in "abcd":
        made.gpu(gpu).observer.observe(FINE, 0.0)
    return made


def said(rulings: list[Ruling]) -> list[tuple[object, Verdict, bool]]:
    return [(ruling.target, ruling.verdict, ruling.act) for ruling in rulings]


def test_a_ruling_is_issued_once(tmp_path: Path) -> None:
    case = docket(tmp_path)
    assert case.review(1.0, WALL) == []
    case.see_event("a", "xid", 79, 1.0)
    (ruling,) = case.review(1.0, WALL)
    assert said([ruling]) == [("a", Verdict.EXCLUDE, True)]
    assert ruling.as_json()["gpu"] == "a" and "rank" not in ruling.as_json()
    assert case.review(2.0, WALL + 1) == []
    assert said(case.review(100.0, WALL + 99)) == [("a", Verdict.OK, False)]
    assert case.review(101.0, WALL + 100) == []


def test_the_log_keeps_the_evidence(tmp_path: Path) -> None:
    """The daemon's events have it too, but who looks into a verdict that was not delivered has the log only."""
    case = docket(tmp_path)
    for now in (1.0, 2.0):
        case.see_event("a", "xid", 74, now)
    case.gpu("a").log.hold("driver_slow", True, 1.5, seconds=0.3)
    (ruling,) = case.review(2.0, WALL)
    line = ruling.for_log()
    assert line["evidence"] == {
        "xid:74": {"first": WALL - 1, "last": WALL, "count": 2},
        "driver_slow": {"first": WALL - 0.5, "last": WALL, "active": True, "detail": {"seconds": 0.3}},
    }
    assert {**line, "evidence": None} == {
        "id": ruling.id, "gpu": "a", "epoch": 1, "verdict": "drain", "signal": "xid:74", "act": True,
        "reason": "NVLink error (2 times)", "evidence": None,
    }  # fmt: skip


def test_a_new_rank_on_a_bad_gpu_is_told_again(tmp_path: Path) -> None:
    case = docket(tmp_path)
    case.see_event("a", "xid", 79, 1.0)
    (first,) = case.review(1.0, WALL)
    case.bind(bindings("b", "c", "d", epoch=2))
    assert case.review(2.0, WALL) == []
    case.bind(bindings("a", "b", "c", "d", epoch=3, incarnation=20))
    (second,) = case.review(3.0, WALL)
    assert said([second]) == [("a", Verdict.EXCLUDE, True)] and second.epoch == 3 and second.id != first.id


def test_said_again_on_request_and_counted_once(tmp_path: Path) -> None:
    case = docket(tmp_path, Policy(max_exclusions=2))
    case.see_event("a", "xid", 79, 1.0)
    case.review(1.0, WALL)
    for _ in range(5):
        case.say_again()
        assert said(case.review(2.0, WALL)) == [("a", Verdict.EXCLUDE, True)]
    assert len(case.bound(2.0).exclusions) == 1
    assert len(case.state.record("a").history.failures) == 1
    case.see_event("b", "xid", 79, 3.0)
    assert said(case.review(3.0, WALL)) == [("b", Verdict.EXCLUDE, True)]
    case.see_event("c", "xid", 79, 4.0)
    assert said(case.review(4.0, WALL)) == [("c", Verdict.EXCLUDE, False)]


def test_held_until_the_breaker_lets_go(tmp_path: Path) -> None:
    case = docket(tmp_path, Policy(max_exclusions=1, exclusion_window_s=30.0))
    case.see_event("a", "xid", 79, 1.0)
    case.see_event("b", "xid", 79, 1.0)
    assert [act for *_, act in said(case.review(1.0, WALL))] == [True, False]
    case.bind(bindings("b", "c", "d", epoch=2))
    assert case.review(20.0, WALL) == []
    (late,) = case.review(40.0, WALL)
    assert said([late]) == [("b", Verdict.EXCLUDE, True)] and late.epoch == 2


def test_gpus_that_were_bad_before_they_were_bound_meet_the_breaker(tmp_path: Path) -> None:
    case = Docket(TABLE, Policy(max_exclusions=9), Mode.ACT, State.load(tmp_path))
    for gpu in "abc":
        case.see_event(gpu, "xid", 79, 1.0)
    assert all(ruling.act for ruling in case.review(1.0, WALL))
    case.bind(bindings("a", "b", "c", "d", least=2))
    rulings = case.review(2.0, WALL)
    assert sorted(act for *_, act in said(rulings)) == [False, True, True]


def test_observe_mode_never_acts(tmp_path: Path) -> None:
    case = docket(tmp_path, mode=Mode.OBSERVE)
    case.see_event("a", "xid", 79, 1.0)
    case.see_rank(case.bindings.ranks[1], "hung", True, 1.0)
    rulings = case.review(1.0, WALL)
    assert {ruling.held for ruling in rulings} == {"observe mode"} and not any(ruling.act for ruling in rulings)
    assert not case.bound(1.0).exclusions


def test_what_is_only_observed_does_not_count_later(tmp_path: Path) -> None:
    """It would put the GPU in quarantine, and that is acted on as soon as the mode is `act`."""
    policy = Policy(quarantine_failures=2, repeat_restarts=1)
    case = docket(tmp_path, policy, Mode.OBSERVE)
    for turn in range(5):
        now = 1.0 + 200 * turn
        case.see_event("a", "xid", 79, now)
        case.bind(bindings("a", "b", "c", "d", incarnation=10 * turn))
        case.see_rank(case.bindings.ranks[1], "hung", True, now)
        assert not any(ruling.act for ruling in case.review(now, WALL + now))
        case.review(now + 100, WALL + now + 100)
    assert not any(case.state.record(gpu).history.failures for gpu in "abcd")
    assert not any(case.state.record(gpu).history.restarts for gpu in "abcd")
    acting = Docket(TABLE, policy, Mode.ACT, case.state)
    acting.bind(bindings("a", "b", "c", "d"))
    for gpu in "abcd":
        acting.gpu(gpu).observer.observe(FINE, 0.0)
    assert acting.review(2000.0, WALL + 2000) == []


def test_a_failure_counts_once_when_it_is_acted_on(tmp_path: Path) -> None:
    policy = Policy(max_exclusions=1, exclusion_window_s=30.0, quarantine_failures=9)
    case = docket(tmp_path, policy)
    case.see_event("a", "xid", 79, 1.0)
    case.gpu("b").observer.observe({**FINE, "status": "lost"}, 1.0)
    case.review(1.0, WALL)

    def failures(gpu: str) -> int:
        return len(case.state.record(gpu).history.failures)

    assert (failures("a"), failures("b")) == (1, 0), "b is held back"
    case.review(20.0, WALL + 19)
    assert failures("b") == 0
    case.review(40.0, WALL + 39)
    assert failures("b") == 1, "the breaker has let go"
    case.bind(bindings("a", "b", "c", "d", epoch=2, incarnation=20))
    case.review(41.0, WALL + 40)
    assert (failures("a"), failures("b")) == (1, 1), "ranks that come to it do not make it fail again"
    again = Docket(TABLE, policy, Mode.ACT, case.state)
    again.bind(case.bindings)
    again.gpu("b").observer.observe({**FINE, "status": "lost"}, 50.0)
    again.review(50.0, WALL + 49)
    assert failures("b") == 1, "nor does a restart of the watchdog"


def test_hung_rank_is_restarted_and_its_gpu_kept(tmp_path: Path) -> None:
    case = docket(tmp_path)
    case.see_rank(case.bindings.ranks[2], "hung", True, 1.0, seconds=1.5)
    (ruling,) = case.review(1.0, WALL)
    assert said([ruling]) == [((2, 12), Verdict.RESTART_RANK, True)]
    assert ruling.as_json()["rank"] == 2 and ruling.as_json()["incarnation"] == 12
    assert case.state.record("c").history.restarts == (WALL,)
    assert case.review(1.5, WALL) == []
    case.bind(bindings("a", "b", "d", epoch=2))
    assert case.review(2.0, WALL) == []


def test_ranks_that_hang_again_and_again_cost_their_gpu(tmp_path: Path) -> None:
    case = docket(tmp_path, Policy(repeat_restarts=3, max_exclusions=10))
    for turn in range(3):
        case.bind(bindings("a", "b", incarnation=10 * turn, epoch=turn + 1))
        case.see_rank(case.bindings.ranks[0], "hung", True, float(turn))
        rulings = case.review(float(turn), WALL + turn)
        assert ((0, 10 * turn), Verdict.RESTART_RANK, True) in said(rulings)
    assert ("a", Verdict.DRAIN, True) in said(case.review(4.0, WALL + 4))


def test_a_rank_that_hangs_is_restarted_however_many_were_before(tmp_path: Path) -> None:
    """The group stands still until it is gone: there is nothing to be saved by waiting."""
    case = docket(tmp_path, Policy(max_exclusions=2, repeat_restarts=0))
    for turn in range(1, 7):
        case.bind(bindings("a", "b", "c", "d", epoch=turn, incarnation=10 * turn, least=4))
        rank = case.bindings.ranks[turn % 4]
        case.see_rank(rank, "hung", True, float(turn))
        assert said(case.review(float(turn), WALL + turn)) == [
            ((rank.rank, rank.incarnation), Verdict.RESTART_RANK, True)
        ]


def test_offenders_are_restarted_also_while_the_breaker_keeps_their_gpu(tmp_path: Path) -> None:
    case = docket(tmp_path, Policy(repeat_restarts=2))
    for turn in range(1, 5):
        case.bind(bindings("a", "b", epoch=turn, incarnation=10 * turn, least=2))
        case.see_rank(case.bindings.ranks[0], "hung", True, float(turn))
        rulings = case.review(float(turn), WALL + turn)
        assert ((0, 10 * turn), Verdict.RESTART_RANK, True) in said(rulings)
        if turn == 3:
            (drain,) = [ruling for ruling in rulings if ruling.target == "a"]
            assert (drain.verdict, drain.signal, drain.act) == (Verdict.DRAIN, "repeat_offender", False)
            assert drain.held == "breaker: 2 ranks in service, 2 must stay"
    assert len(case.state.record("a").history.restarts) == 4


def test_restarts_for_xids_have_a_limit_of_their_own_until_the_rank_is_found_to_hang(tmp_path: Path) -> None:
    case = docket(tmp_path, Policy(max_exclusions=1))
    for number, gpu in enumerate("ab"):
        case.see_event(gpu, "xid", 31, 1.0)
        case.views[10 + number] = RankView(number, 10 + number, gpu, 1.5)
    rulings = case.review(2.5, WALL)
    acting = {ruling.target: ruling.act for ruling in rulings if ruling.verdict is Verdict.RESTART_RANK}
    assert acting == {(0, 10): True, (1, 11): False}
    assert case.bound(2.5).restarts == (2.5,)
    case.see_rank(case.bindings.ranks[1], "hung", True, 3.0)
    assert said(case.review(3.0, WALL)) == [((1, 11), Verdict.RESTART_RANK, True)]
    assert case.bound(3.0).restarts == (2.5,)


def test_straggler_is_named_only(tmp_path: Path) -> None:
    case = docket(tmp_path)
    case.see_rank(case.bindings.ranks[3], "straggler", True, 1.0, slowdown=3.1)
    assert said(case.review(1.0, WALL)) == [((3, 13), Verdict.SUSPECT, False)]
    assert case.review(1000.0, WALL + 999) == []


def test_application_xid_is_a_ruling_on_the_rank_that_stands_still(tmp_path: Path) -> None:
    case = docket(tmp_path)
    case.see_event("a", "xid", 31, 1.0)
    case.views[10] = RankView(0, 10, "a", 0.0)
    assert said(case.review(1.0, WALL)) == [("a", Verdict.SUSPECT, False)]
    case.views[10] = RankView(0, 10, "a", 1.5)
    assert said(case.review(2.5, WALL)) == [((0, 10), Verdict.RESTART_RANK, True)]
    assert not case.state.record("a").history.restarts, "an application's fault is not the GPU's"


def test_release_ends_quarantine(tmp_path: Path) -> None:
    case = docket(tmp_path, Policy(quarantine_failures=1))
    case.see_event("a", "xid", 79, 1.0)
    case.review(1.0, WALL)
    (ruling,) = case.review(500.0, WALL + 500)
    assert said([ruling]) == [("a", Verdict.EXCLUDE, True)] and ruling.signal == "quarantine"
    case.bind(bindings("b", "c", "d", released={"a": WALL + 501}))
    assert said(case.review(502.0, WALL + 502)) == [("a", Verdict.OK, False)]


@pytest.mark.parametrize("body", [None, [], {}, {"epoch": 1}, {"epoch": 1, "ranks": [{}]}, {"epoch": 1, "ranks": 3}])
def test_bindings_that_cannot_be_read(body: Any) -> None:
    with pytest.raises(DaemonError):
        parse_bindings(body)


def test_bindings_may_be_sparse() -> None:
    parsed = parse_bindings({"epoch": 3, "ranks": [{"rank": 0, "incarnation": 1}]})
    assert parsed == Bindings(3, (Binding(0, 1),))


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 100), st.booleans()), max_size=60))
def test_counter_never_invents_a_rise(steps: list[tuple[float, int, bool]]) -> None:
    counter, now, value, rises = Counter(), 0.0, 0, 0
    for wait, more, reset in steps:
        now += wait
        value = 0 if reset else value + more
        rises += 0 if reset else more
        assert 0 <= counter.rise(value, now, 10.0) <= rises


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcd"),
            st.sampled_from(["xid 79", "xid 74", "xid 13", "lost", "fine", "hung", "moves", "rebind", "again"]),
            st.floats(0, 40),
        ),
        max_size=40,
    )
)
def test_acting_never_goes_beyond_the_limits(tmp_path: Path, steps: list[tuple[str, str, float]]) -> None:
    """Whatever happens: ranks in service, less those that rulings take away, are never fewer than the minimum. Of the
    failures of GPUs, those count that are acted on."""
    policy = Policy(max_exclusions=3, exclusion_window_s=100.0, quarantine_failures=2)
    case = Docket(TABLE, policy, Mode.ACT, State.load(tmp_path / "state"))
    serving = list("abcd")
    case.bind(bindings(*serving, least=2))
    now, epoch, told = 0.0, 1, 0
    acted: list[float] = []

    def rules(gpu: str) -> bool:
        """Whether what was ruled about it is acted on."""
        ruling = case.gpus[gpu].ruling
        return ruling is not None and ruling.act

    for gpu, what, wait in steps:
        now += wait
        rank = next((one for one in case.bindings.ranks if one.gpu == gpu), None)
        if what.startswith("xid"):
            case.see_event(gpu, "xid", int(what[4:]), now)
        elif what in ("lost", "fine"):
            case.gpu(gpu).observer.observe({**FINE, "status": "lost" if what == "lost" else "ok"}, now)
        elif what in ("hung", "moves") and rank:
            case.see_rank(rank, "hung", what == "hung", now)
        elif what == "again":
            case.say_again()
        elif what == "rebind":  # the daemon has done what it was told, and GPUs that are fine come back
            epoch += 1
            bad = {one for one in "abcd" if one in case.gpus and case.gpus[one].judgement.verdict.removes}
            serving = [one for one in "abcd" if one not in bad or (one in serving and not rules(one))]
            case.bind(bindings(*serving, epoch=epoch, incarnation=10 * epoch, least=2))
        before = {one for one in case.gpus if rules(one)}
        for ruling in case.review(now, WALL + now):
            assert ruling.act is False or ruling.held is None
            told += ruling.act and ruling.verdict.removes
            if ruling.evidence and ruling.evidence[0]["signal"] == "hung":
                assert ruling.act, "a rank that holds all others up was kept"
            if ruling.act and ruling.verdict.removes and ruling.target in serving and ruling.target not in before:
                acted.append(now)
        leaving = {
            one for one in serving if one in case.gpus and (r := case.gpus[one].ruling) and r.act and r.verdict.removes
        }
        if leaving:
            assert len(serving) - len(leaving) >= 2
        assert sum(time > now - policy.exclusion_window_s for time in acted) <= policy.max_exclusions
        assert sum(len(case.state.record(one).history.failures) for one in "abcd") <= told
