"""Changes that can wait have the members end their step first. All rules together: test_simulation.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastic_daemon import protocol as p
from elastic_daemon.control.control_state import Phase
from elastic_daemon.membership import Status
from tests.unit.driver import POLICY, Shell, of
from tests.unit.test_rejoin import degraded


def joining() -> Shell:
    """Ranks 0, 1 and 3 serve and were asked to end their step, so that 2 can join."""
    shell = degraded()
    shell.tick()
    shell.ready(2)
    shell.quiesces = False
    assert of(p.Quiesce, shell.tick()) == [p.Quiesce(rank, 2) for rank in (0, 1, 3)]
    assert shell.controller.phase is Phase.QUIESCING
    assert shell.controller.status is Status.DEGRADED, "clients are served"
    return shell


def recorded(shell: Shell) -> list[str]:
    return [event.name for event in of(p.RecordEvent, shell.actions)]


def test_the_group_changes_when_the_last_member_stands_still() -> None:
    shell = joining()
    assert not shell.quiesced(0, 3)
    assert not shell.quiesced(3), "said twice"
    assert [fence.rank for fence in of(p.Fence, shell.quiesced(1))] == [0, 1, 2, 3]
    assert not shell.quiesced(1), "that is over"
    shell.quiesces = True
    shell.recover(0, 1, 2, 3)
    assert shell.controller.status is Status.OK
    assert "quiesce_overdue" not in recorded(shell)


def test_who_cannot_end_its_step_is_fenced_in_it() -> None:
    shell = joining()
    shell.quiesced(0, 1)
    before = shell.now
    assert [fence.rank for fence in of(p.Fence, shell.tick())] == [0, 1, 2, 3]
    assert shell.now - before == pytest.approx(POLICY.quiesce_timeout_s)
    assert "quiesce_overdue" in recorded(shell)
    assert shell.controller.phase is Phase.FENCING


def test_a_death_is_not_kept_waiting() -> None:
    shell = joining()
    shell.quiesced(0)
    assert [fence.rank for fence in of(p.Fence, shell.exited(1))] == [0, 3]
    assert not shell.quiesced(3), "of an epoch that is over"
    shell.recover(0, 3)
    assert shell.controller.status is Status.DEGRADED
    assert [order.rank for order in of(p.Quiesce, shell.tick())] == [0, 3], "and then rank 2 joins"


def test_members_serve_on_if_the_change_is_off_meanwhile() -> None:
    shell = joining()
    assert not of(p.Fence, shell.exited(2)), "one that had not joined"
    assert [fence.rank for fence in of(p.Fence, shell.quiesced(0, 1, 3))] == [0, 1, 3]
    shell.fenced(0, 1, 3)
    shell.regrouped(0, 1, 3)
    (done,) = of(p.RecoveryDone, shell.synced())
    assert (done.report.kind, done.report.ranks) == (p.RecoveryKind.REGROUP, ())
    assert shell.serving == [0, 1, 3]


def test_ranks_leave_when_all_stand_still() -> None:
    shell = Shell(replace(POLICY, target=5)).serve()
    shell.quiesces = False
    shell.scale(4)
    shell.moved()
    while not of(p.Quiesce, shell.actions):
        shell.respread(0, 1, 2, 3, 4)
    assert not of(p.KillRank, shell.actions)
    actions = shell.quiesced(0, 1, 2, 3, 4)
    assert [kill.rank for kill in of(p.KillRank, actions)] == [4]
    assert [fence.rank for fence in of(p.Fence, actions)] == [0, 1, 2, 3]


def test_a_stop_meanwhile_waits_for_the_end_of_the_change() -> None:
    shell = joining()
    assert not of(p.Exit, shell.send(p.StopRequested(10.0)))
    assert shell.controller.phase is Phase.QUIESCING
    shell.settle()
    (end,) = of(p.Exit, shell.actions)
    assert end.reason == "the time to drain is over", "requests that never end"
