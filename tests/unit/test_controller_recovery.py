"""The controller, one rule at a time: lost ranks, faults, failed regroups, too few ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from elastic_daemon import protocol as p
from elastic_daemon.control.control_state import Phase
from elastic_daemon.control.policy import Policy
from elastic_daemon.membership import MEMBERS, RankState, Status
from elastic_daemon.placement import missing
from tests.unit.driver import POLICY, SYNCED, Shell, events, of, published, too_few


def test_a_death_fences_regroups_and_resumes_the_others() -> None:
    shell = Shell().serve()
    actions = shell.exited(1)
    assert published(actions) == p.Snapshot(
        2, Status.RECOVERING, "rank 1: signal 9", ((0, 1), (2, 3), (3, 4)), excluded=((1, 2),)
    )
    assert of(p.Fence, actions) == [p.Fence(rank, 2) for rank in (0, 2, 3)]

    assert not of(p.Regroup, shell.fenced(0, 2))
    regroups = of(p.Regroup, shell.fenced(3))
    assert [(r.rank, r.epoch, r.members) for r in regroups] == [(rank, 2, (0, 2, 3)) for rank in (0, 2, 3)]
    assert missing(regroups[0].placement) == ()

    actions = shell.regrouped(0, 2, 3)
    assert of(p.Resume, actions) == [p.Resume(rank, 2) for rank in (0, 2, 3)]
    assert published(actions).status is Status.DEGRADED
    assert published(actions).active == ((0, 1), (2, 3), (3, 4))
    assert published(actions).excluded == ((1, 2),)
    assert actions.index(of(p.Publish, actions)[0]) < actions.index(of(p.Resume, actions)[0])

    [done] = of(p.RecoveryDone, shell.synced())
    assert done.report.kind is p.RecoveryKind.SHRINK
    assert done.report.requests == p.RequestCounts(*SYNCED)
    assert shell.states() == [RankState.ACTIVE, RankState.EXCLUDED, RankState.ACTIVE, RankState.ACTIVE]
    assert published(shell.exited(0)).excluded == ((0, 1),), "of this recovery only"


def test_the_plan_follows_what_ranks_report_not_what_was_planned() -> None:
    shell = Shell(Policy(target=2, experts=4, slots=4)).serve()
    shell.exited(0)
    shell.columns[1] = np.array([[0, 1, 2, 2], [3, 2, 1, 0]])  # the load balancer has been here
    [regroup] = of(p.Regroup, shell.fenced(1))
    assert [(load.layer, load.expert) for load in regroup.loads] == [(0, 3)]


def test_deaths_during_fencing_make_one_recovery_of_it() -> None:
    shell = Shell().serve()
    shell.exited(1)
    shell.fenced(0)
    assert of(p.Fence, shell.exited(3)) == [p.Fence(0, 3), p.Fence(2, 3)]
    assert shell.fenced(0, 2, epoch=2) == [], "answers to the older epoch"
    shell.recover(0, 2)
    start, shrink = of(p.RecoveryDone, shell.actions)
    assert start.report.epoch == 1
    assert (shrink.report.epoch, shrink.report.ranks) == (3, (1, 3))


@pytest.mark.parametrize("step", ["regrouping", "resuming"])
def test_a_death_later_on_goes_back_to_fencing(step: str) -> None:
    shell = Shell().serve()
    shell.exited(1)
    shell.fenced(0, 2, 3)
    if step == "resuming":
        shell.regrouped(0, 2, 3)
    assert shell.controller.phase == step
    actions = shell.exited(3)
    assert [fence.rank for fence in of(p.Fence, actions)] == [0, 2]
    assert published(actions).status is Status.RECOVERING
    assert published(actions).excluded == ((1, 2), (3, 4))
    assert shell.regrouped(0, 2, epoch=2) == []
    assert shell.send(p.FrontendSynced(2, *SYNCED, 0)) == []
    shell.recover(0, 2)
    assert len(of(p.RecoveryDone, shell.actions)) == 2


def test_a_member_that_does_not_park_is_killed_and_not_waited_for() -> None:
    shell = Shell().serve()
    shell.exited(1)
    shell.fenced(0, 3)
    actions = shell.tick()
    assert shell.now == 3.0
    assert of(p.KillRank, actions) == [p.KillRank(2, 3, "not parked 3 s after it was fenced")]
    assert [fence.rank for fence in of(p.Fence, actions)] == [0, 3]
    shell.recover(0, 3)
    assert shell.exited(2) == [], "known to be gone"


def test_nobody_is_late_while_the_supervisor_stands_still() -> None:
    """It may not even have sent the fences. Who stays silent afterwards still gets 3 s in all."""
    shell = Shell().serve()
    shell.exited(1)
    actions = shell.send(p.Stalled(60.0), p.Tick(), after=60.5)
    assert not of(p.KillRank, actions)
    [stalled] = events("supervisor_stalled", actions)
    assert stalled["seconds"] == 60.0
    assert "ranks to park: 0, 2, 3" in stalled["doing"]
    shell.fenced(0, 3)
    assert of(p.KillRank, shell.tick()) == [p.KillRank(2, 3, "not parked 3 s after it was fenced")]
    assert shell.now == 63.0


def test_what_people_were_promised_does_not_wait_for_the_supervisor() -> None:
    shell = too_few()
    deadline = shell.controller.next_deadline()
    assert shell.controller.phase is Phase.UNAVAILABLE and deadline is not None
    shell.send(p.Stalled(20.0), after=20.0)
    assert shell.controller.next_deadline() == deadline, "the end of holding requests"


def test_a_further_death_gives_nobody_more_time_to_park() -> None:
    shell = Shell().serve()
    shell.exited(1)
    shell.fenced(3)
    shell.now = 2.0
    shell.exited(0)
    shell.fenced(3)
    assert [kill.rank for kill in of(p.KillRank, shell.tick())] == [2]
    assert shell.now == 3.0


def test_zombies_and_repetitions_change_nothing() -> None:
    shell = Shell().serve()
    shell.exited(1)
    assert shell.exited(1) == []
    assert shell.fenced(1) == []
    assert shell.fault(1) == []
    shell.fenced(0, 0, 2)
    assert shell.controller.phase is Phase.FENCING
    shell.fenced(3)
    assert shell.fenced(3) == []
    shell.regrouped(0, 2, 3)
    assert shell.regrouped(3) == []
    shell.synced()
    assert shell.synced() == []
    assert shell.send(p.FrontendReady()) == []


def test_a_fault_waits_for_a_death_that_explains_it() -> None:
    shell = Shell().serve()
    assert not of(p.Fence, shell.fault(0))
    assert shell.states()[0] is RankState.SUSPECT
    assert shell.controller.status is Status.OK
    shell.now += 0.2
    shell.exited(1)
    shell.recover(0, 2, 3)
    report = of(p.RecoveryDone, shell.actions)[-1].report
    assert (report.ranks, report.cause) == ((1,), "rank 1: signal 9")
    assert report.seconds["detect"] == pytest.approx(0.2)
    assert shell.states()[0] is RankState.ACTIVE
    assert shell.controller.next_deadline() is None


def test_a_fault_without_a_death_regroups_the_same_members() -> None:
    shell = Shell().serve()
    shell.fault(0)
    shell.fault(2)
    assert [fence.rank for fence in of(p.Fence, shell.tick())] == [0, 1, 2, 3]
    assert shell.now == 0.5
    shell.recover(0, 1, 2, 3)
    assert shell.controller.status is Status.OK
    report = of(p.RecoveryDone, shell.actions)[-1].report
    assert (report.kind, report.ranks, report.cause) == (p.RecoveryKind.REGROUP, (), "rank 0: peer is gone")


def test_a_failed_regroup_is_tried_again_in_a_new_epoch() -> None:
    shell = Shell().serve()
    shell.exited(1)
    shell.fenced(0, 2, 3)
    actions = shell.regroup_failed(0)
    assert of(p.Fence, actions) == [p.Fence(rank, 3) for rank in (0, 2, 3)]
    assert published(actions).epoch == 3
    shell.recover(0, 2, 3)


def test_after_five_failed_regroups_the_rank_that_fails_most_is_given_up() -> None:
    shell = Shell().serve()
    shell.exited(1)
    for rank in (2, 0, 2, 3):
        shell.fenced(0, 2, 3)
        assert not of(p.KillRank, shell.regroup_failed(rank))
    shell.fenced(0, 2, 3)
    assert of(p.KillRank, shell.regroup_failed(0)) == [p.KillRank(2, 3, "5 regroups failed, the last: no route")]
    shell.fenced(0, 3)
    assert not of(p.KillRank, shell.regroup_failed(0)), "a loss is progress: the count starts anew"


def test_silence_in_a_regroup_accuses_nobody_but_the_fence_finds_who_hangs() -> None:
    shell = Shell().serve()
    shell.exited(1)
    shell.fenced(0, 2, 3)
    actions = shell.tick()  # rank 2 hangs, and all wait for it
    assert not of(p.KillRank, actions)
    assert [fence.rank for fence in of(p.Fence, actions)] == [0, 2, 3]
    shell.fenced(0, 3)
    assert [kill.rank for kill in of(p.KillRank, shell.tick())] == [2]
    shell.recover(0, 3)


def test_a_front_end_that_does_not_get_in_step_delays_nothing() -> None:
    shell = Shell().serve()
    shell.exited(1)
    shell.fenced(0, 2, 3)
    shell.regrouped(0, 2, 3)
    [done] = of(p.RecoveryDone, shell.tick())
    assert done.report.requests is None
    assert done.report.seconds["resume"] == pytest.approx(5.0)
    assert shell.controller.phase is Phase.SERVING


def test_the_phases_add_up() -> None:
    shell = Shell().serve()
    shell.exited(1)
    shell.now = 0.1
    shell.fenced(0, 2, 3)
    shell.now = 0.4
    shell.regroup_failed(0)
    shell.now = 0.5
    shell.fenced(0, 2, 3)
    shell.now = 1.0
    shell.regrouped(0, 2, 3, repair=0.3)
    shell.now = 1.1
    shell.synced()
    assert of(p.RecoveryDone, shell.actions)[-1].report.seconds == pytest.approx(
        {"detect": 0.0, "fence": 0.2, "regroup": 0.5, "repair": 0.3, "resume": 0.1, "total": 1.1}
    )


def test_too_few_slots_are_unavailable_and_ranks_stay_parked() -> None:
    shell = too_few()
    assert shell.controller.status is Status.UNAVAILABLE
    assert not of(p.Regroup, [action for action in shell.actions if isinstance(action, p.Regroup) and action.epoch > 1])
    view = published(shell.actions)
    assert view.active == ((0, 1),)
    assert view.hold
    assert "16 experts" in view.reason
    assert "8" in view.reason
    assert shell.controller.snapshot(0.0).survivable_losses == -1


def test_requests_are_held_for_a_while_only() -> None:
    shell = too_few()
    view = published(shell.tick())
    assert shell.now == 60.0
    assert (view.status, view.hold) == (Status.UNAVAILABLE, False)
    assert shell.controller.next_deadline() is None


def test_without_any_rank_it_is_still_unavailable() -> None:
    shell = too_few()
    view = published(shell.exited(0))
    assert (view.status, view.epoch, view.active) == (Status.UNAVAILABLE, 5, ())
    assert "0 ranks" in view.reason
    assert not of(p.Exit, shell.actions)


def test_all_ranks_may_die_at_once() -> None:
    shell = Shell().serve()
    shell.exited(0, 1, 2, 3)
    assert shell.controller.status is Status.UNAVAILABLE


def faults_in_vain(shell: Shell, rank: int, count: int, delivered: int = 7) -> list[p.Action]:
    """`count` faults that `rank` reports first, each after a recovery; what the last of them leads to."""
    actions: list[p.Action] = []
    for number in range(count):
        shell.fault(rank)
        actions = shell.tick()
        if number + 1 < count:
            shell.fenced(*members(shell))
            shell.regrouped(*members(shell))
            shell.synced(delivered)
    return actions


def members(shell: Shell) -> list[int]:
    return [row.rank for row in shell.controller.snapshot(shell.now).ranks if row.state in MEMBERS]


def recover(shell: Shell, delivered: int) -> None:
    shell.fenced(*members(shell))
    shell.regrouped(*members(shell))
    shell.synced(delivered)


def test_a_fault_that_repeats_before_any_token_costs_the_rank_that_reports_it_first() -> None:
    shell = Shell(replace(POLICY, max_vain_faults=3)).serve()
    # The first fault says nothing about vain: only after it does the front end report what is in flight.
    actions = faults_in_vain(shell, 1, 4)
    [kill] = of(p.KillRank, actions)
    assert (kill.rank, kill.reason) == (
        1,
        "3 faults in a row before any request got a token, the last: rank 1: peer is gone",
    )
    assert published(actions).hold
    recover(shell, 7)
    assert shell.controller.status is Status.DEGRADED


def test_a_token_or_a_death_in_between_makes_it_another_fault() -> None:
    shell = Shell(replace(POLICY, max_vain_faults=3)).serve()
    for delivered in range(12):
        faults_in_vain(shell, 1, 1)
        recover(shell, delivered)
    assert not of(p.KillRank, shell.actions)

    faults_in_vain(shell, 1, 2, delivered=11)
    recover(shell, 11)
    shell.exited(3)
    recover(shell, 11)
    assert not of(p.KillRank, faults_in_vain(shell, 1, 2, delivered=11))


def test_faults_without_requests_in_flight_harm_nobody() -> None:
    shell = Shell(replace(POLICY, max_vain_faults=3)).serve()
    for _ in range(10):
        shell.fault(1)
        shell.tick()
        shell.fenced(0, 1, 2, 3)
        shell.regrouped(0, 1, 2, 3)
        shell.send(p.FrontendSynced(shell.controller.epoch, 0, 0, 0, 0, 7))
    assert not of(p.KillRank, shell.actions)
    assert all(action.membership.hold for action in of(p.Publish, shell.actions))


def test_requests_are_ended_when_giving_up_a_rank_did_not_help() -> None:
    shell = Shell(replace(POLICY, max_vain_faults=3)).serve()
    faults_in_vain(shell, 1, 4)
    recover(shell, 7)
    actions = faults_in_vain(shell, 2, 3)
    assert not of(p.KillRank, actions)
    told = published(actions)
    assert not told.hold, "the front end ends what is in flight"
    assert "3 faults in a row" in told.reason
    shell.fenced(0, 2, 3)
    assert published(shell.regrouped(0, 2, 3)).hold, "later requests are held again"


def test_the_last_ranks_that_can_hold_every_expert_are_not_given_up_for_it() -> None:
    shell = Shell(replace(POLICY, max_vain_faults=3)).serve()
    shell.exited(0)
    shell.exited(1)
    recover(shell, 7)
    actions = faults_in_vain(shell, 2, 3)
    assert not of(p.KillRank, actions)
    assert not published(actions).hold


def test_faults_give_a_front_end_no_more_time_to_start() -> None:
    shell = Shell()
    shell.ready(0, 1, 2, 3)
    shell.regrouped(0, 1, 2, 3)
    started = shell.now
    while not of(p.KillFrontend, shell.actions):
        shell.fault(1)
        shell.tick()
        if shell.controller.phase is Phase.FENCING:
            shell.fenced(0, 1, 2, 3)
            shell.regrouped(0, 1, 2, 3)
            shell.now += 10.0
        assert shell.now <= started + shell.policy.frontend_start_timeout_s + 11
