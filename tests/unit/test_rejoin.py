"""How a lost rank comes back: one rule at a time. All rules together: test_simulation.py."""

from __future__ import annotations

from dataclasses import replace

from elastic_daemon import protocol as p
from elastic_daemon.control.comebacks import Comebacks
from elastic_daemon.control.control_state import Phase
from elastic_daemon.membership import RankState, Status
from tests.unit.driver import POLICY, Shell, of, published

RESTORING = replace(POLICY, restore=True)


def degraded() -> Shell:
    """Rank 2 of 4 was lost, and the others serve."""
    shell = Shell(RESTORING).serve()
    shell.exited(2)
    return shell.recover(0, 1, 3)


def test_a_lost_rank_is_started_again_and_joins() -> None:
    shell = degraded()
    (start,) = of(p.StartRank, shell.tick())
    assert (start.rank, start.members) == (2, (0, 1, 2, 3))
    assert shell.controller.status is Status.DEGRADED
    assert shell.controller.reason == "rank 2: starting"

    shell.ready(2)
    assert shell.controller.status is Status.DEGRADED, "others serve until it joins"
    fences = of(p.Fence, shell.tick())
    assert [fence.rank for fence in fences] == [0, 1, 2, 3]
    shell.fenced(0, 1, 2, 3)
    shell.regrouped(0, 1, 2, 3)
    (done,) = of(p.RecoveryDone, shell.synced())
    assert (done.report.kind, done.report.ranks) == (p.RecoveryKind.GROW, (2,))
    assert shell.controller.status is Status.OK
    assert shell.controller.snapshot(shell.now).last_grow == done.report


def test_without_restore_it_stays_lost() -> None:
    shell = Shell().serve()
    shell.exited(2)
    shell.recover(0, 1, 3)
    assert shell.controller.next_deadline() is None


def test_a_rank_that_is_ready_during_a_recovery_waits_for_its_end() -> None:
    shell = degraded()
    shell.tick()
    shell.exited(3)
    assert of(p.Fence, shell.ready(2)) == []
    shell.fenced(0, 1)
    shell.regrouped(0, 1)
    assert of(p.Fence, shell.synced()) == []
    assert {fence.rank for fence in of(p.Fence, shell.tick())} == {0, 1, 2}


def test_capacity_that_comes_back_ends_unavailability() -> None:
    shell = Shell(RESTORING).serve()
    shell.exited(1, 2, 3)
    shell.fenced(0)
    assert shell.controller.phase is Phase.UNAVAILABLE
    assert len(of(p.StartRank, shell.tick())) == 3
    shell.ready(1)
    shell.tick()
    shell.fenced(0, 1)
    shell.regrouped(0, 1)
    view = published(shell.actions)
    assert (view.status, len(view.active)) == (Status.DEGRADED, 2)


def test_a_death_while_it_joins_costs_nobody_else() -> None:
    shell = degraded()
    shell.tick()
    shell.ready(2)
    shell.tick()
    shell.exited(2)
    shell.fenced(0, 1, 3)
    shell.regrouped(0, 1, 3)
    (done,) = of(p.RecoveryDone, shell.synced())
    assert done.report.kind is p.RecoveryKind.REGROUP
    assert shell.controller.status is Status.DEGRADED


def test_a_newcomer_with_whom_no_group_can_be_built_is_given_up() -> None:
    shell = degraded()
    shell.tick()
    shell.ready(2)
    shell.tick()
    for failures in (1, 2):
        shell.fenced(0, 1, 2, 3)
        kills = of(p.KillRank, shell.regroup_failed(1))
        assert [kill.rank for kill in kills] == [2] * (failures - 1)
    shell.recover(0, 1, 3)
    assert shell.states()[2] is RankState.EXCLUDED


def test_processes_that_fail_before_they_serve_are_tried_a_few_times() -> None:
    shell = degraded()
    for _ in range(RESTORING.max_start_attempts):
        assert of(p.StartRank, shell.tick())
        shell.exited(2)
    assert shell.controller.next_deadline() is None
    assert [action.name for action in of(p.RecordEvent, shell.actions)].count("rank_left_out") == 1
    assert shell.controller.status is Status.DEGRADED
    assert shell.controller.reason == "rank 2: did not start in 3 attempts, the last: signal 9"


def test_frequent_losses_delay_the_next_start() -> None:
    comebacks = Comebacks(RESTORING)
    delays = []
    for loss in range(4):
        at = comebacks.after_loss(1, float(loss), had_served=True)
        assert at is not None
        delays.append(at - loss)
        comebacks.served(1)
    assert delays == [1.0, 2.0, 4.0, 8.0]
    later = comebacks.after_loss(1, 1000.0, had_served=True)
    assert later == 1000.0 + delays[0], "old losses are forgotten"
