"""What the controller does about the watchdog's verdicts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_daemon import protocol as p
from elastic_daemon.control.control_state import Phase
from elastic_daemon.control.policy import Policy
from elastic_daemon.control.verdicts import Measure, Situation, decide
from elastic_daemon.membership import RankState, Status
from elastic_daemon.placement import missing
from tests.unit.driver import POLICY, Shell, events, of, published, too_few

GPU, XID = "GPU-2", "xid 79: GPU has fallen off the bus"
Kind = p.VerdictKind
SINGLE = replace(POLICY, slots=6)  # some experts have a single copy, and any three ranks have room for all
TOO_FEW = "2 ranks are needed to hold every expert, and 1 would be left"
ACTING = (Kind.EXCLUDE, Kind.DRAIN, Kind.RESTART_RANK)


def say(
    shell: Shell, kind: Kind, *ranks: int, act: bool | None = None, subject: str = GPU, why: str = XID, ago: float = 0.0
) -> list[p.Action]:
    identities = tuple((rank, shell.incarnation(rank)) for rank in ranks)
    acts = kind.acts if act is None else act
    return shell.send(p.TelemetryVerdict(subject, identities, kind, acts, why, shell.now - ago))


def rank(shell: Shell, number: int) -> p.RankHealth:
    return shell.controller.snapshot(shell.now).ranks[number]


@pytest.mark.parametrize("kind", [Kind.EXCLUDE, Kind.RESTART_RANK])
def test_a_rank_that_cannot_go_on_is_excluded_with_its_cause(kind: Kind) -> None:
    shell = Shell().serve()
    shell.now += 5
    actions = say(shell, kind, 2, ago=0.25)
    assert [(kill.rank, kill.reason) for kill in of(p.KillRank, actions)] == [(2, XID)]
    assert {fence.rank for fence in of(p.Fence, actions)} == {0, 1, 3}
    shell.recover(0, 1, 3)
    report = shell.controller.snapshot(shell.now).last_shrink
    assert report is not None
    assert (report.ranks, report.cause) == ((2,), f"rank 2: {XID}")
    assert report.seconds["detect"] == pytest.approx(0.25)
    assert shell.controller.status is Status.DEGRADED
    assert shell.controller.reason == f"rank 2: {XID}"


def test_a_rank_on_a_gpu_that_goes_bad_leaves_in_order() -> None:
    """Requests first, then what experts only it holds, then the group closes up without it."""
    shell = Shell(SINGLE).serve()
    shell.now += 5
    identity = (2, shell.incarnation(2))
    actions = say(shell, Kind.DRAIN, 2, ago=0.25)
    assert not of(p.KillRank, actions) and not of(p.Fence, actions)
    assert (published(actions).draining, published(actions).status) == ((identity,), Status.DEGRADED)
    assert (rank(shell, 2).state, rank(shell, 2).reason) == (RankState.DRAINING, XID)
    assert shell.controller.reason == f"rank 2: draining: {XID}"

    (move, *_) = of(p.Respread, shell.moved())
    assert missing(move.placement.restricted([0, 1, 3])) == (), "who stays comes to hold every expert"
    assert not of(p.Fence, shell.respread(0, 1, 2))
    actions = shell.respread(3)
    assert of(p.KillRank, actions) == [p.KillRank(*identity, XID, doubtful=False)]
    assert [fence.rank for fence in of(p.Fence, actions)] == [0, 1, 3]
    shell.fenced(0, 1, 3)
    assert [regroup.loads for regroup in of(p.Regroup, shell.actions)[-3:]] == [(), (), ()], "nothing has to be read"
    shell.regrouped(0, 1, 3)
    shell.synced()
    report = shell.controller.snapshot(shell.now).last_shrink
    assert report is not None
    assert (report.ranks, report.cause) == ((2,), XID)
    assert report.seconds["detect"] == pytest.approx(0.25)
    assert (shell.state(2), shell.controller.reason) == (RankState.EXCLUDED, f"rank 2: {XID}")


@pytest.mark.parametrize("moved", [True, False])
def test_it_leaves_in_any_case_when_its_time_is_over(moved: bool) -> None:
    shell = Shell(SINGLE).serve()
    say(shell, Kind.DRAIN, 2)
    if moved:
        shell.moved()
        shell.respread(0, 1, 2)  # and rank 3 does not get on
    actions = shell.tick()
    assert shell.now == SINGLE.drain_timeout_s
    assert [kill.rank for kill in of(p.KillRank, actions)] == [2]
    shell.recover(0, 1, 3)
    assert shell.controller.status is Status.DEGRADED


def test_a_rank_on_standby_has_nothing_to_move() -> None:
    shell = Shell(replace(POLICY, restore=True)).serve()
    shell.exited(2)
    shell.recover(0, 1, 3)
    shell.tick()
    shell.ready(2)
    actions = say(shell, Kind.DRAIN, 2)
    assert [kill.rank for kill in of(p.KillRank, actions)] == [2]
    assert not of(p.Fence, actions)


def test_who_cannot_leave_in_order_is_excluded() -> None:
    """In the middle of a recovery, and while somebody else leaves."""
    shell = Shell().serve()
    shell.exited(0)
    assert [kill.rank for kill in of(p.KillRank, say(shell, Kind.DRAIN, 2))] == [2]
    shell = Shell().serve()
    say(shell, Kind.DRAIN, 1)
    assert [kill.rank for kill in of(p.KillRank, say(shell, Kind.DRAIN, 2))] == [2]


def test_a_rank_that_cannot_be_spared_any_more_stays() -> None:
    shell = Shell().serve()
    say(shell, Kind.DRAIN, 2)
    shell.exited(0, 1)
    shell.recover(2, 3)
    assert events("rank_stays", shell.actions) == [{"rank": 2, "incarnation": 3}]
    assert published(shell.actions).draining == ()
    assert (shell.state(2), rank(shell, 2).reason) == (RankState.SUSPECT, f"{XID}; kept: {TOO_FEW}")
    assert f"rank 2: {XID}; kept" in shell.controller.reason
    (refused,) = events("verdict_refused", shell.actions)
    assert (refused["ranks"], refused["why"]) == ([2], TOO_FEW)
    say(shell, Kind.OK, 2)
    assert shell.state(2) is RankState.ACTIVE


def test_the_same_again_does_not_hurry_who_leaves_in_order() -> None:
    shell = Shell().serve()
    say(shell, Kind.DRAIN, 2)
    assert not of(p.KillRank, say(shell, Kind.DRAIN, 2, why="xid 48"))
    assert shell.state(2) is RankState.DRAINING
    assert [kill.rank for kill in of(p.KillRank, say(shell, Kind.EXCLUDE, 2))] == [2], "a graver one does"


def test_ranks_that_share_a_gpu_go_together() -> None:
    shell = Shell().serve()
    actions = say(shell, Kind.EXCLUDE, 1, 2)
    assert [kill.rank for kill in of(p.KillRank, actions)] == [1, 2]
    assert shell.controller.epoch == 2


@pytest.mark.parametrize("kind", ACTING)
def test_nothing_is_done_without_act(kind: Kind) -> None:
    shell = Shell().serve()
    assert not of(p.KillRank, say(shell, kind, 2, act=False))
    assert shell.controller.phase is Phase.SERVING
    assert rank(shell, 2).state is RankState.SUSPECT


@pytest.mark.parametrize("kind", ACTING)
def test_a_verdict_that_the_watchdog_holds_back_is_a_reason(kind: Kind) -> None:
    """The status stays ok: somebody has to be told otherwise."""
    shell = Shell().serve()
    held = "hung [breaker: 4 ranks in service, 4 must stay]"
    say(shell, kind, 2, act=False, why=held)
    assert (shell.controller.status, shell.controller.reason) == (Status.OK, f"rank 2: {held}")
    assert rank(shell, 2).reason == held
    say(shell, Kind.SUSPECT, 2, why="hung")
    assert shell.controller.reason == ""


def test_a_suspect_is_shown_until_it_is_cleared() -> None:
    shell = Shell().serve()
    say(shell, Kind.SUSPECT, 2)
    assert (rank(shell, 2).state, rank(shell, 2).reason) == (RankState.SUSPECT, XID)
    assert (shell.controller.status, shell.controller.reason) == (Status.OK, "")
    say(shell, Kind.OK, 2)
    assert (rank(shell, 2).state, rank(shell, 2).reason) == (RankState.ACTIVE, None)


def test_doubts_about_gpu_and_rank_are_kept_apart() -> None:
    shell = Shell().serve()
    say(shell, Kind.SUSPECT, 2)
    say(shell, Kind.SUSPECT, 2, subject="rank 2", why="straggler")
    assert rank(shell, 2).reason == f"{XID}; straggler"
    say(shell, Kind.OK, 2)
    assert (rank(shell, 2).state, rank(shell, 2).reason) == (RankState.SUSPECT, "straggler")


def test_a_suspect_stays_one_through_a_recovery() -> None:
    shell = Shell().serve()
    say(shell, Kind.SUSPECT, 2)
    shell.exited(0)
    shell.recover(1, 2, 3)
    assert (rank(shell, 2).state, rank(shell, 2).reason) == (RankState.SUSPECT, XID)
    assert rank(shell, 1).state is RankState.ACTIVE


def test_a_rank_that_reported_a_fault_is_not_cleared_by_the_watchdog() -> None:
    shell = Shell().serve()
    shell.fault(2)
    say(shell, Kind.OK, 2)
    assert rank(shell, 2).state is RankState.SUSPECT


@pytest.mark.parametrize("kind", [Kind.EXCLUDE, Kind.DRAIN])
def test_telemetry_never_takes_the_last_place_of_an_expert(kind: Kind) -> None:
    shell = Shell().serve()
    shell.exited(0, 1)
    shell.recover(2, 3)
    actions = say(shell, kind, 2)
    assert not of(p.KillRank, actions)
    (refused,) = [event for event in of(p.RecordEvent, actions) if event.name == "verdict_refused"]
    assert refused.fields["ranks"] == [2]
    assert "2 ranks are needed" in refused.fields["why"]
    assert shell.controller.phase is Phase.SERVING
    assert "rank 2: xid 79" in shell.controller.reason
    assert "kept: 2 ranks are needed" in shell.controller.reason
    assert rank(shell, 2).state is RankState.SUSPECT
    say(shell, Kind.OK, 2)
    assert "xid 79" not in shell.controller.reason
    say(shell, kind, 2)
    shell.exited(2)  # a death needs no telemetry
    shell.fenced(3)
    assert shell.controller.status is Status.UNAVAILABLE


def test_a_hung_rank_that_cannot_be_spared_is_fenced() -> None:
    """It loses nothing if the accusation is wrong, and the silence convicts it if not."""
    shell = Shell().serve()
    shell.exited(0, 1)
    shell.recover(2, 3)
    actions = say(shell, Kind.RESTART_RANK, 2, why="hung")
    assert not of(p.KillRank, actions)
    assert {fence.rank for fence in of(p.Fence, actions)} == {2, 3}
    wrong = Shell().serve()
    wrong.exited(0, 1)
    wrong.recover(2, 3)
    say(wrong, Kind.RESTART_RANK, 2, why="hung")
    wrong.recover(2, 3)
    report = wrong.controller.snapshot(wrong.now).last_recovery
    assert report is not None
    assert (report.kind, report.cause) == (p.RecoveryKind.REGROUP, "rank 2: hung")
    shell.fenced(3)
    assert [kill.rank for kill in of(p.KillRank, shell.tick())] == [2]
    shell.fenced(3)
    assert shell.controller.status is Status.UNAVAILABLE


def test_a_hung_rank_in_a_recovery_joins_it() -> None:
    shell = Shell().serve()
    shell.exited(0)
    actions = say(shell, Kind.RESTART_RANK, 2, why="hung")
    assert [kill.rank for kill in of(p.KillRank, actions)] == [2]
    shell.recover(1, 3)
    report = shell.controller.snapshot(shell.now).last_shrink
    assert report is not None
    assert report.ranks == (0, 2)
    assert "rank 2: hung" in report.cause


def test_old_incarnations_and_idle_gpus_concern_nobody() -> None:
    shell = Shell().serve()
    stale = p.TelemetryVerdict(GPU, ((2, 99),), Kind.EXCLUDE, True, XID, 0.0)
    idle = p.TelemetryVerdict("GPU-spare", (), Kind.EXCLUDE, True, XID, 0.0)
    assert not shell.send(stale, idle)
    assert shell.controller.phase is Phase.SERVING


def test_refused_where_nothing_can_be_spared_any_more() -> None:
    shell = too_few()
    actions = say(shell, Kind.RESTART_RANK, 0)
    assert not of(p.KillRank, actions)
    assert not of(p.Fence, actions)


def test_refused_while_stopping() -> None:
    shell = Shell().serve()
    shell.send(p.StopRequested(5.0))
    actions = say(shell, Kind.EXCLUDE, 2)
    assert not of(p.KillRank, actions)
    assert shell.controller.phase is Phase.STOPPING


def test_the_front_end_drops_what_the_excluded_rank_still_says() -> None:
    shell = Shell().serve()
    view = published(say(shell, Kind.EXCLUDE, 2))
    assert view.excluded == ((2, shell.incarnation(2)),)


@given(
    st.sampled_from(Kind), st.booleans(), st.integers(1, 64), st.integers(1, 64),
    st.integers(0, 8), st.integers(0, 8), st.integers(0, 8), st.tuples(*[st.booleans()] * 5),
)  # fmt: skip
def test_what_is_done_always_leaves_room_for_every_expert(
    kind: Kind, act: bool, experts: int, slots: int, standby: int, members: int, others: int, is_: tuple[bool, ...]
) -> None:
    serving, stopping, may_drain, leaving, automatic = is_
    verdict = p.TelemetryVerdict(GPU, (), kind, act, XID, 0.0)
    situation = Situation(
        members + standby, members, members + others, serving, stopping, may_drain, leaving, automatic
    )
    measure = decide(verdict, situation, Policy(8, experts, slots)).measure
    if measure in (Measure.EXCLUDE, Measure.DRAIN):
        assert not members or others * slots >= experts
    if measure is Measure.DRAIN:
        assert kind is Kind.DRAIN and may_drain and members
    if measure is Measure.FENCE:
        assert kind is Kind.RESTART_RANK and serving
    if measure is not Measure.SHOW:
        assert act and kind.acts and members + standby
    if measure is Measure.REFUSE:
        assert stopping or not automatic or others * slots < experts
    if stopping or not automatic:
        assert measure in (Measure.SHOW, Measure.REFUSE)
