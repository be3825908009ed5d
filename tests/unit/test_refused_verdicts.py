"""A verdict that was refused is acted on when nothing stands against it any more: the watchdog says it once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastic_daemon import protocol as p
from elastic_daemon.control.gpu_pool import GpuPool
from elastic_daemon.membership import RankState
from tests.unit.driver import POLICY, Shell, events, of, published

GPU, XID = "GPU-2", "xid 79"
Kind = p.VerdictKind
RESTORING = replace(POLICY, restore=True)


def say(shell: Shell, kind: Kind, rank: int, why: str = XID) -> list[p.Action]:
    return shell.send(p.TelemetryVerdict(GPU, (shell.identity(rank),), kind, kind.acts, why, shell.now))


def switch(shell: Shell, on: bool) -> list[p.Action]:
    return shell.send(p.AutomationSwitched(on))


@pytest.mark.parametrize("kind", [Kind.EXCLUDE, Kind.RESTART_RANK])
def test_when_automation_is_on_again(kind: Kind) -> None:
    shell = Shell().serve()
    switch(shell, on=False)
    assert not of(p.KillRank, say(shell, kind, 2))
    shell.now += 100
    switch(shell, on=True)
    actions = shell.tick()
    assert [(kill.rank, kill.reason) for kill in of(p.KillRank, actions)] == [(2, XID)]
    assert events("verdict_reconsidered", actions) == [{"ranks": [2], "reason": XID}]
    shell.recover(0, 1, 3)
    report = shell.controller.snapshot(shell.now).last_shrink
    assert report is not None and report.seconds["detect"] == 0.0, "what an operator took is no time of the watchdog"
    assert not of(p.Fence, shell.tick() if shell.controller.next_deadline() is not None else [])


def test_a_drain_is_one_then_too() -> None:
    shell = Shell().serve()
    switch(shell, on=False)
    say(shell, Kind.DRAIN, 2)
    switch(shell, on=True)
    actions = shell.tick()
    assert not of(p.KillRank, actions) and published(actions).draining == (shell.identity(2),)


@pytest.mark.parametrize("kind", [Kind.EXCLUDE, Kind.DRAIN])
def test_when_another_rank_has_joined(kind: Kind) -> None:
    """A second GPU goes bad while the replacement of the first still starts."""
    gpus = tuple(f"GPU-{rank}" for rank in range(4))
    shell = Shell(RESTORING, GpuPool(gpus, 1, 2.0)).serve()
    shell.see(*gpus)
    shell.exited(0, 1)
    shell.recover(2, 3)
    say(shell, kind, 2)
    assert shell.state(2) is RankState.SUSPECT
    shell.settle()
    assert shell.serving == [0, 1, 3]
    assert len(events("verdict_refused", shell.actions)) == 1
    assert len(events("verdict_reconsidered", shell.actions)) == 1


def test_not_when_the_watchdog_has_taken_it_back() -> None:
    shell = Shell().serve()
    switch(shell, on=False)
    say(shell, Kind.EXCLUDE, 2)
    say(shell, Kind.OK, 2)
    switch(shell, on=True)
    assert shell.controller.next_deadline() is None
    assert shell.state(2) is RankState.ACTIVE


def test_a_rank_that_has_met_the_others_since_hangs_no_more() -> None:
    shell = Shell().serve()
    switch(shell, on=False)
    say(shell, Kind.RESTART_RANK, 2, "hung")
    shell.exited(0)
    shell.recover(1, 2, 3)
    switch(shell, on=True)
    assert shell.controller.next_deadline() is None
    assert shell.serving == [1, 2, 3]


def test_it_stays_refused_while_nothing_has_changed() -> None:
    shell = Shell().serve()
    shell.exited(0, 1)
    shell.recover(2, 3)
    say(shell, Kind.EXCLUDE, 2)
    switch(shell, on=True)
    assert shell.controller.next_deadline() is None
    assert shell.serving == [2, 3]
    assert len(events("verdict_refused", shell.actions)) == 1


def test_a_rank_that_was_called_hung_while_the_group_changed_has_met_the_others() -> None:
    """They cannot spare it, and no epoch begins after the verdict: but the one that was under way is complete."""
    shell = Shell().serve()
    shell.exited(0, 1)
    shell.fenced(2, 3)
    epoch = shell.controller.epoch
    say(shell, Kind.RESTART_RANK, 2, "hung")
    assert len(events("verdict_refused", shell.actions)) == 1
    shell.regrouped(2, 3)
    shell.synced()
    assert shell.controller.next_deadline() is None
    assert (shell.controller.epoch, shell.serving) == (epoch, [2, 3])
