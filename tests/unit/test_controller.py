"""The controller, one rule at a time: starting, the front end, stopping, what it shows.

Losses are in test_controller_recovery.py, what many rules do together in test_simulation.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastic_daemon import protocol as p
from elastic_daemon.control.control_state import Phase
from elastic_daemon.membership import RankState, Status
from tests.unit.driver import LAYERS, POLICY, SYNCED, Shell, of, published, too_few


def test_start_asks_for_all_ranks_and_the_front_end_at_once() -> None:
    shell = Shell()
    assert of(p.StartRank, shell.actions) == [p.StartRank(rank, rank + 1, (0, 1, 2, 3), 8) for rank in range(4)]
    assert of(p.StartFrontend, shell.actions)
    assert shell.controller.status is Status.STARTING
    assert shell.controller.next_deadline() == 100.0


def test_the_last_rank_that_is_ready_starts_epoch_1() -> None:
    shell = Shell()
    assert not of(p.Regroup, shell.ready(0, 1, 2))
    regroups = of(p.Regroup, shell.ready(3))
    assert [(r.rank, r.epoch, r.members, r.loads) for r in regroups] == [
        (rank, 1, (0, 1, 2, 3), ()) for rank in range(4)
    ]
    assert regroups[0].placement == shell.first_placement()
    assert not of(p.Fence, shell.actions), "they are parked already"


def test_nobody_resumes_before_all_have_regrouped() -> None:
    shell = Shell()
    shell.ready(0, 1, 2, 3)
    assert not of(p.Resume, shell.regrouped(0, 1, 2, 2))
    assert of(p.Resume, shell.regrouped(3)) == [p.Resume(rank, 1) for rank in range(4)]


@pytest.mark.parametrize("frontend_first", [True, False])
def test_ok_needs_both_the_ranks_and_the_front_end(frontend_first: bool) -> None:
    shell = Shell()
    if frontend_first:
        shell.send(p.FrontendReady())
    shell.ready(0, 1, 2, 3)
    shell.regrouped(0, 1, 2, 3)
    if not frontend_first:
        assert shell.controller.status is Status.STARTING
        shell.send(p.FrontendReady())
    assert published(shell.actions) == p.Snapshot(1, Status.OK, "", ((0, 1), (1, 2), (2, 3), (3, 4)), ())
    shell.synced()
    [done] = of(p.RecoveryDone, shell.actions)
    assert done.report.kind is p.RecoveryKind.START
    assert done.report.requests == (p.RequestCounts(*SYNCED) if frontend_first else None)


def test_a_rank_that_dies_while_starting_is_started_again() -> None:
    shell = Shell()
    shell.ready(0, 1, 2)
    assert not of(p.StartRank, shell.exited(3)), "after a pause only"
    assert of(p.StartRank, shell.tick()) == [p.StartRank(3, 5, (0, 1, 2, 3), 8)]
    assert shell.now == 1.0
    assert len(of(p.Regroup, shell.ready(3))) == 4


def test_a_rank_that_dies_on_standby_is_started_again_and_waited_for() -> None:
    shell = Shell()
    shell.ready(0, 1, 2)
    shell.exited(0)
    assert not of(p.Regroup, shell.ready(3))
    shell.tick()
    assert len(of(p.Regroup, shell.ready(0))) == 4


def never_start(shell: Shell, *ranks: int) -> list[p.Action]:
    for _ in range(2):
        shell.exited(*ranks)
        shell.tick()
    return shell.exited(*ranks)


def test_start_up_does_without_a_rank_after_three_attempts() -> None:
    shell = Shell()
    shell.send(p.FrontendReady())
    never_start(shell, 2)
    assert len(of(p.Regroup, shell.ready(0, 1, 3))) == 3
    shell.regrouped(0, 1, 3)
    shell.synced()
    assert shell.controller.status is Status.DEGRADED
    assert shell.controller.reason == "rank 2: did not start in 3 attempts, the last: signal 9"
    assert shell.controller.next_deadline() is None


def test_start_up_gives_up_when_too_few_are_left() -> None:
    shell = Shell()
    shell.ready(0)
    *_, stop, end = never_start(shell, 1, 2, 3)
    assert stop == p.StopAll()
    assert isinstance(end, p.Exit) and end.code == 3
    assert end.reason.startswith("rank 1 did not start in 3 attempts, the last: signal 9; rank 2 ")
    assert shell.controller.next_deadline() is None
    assert shell.send(p.FrontendReady()) == [], "nothing is heard after the end"


def test_a_rank_that_is_not_ready_in_time_is_killed_and_started_again() -> None:
    shell = Shell(replace(POLICY, restore=True))
    shell.ready(0, 1, 2)
    assert of(p.KillRank, shell.tick()) == [p.KillRank(3, 4, "not ready 100 s after its start")]
    assert shell.now == 100.0
    assert len(of(p.Regroup, shell.actions)) == 3, "the others are enough, and have waited long enough"
    assert [start.rank for start in of(p.StartRank, shell.recover(0, 1, 2).tick())] == [3]
    assert shell.send(p.RankExited(3, 4, "signal 9")) == [], "the corpse of the old one does not count"


@pytest.mark.parametrize("column", [((0,) * 8,), ((0,) * 7,) * 2, ((0,) * 7 + (16,),) * 2])
def test_a_rank_that_reports_nonsense_is_given_up(column: p.Column) -> None:
    shell = Shell()
    shell.ready(0)
    [kill] = of(p.KillRank, shell.send(p.RankReady(1, 2, LAYERS, column)))
    assert kill.rank == 1
    assert "reports" in kill.reason


def test_a_death_in_the_first_regroup_is_a_recovery_like_any_other() -> None:
    shell = Shell()
    shell.send(p.FrontendReady())
    shell.ready(0, 1, 2, 3)
    assert [f.rank for f in of(p.Fence, shell.exited(3))] == [0, 1, 2]
    assert published(shell.actions).status is Status.STARTING, "it has never served"
    shell.recover(0, 1, 2)
    assert published(shell.actions).status is Status.DEGRADED
    [done] = of(p.RecoveryDone, shell.actions)
    assert (done.report.kind, done.report.ranks) == (p.RecoveryKind.START, (3,))


def test_a_front_end_that_exits_is_started_again_and_ranks_are_left_alone() -> None:
    shell = Shell().serve()
    assert shell.controller.snapshot(shell.now).frontend_ready
    actions = shell.send(p.FrontendExited("signal 11"))
    assert shell.controller.status is Status.RECOVERING
    assert not shell.controller.snapshot(shell.now).frontend_ready
    assert not of(p.Fence, actions)
    assert of(p.StartFrontend, shell.tick())
    assert not shell.controller.snapshot(shell.now).frontend_ready, "it has only been asked for"
    assert published(shell.send(p.FrontendReady())).status is Status.OK
    assert shell.controller.snapshot(shell.now).frontend_ready
    assert shell.controller.epoch == 1


def test_a_front_end_that_exits_in_a_recovery_ends_only_its_own_part() -> None:
    shell = Shell().serve()
    shell.exited(1)
    shell.fenced(0, 2, 3)
    assert shell.controller.snapshot(shell.now).frontend_ready, "it holds what comes in a recovery"
    shell.send(p.FrontendExited("signal 11"))
    [done] = of(p.RecoveryDone, shell.regrouped(0, 2, 3))
    assert done.report.requests is None
    shell.tick()
    assert published(shell.send(p.FrontendReady())).status is Status.DEGRADED


def test_a_front_end_that_keeps_exiting_ends_the_daemon() -> None:
    shell = Shell().serve()
    for _ in range(5):
        shell.send(p.FrontendExited("status 1"))
        assert of(p.StartFrontend, shell.tick())
    *_, stop, end = shell.send(p.FrontendExited("status 1"))
    assert (stop, end) == (p.StopAll(), p.Exit(4, "the front end ended 6 times in 60 s, last: status 1"))


def test_a_front_end_may_exit_now_and_then() -> None:
    shell = Shell().serve()
    for _ in range(20):
        shell.send(p.FrontendExited("status 1"), after=20.0)
        shell.tick()
    assert not of(p.Exit, shell.actions)


def test_a_front_end_that_does_not_become_ready_is_killed_until_it_is_gone() -> None:
    shell = Shell()
    shell.ready(0, 1, 2, 3)
    shell.regrouped(0, 1, 2, 3)
    for _ in range(2):
        assert of(p.KillFrontend, shell.tick()) == [p.KillFrontend("not ready within 180 s")]
    shell.send(p.FrontendExited("signal 9"))
    assert of(p.StartFrontend, shell.tick())


@pytest.mark.parametrize("drained", [True, False])
def test_stop_waits_for_requests_but_not_for_ever(drained: bool) -> None:
    shell = Shell().serve()
    actions = shell.send(p.StopRequested(10.0))
    assert published(actions).status is Status.STOPPING
    assert not of(p.Exit, actions)
    *_, stop, end = shell.send(p.DrainComplete()) if drained else shell.tick()
    assert stop == p.StopAll()
    assert end == p.Exit(0, "drained" if drained else "the time to drain is over")
    assert shell.now == (0.0 if drained else 10.0)


def test_asked_twice_it_stops_sooner_never_later() -> None:
    shell = Shell().serve()
    shell.send(p.StopRequested(10.0))
    shell.send(p.StopRequested(20.0))
    assert shell.controller.next_deadline() == 10.0
    shell.send(p.StopRequested(0.0))
    assert shell.controller.next_deadline() == 0.0


def test_with_nothing_to_drain_it_stops_at_once() -> None:
    assert of(p.Exit, Shell().send(p.StopRequested(10.0))), "starting"
    assert of(p.Exit, too_few().send(p.StopRequested(10.0))), "unavailable"
    shell = Shell().serve()
    shell.send(p.FrontendExited("signal 11"))
    assert of(p.Exit, shell.send(p.StopRequested(10.0))), "no front end"


def test_a_stop_in_a_recovery_waits_for_it_and_then_for_the_requests() -> None:
    shell = Shell(replace(POLICY, restore=True)).serve()
    shell.exited(1)
    assert not of(p.Exit, shell.send(p.StopRequested(10.0), p.StopRequested(20.0)))
    began = shell.now
    shell.recover(0, 2, 3, serving=False)
    assert shell.controller.phase is Phase.STOPPING
    assert not of(p.StartRank, shell.actions[-20:]), "nobody comes back for the end"
    assert shell.controller.next_deadline() == began + 10.0
    assert of(p.Exit, shell.send(p.DrainComplete()))[0].reason == "drained"


def test_a_stop_after_a_fault_that_no_death_explains_yet_waits_for_a_recovery() -> None:
    """Nobody steps after a fault: requests could not end."""
    shell = Shell().serve()
    shell.fault(1)
    began, actions = shell.now, shell.send(p.StopRequested(10.0))
    assert not of(p.Exit, actions) and {fence.rank for fence in of(p.Fence, actions)} == {0, 1, 2, 3}
    shell.recover(0, 1, 2, 3, serving=False)
    assert shell.controller.phase is Phase.STOPPING
    assert shell.controller.next_deadline() == began + 10.0
    assert of(p.Exit, shell.send(p.DrainComplete()))[0].reason == "drained"


@pytest.mark.parametrize("outcome", ["time", "front end", "too few"])
def test_a_stop_in_a_recovery_that_does_not_end_well(outcome: str) -> None:
    shell = Shell().serve()
    shell.exited(1)
    shell.send(p.StopRequested(1.0))
    match outcome:
        case "time":
            shell.now += 1.0
            actions = shell.send(p.Tick())
            assert of(p.Exit, actions)[0].reason == "the time to drain is over"
        case "front end":
            assert of(p.Exit, shell.send(p.FrontendExited("signal 11")))
        case _:
            shell.exited(2, 3)
            assert of(p.Exit, shell.fenced(0))


@pytest.mark.parametrize("loss", ["death", "fault", "front end"])
def test_losses_while_draining_end_the_wait(loss: str) -> None:
    shell = Shell().serve()
    shell.send(p.StopRequested(10.0))
    match loss:
        case "death":
            actions = shell.exited(1)
        case "fault":
            actions = shell.fault(1)
        case _:
            actions = shell.send(p.FrontendExited("signal 9"))
    assert [end.code for end in of(p.Exit, actions)] == [0]


def test_the_snapshot_before_during_and_after_a_loss() -> None:
    shell = Shell()
    view = shell.controller.snapshot(0.0)
    assert (view.status, view.active, view.target, view.expert_safety) == (Status.STARTING, 0, 4, None)

    view = shell.serve().controller.snapshot(0.0)
    assert (view.status, view.reason, view.active) == (Status.OK, "", 4)
    assert (view.expert_safety, view.survivable_losses) == (1, 2)
    assert view.last_recovery is not None
    assert view.last_shrink is None

    shell.now = 5.0
    shell.exited(2)
    view = shell.controller.snapshot(6.0)
    assert (view.status, view.reason, view.epoch, view.active) == (Status.RECOVERING, "rank 2: signal 9", 2, 3)
    assert view.expert_safety == 0
    gone = view.ranks[2]
    assert (gone.rank, gone.state, gone.since, gone.reason) == (2, RankState.EXCLUDED, 5.0, "signal 9")

    shell.recover(0, 1, 3)
    view = shell.controller.snapshot(7.0)
    assert (view.status, view.reason, view.survivable_losses) == (Status.DEGRADED, "rank 2: signal 9", 1)
    assert view.last_shrink == view.last_recovery


def test_it_says_what_it_does_and_what_it_waits_for() -> None:
    shell = Shell()
    assert shell.controller.describe() == (
        "starting; waiting for all ranks to start (100.0 s left); ranks to start: 0, 1, 2, 3 (100.0 s left)"
    )
    shell.serve()
    assert shell.controller.describe() == "serving epoch 1 with 4 of 4 ranks"
    shell.exited(1)
    shell.send(p.Tick(), after=1.0)
    shell.fenced(2)
    assert shell.controller.describe() == "fencing epoch 2; waiting for ranks to park: 0, 3 (2.0 s left)"
    shell.send(p.FrontendExited("signal 11"))
    shell.send(p.StopRequested(1.0))
    assert shell.controller.describe() == "exited: stopped on request; nothing was being served"


def test_time_never_runs_backwards() -> None:
    shell = Shell().serve()
    shell.now = 5.0
    shell.exited(1)
    assert shell.controller.handle(p.Tick(), 1.0) == ()
    assert shell.controller.next_deadline() == 8.0
