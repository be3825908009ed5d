"""What an operator can ask for one rank, and automation that is switched off. One rule at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastic_daemon import protocol as p
from elastic_daemon.control.gpu_pool import GpuPool
from elastic_daemon.membership import RankState, Status
from tests.unit.driver import POLICY, Shell, events, of, published

Deed, State = p.RankDeed, p.OperationState
RESTORING = replace(POLICY, restore=True)
SINGLE = replace(RESTORING, slots=6)
"""Some experts have a single copy; three ranks have room for all."""


def outcome(shell: Shell) -> tuple[p.OperationState, str]:
    return shell.report().state, shell.report().message


def two_left() -> Shell:
    """16 experts on two ranks of 8 slots: none can be spared."""
    shell = Shell().serve()
    shell.exited(0, 1)
    return shell.recover(2, 3)


def test_a_drained_rank_leaves_in_order_and_stays_out_until_it_is_released() -> None:
    shell = Shell(SINGLE).serve()
    identity = shell.identity(2)
    actions = shell.order(Deed.DRAIN, 2)
    assert published(actions).draining == (identity,)
    assert not of(p.Fence, actions) and not of(p.KillRank, actions)
    assert not of(p.Fence, shell.moved()), "experts come before that"
    shell.respread(0, 1, 2)
    assert [kill.rank for kill in of(p.KillRank, shell.respread(3))] == [2]
    shell.recover(0, 1, 3)
    assert outcome(shell) == (State.DONE, "rank 2 has left until it is released")
    shell.settle()
    assert (shell.serving, shell.state(2)) == ([0, 1, 3], RankState.EXCLUDED)
    assert (shell.controller.status, shell.controller.target) == (Status.DEGRADED, 4)
    assert shell.controller.reason == "rank 2: drained by an operator"
    assert not of(p.StoreTarget, shell.actions)

    assert [start.rank for start in of(p.StartRank, shell.order(Deed.RELEASE, 2))] == [2]
    assert outcome(shell) == (State.DONE, "rank 2 is started again")
    assert shell.settle().controller.status is Status.OK


def test_what_cannot_be_drained() -> None:
    shell = Shell().serve()
    shell.order(Deed.DRAIN, 9)
    assert outcome(shell) == (State.INVALID, "rank 9 does not serve")
    shell = two_left()
    actions = shell.order(Deed.DRAIN, 2)
    assert outcome(shell) == (State.INVALID, "2 ranks are needed to hold every expert, and 1 would be left")
    assert not of(p.Publish, actions)


def test_a_drain_that_takes_too_long_changes_nothing() -> None:
    shell = Shell(RESTORING).serve()
    shell.order(Deed.DRAIN, 2, timeout_s=5.0)
    actions = shell.tick()
    assert shell.now == 5.0
    state, message = outcome(shell)
    assert (state, message[:40]) == (State.TIMED_OUT, "not done within 5 s, while moving reques")
    assert (published(actions).draining, published(actions).status) == ((), Status.OK)
    shell.exited(2)
    assert shell.settle().serving == [0, 1, 2, 3], "it is not left out"


@pytest.mark.parametrize("steps", [0, 1])
def test_a_rank_that_dies_while_it_drains_has_left(steps: int) -> None:
    shell = Shell(SINGLE).serve()
    shell.order(Deed.DRAIN, 2)
    if steps:
        shell.moved()
    shell.exited(2)
    shell.settle()
    assert outcome(shell) == (State.DONE, "rank 2 has left until it is released")
    assert shell.serving == [0, 1, 3]


def test_one_that_drains_begins_anew_after_a_recovery() -> None:
    """Requests of the rank that was lost may have come to it."""
    shell = Shell(replace(POLICY, target=5, slots=6, experts=18)).serve()
    shell.order(Deed.DRAIN, 4)
    before = published(shell.actions).draining
    shell.moved()
    assert shell.report().phase == "moving experts"
    shell.exited(0)
    assert published(shell.actions).draining == before
    shell.recover(1, 2, 3, 4)
    shell.send(p.FrontendMoved(1, (shell.incarnation(4),)))  # said of the epoch before
    assert (shell.report().phase, shell.state(4)) == ("moving requests", RankState.DRAINING)
    shell.settle()
    assert (shell.serving, shell.report().state) == ([1, 2, 3], State.DONE)


def test_an_excluded_rank_goes_at_once_and_stays_out() -> None:
    shell = Shell(RESTORING).serve()
    actions = shell.order(Deed.EXCLUDE, 2)
    assert outcome(shell) == (State.DONE, "rank 2 is excluded until it is released")
    assert [kill.rank for kill in of(p.KillRank, actions)] == [2]
    assert [fence.rank for fence in of(p.Fence, actions)] == [0, 1, 3]
    shell.settle()
    assert (shell.serving, shell.controller.reason) == ([0, 1, 3], "rank 2: excluded by an operator")
    shell.order(Deed.RELEASE, 2)
    assert shell.settle().serving == [0, 1, 2, 3]


def test_what_cannot_be_excluded() -> None:
    shell = two_left()
    shell.order(Deed.EXCLUDE, 0)
    assert outcome(shell) == (State.INVALID, "rank 0 is not there")
    shell.order(Deed.EXCLUDE, 9)
    assert outcome(shell) == (State.INVALID, "rank 9 is not there")
    actions = shell.order(Deed.EXCLUDE, 2)
    assert outcome(shell) == (State.INVALID, "2 ranks are needed to hold every expert, and 1 would be left")
    assert not of(p.KillRank, actions)


def test_a_rank_that_starts_can_be_excluded() -> None:
    shell = Shell(RESTORING).serve()
    shell.exited(2)
    shell.recover(0, 1, 3).tick()
    assert shell.state(2) is RankState.STARTING
    assert [kill.rank for kill in of(p.KillRank, shell.order(Deed.EXCLUDE, 2))] == [2]
    assert shell.settle().serving == [0, 1, 3]


def test_an_operation_that_needs_an_excluded_rank_is_rolled_back() -> None:
    shell = Shell(RESTORING).serve()
    shell.scale(5)
    shell.order(Deed.EXCLUDE, 4)
    rolled_back = [change.report for change in of(p.OperationChanged, shell.actions) if change.report.state.ended][-1]
    assert (rolled_back.operation, rolled_back.state) == ("op-1", State.ROLLED_BACK)
    assert rolled_back.message == "rank 4 excluded by an operator; 4 ranks are wanted as before"
    assert shell.controller.target == 4


def test_a_rank_that_failed_too_often_gets_more_attempts() -> None:
    shell = Shell(RESTORING).serve()
    shell.exited(2)
    shell.settle(failing={2})
    attempts = shell.start_of(2).incarnation
    assert shell.serving == [0, 1, 3]
    shell.order(Deed.RELEASE, 2)
    shell.settle(failing={2})
    assert shell.start_of(2).incarnation == attempts + RESTORING.max_start_attempts
    shell.order(Deed.RELEASE, 2)
    assert shell.settle().serving == [0, 1, 2, 3]


def test_what_is_not_left_out_is_not_released() -> None:
    shell = Shell().serve()
    actions = shell.order(Deed.RELEASE, 2)
    assert outcome(shell) == (State.DONE, "rank 2 was not left out")
    assert not of(p.StartRank, actions)
    shell.order(Deed.RELEASE, 4)
    assert outcome(shell) == (State.INVALID, "rank 4 is not one of the 4 to serve: scale up to have it back")


def test_a_released_rank_waits_for_a_gpu() -> None:
    uuids = ("GPU-a", "GPU-b", "GPU-c", "GPU-d")
    shell = Shell(RESTORING, GpuPool(uuids, 1, 2.0)).serve()
    shell.order(Deed.EXCLUDE, 3)
    shell.settle()
    shell.see(*uuids[:3])
    assert not of(p.StartRank, shell.order(Deed.RELEASE, 3))
    assert outcome(shell) == (State.DONE, "rank 3 waits for a usable GPU")
    shell.see(*uuids)
    assert shell.settle().serving == [0, 1, 2, 3]


def test_without_automation_losses_are_survived_and_nothing_else_is_done() -> None:
    shell = Shell(RESTORING).serve()
    shell.send(p.AutomationSwitched(False))
    assert not shell.controller.automatic
    condemned = p.TelemetryVerdict("GPU-3", (shell.identity(3),), p.VerdictKind.EXCLUDE, True, "xid 79", shell.now)
    assert not of(p.KillRank, shell.send(condemned))
    assert events("verdict_refused", shell.actions)[-1]["why"] == "automation is off"
    assert shell.state(3) is RankState.SUSPECT

    shell.exited(2)
    shell.settle()
    assert (shell.serving, shell.controller.status) == ([0, 1, 3], Status.DEGRADED)
    assert shell.now < 1.0, "nothing was waited for"

    assert [start.rank for start in of(p.StartRank, shell.send(p.AutomationSwitched(True)))] == [2]
    assert shell.settle().serving == [0, 1, 2], "and rank 3 is given up after all"
    assert [event["enabled"] for event in events("automation_switched", shell.actions)] == [False, True]


def test_without_automation_orders_are_carried_out() -> None:
    shell = Shell(replace(RESTORING, max_ranks=6)).serve()
    shell.send(p.AutomationSwitched(False))
    shell.scale(5)
    shell.ready(4)
    shell.exited(4)
    shell.settle()
    assert (shell.report().state, shell.serving) == (State.DONE, [0, 1, 2, 3, 4]), "one that was ordered is tried again"
    shell.exited(4)
    assert shell.settle().serving == [0, 1, 2, 3], "one that has served is not restored"
    shell.order(Deed.RELEASE, 4)
    assert shell.settle().serving == [0, 1, 2, 3, 4]


def test_a_pause_before_a_restart_ends_in_nothing_without_automation() -> None:
    shell = Shell(RESTORING).serve()
    shell.exited(2)
    shell.recover(0, 1, 3)
    shell.send(p.AutomationSwitched(False))
    assert shell.settle().serving == [0, 1, 3]
