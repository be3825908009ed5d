"""How an operator changes the number of ranks: one rule at a time. All rules together: test_simulation.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_daemon import protocol as p
from elastic_daemon.control.control_state import Phase
from elastic_daemon.control.departure import lowest_free, victims
from elastic_daemon.control.gpu_pool import GpuPool
from elastic_daemon.membership import IN_GROUP, Rank, RankState, Status
from elastic_daemon.placement import missing
from tests.unit.driver import POLICY, Shell, events, of, published

State = p.OperationState
SCALING = replace(POLICY, max_ranks=6, restore=True)
MANUAL = replace(SCALING, restore=False)
SINGLE = replace(SCALING, target=5, experts=18, slots=6)
"""Some experts have a single copy; three ranks have room for all."""


def stored(shell: Shell) -> list[int]:
    return [action.target for action in of(p.StoreTarget, shell.actions)]


def ended(shell: Shell, state: p.OperationState, target: int) -> str:
    """The newest operation has ended like this, and so many ranks are wanted now. Returns what was said about it."""
    report = shell.report()
    assert (report.state, shell.controller.target) == (state, target), report
    assert stored(shell)[-1:] == ([target] if state is State.DONE else [])
    assert events("operation_ended", shell.actions)[-1]["message"] == report.message
    return report.message


def test_new_ranks_take_the_lowest_free_ids_and_join_together() -> None:
    shell = Shell(SCALING).serve()
    starts = of(p.StartRank, shell.scale(6))
    assert [(start.rank, start.members) for start in starts] == [(4, (0, 1, 2, 3, 4, 5)), (5, (0, 1, 2, 3, 4, 5))]
    assert (shell.report().state, shell.report().phase) == (State.RUNNING, "starting ranks")
    assert (shell.controller.status, shell.controller.target) == (Status.DEGRADED, 6)
    shell.ready(5)
    assert "ranks to join" not in shell.controller.describe(), "one pause for both"
    shell.ready(4)
    assert [fence.rank for fence in of(p.Fence, shell.tick())] == [0, 1, 2, 3, 4, 5]
    assert shell.report().phase == "fencing"
    shell.fenced(0, 1, 2, 3, 4, 5)
    shell.regrouped(0, 1, 2, 3, 4, 5)
    assert (shell.report().state, stored(shell)) == (State.RUNNING, []), "not before it serves"
    shell.synced()
    assert ended(shell, State.DONE, 6) == "serving with 6 ranks"
    report = shell.report()
    assert (report.ranks, report.target, report.previous) == ((4, 5), 6, 4)
    assert shell.controller.status is Status.OK
    grown = shell.controller.snapshot(shell.now).last_grow
    assert grown is not None and grown.ranks == (4, 5)


def test_an_id_that_was_retired_is_free_again() -> None:
    shell = Shell(SCALING).serve()
    shell.scale(3, retire=(1,))
    shell.settle()
    assert shell.serving == [0, 2, 3]
    assert [start.rank for start in of(p.StartRank, shell.scale(5))] == [1, 4]
    shell.settle()
    ended(shell, State.DONE, 5)
    assert stored(shell) == [3, 5]


def test_the_same_number_again_is_done_at_once() -> None:
    shell = Shell(SCALING).serve()
    actions = shell.scale(4)
    assert not of(p.StartRank, actions) and not of(p.Fence, actions)
    ended(shell, State.DONE, 4)


def test_the_same_number_again_brings_back_who_is_lost() -> None:
    shell = Shell(MANUAL).serve()
    shell.exited(2)
    shell.recover(0, 1, 3)
    assert [start.rank for start in of(p.StartRank, shell.scale(4))] == [2]
    shell.settle()
    ended(shell, State.DONE, 4)
    assert shell.controller.status is Status.OK


def test_a_newcomer_that_keeps_failing_is_not_wanted_any_more() -> None:
    shell = Shell(SCALING).serve()
    shell.scale(6)
    shell.settle(failing={5})
    told = "rank 5 did not start in 3 attempts, the last: signal 9; 4 ranks are wanted as before"
    assert ended(shell, State.ROLLED_BACK, 4) == told
    assert shell.serving == [0, 1, 2, 3], "the other one has not joined, or has left again"
    assert (shell.state(4), shell.state(5)) == (RankState.RETIRED, RankState.RETIRED)
    assert shell.controller.status is Status.OK


def test_a_newcomer_with_whom_no_group_can_be_built_is_not_wanted_any_more() -> None:
    shell = Shell(SCALING).serve()
    shell.scale(5, timeout_s=600.0)
    shell.settle(unjoinable={4})
    assert ended(shell, State.ROLLED_BACK, 4).startswith("rank 4 did not start in 3 attempts, the last: could not join")
    assert shell.serving == [0, 1, 2, 3]


def test_time_is_over_before_ranks_have_started() -> None:
    shell = Shell(SCALING).serve()
    shell.scale(6, timeout_s=10.0)
    shell.ready(4)
    actions = shell.tick()
    assert shell.now == 10.0
    assert [(kill.rank, kill.doubtful) for kill in of(p.KillRank, actions)] == [(4, False), (5, False)]
    told = "not done within 10 s, while starting ranks; 4 ranks are wanted as before"
    assert ended(shell, State.TIMED_OUT, 4) == told
    assert (shell.state(4), shell.state(5)) == (RankState.RETIRED, RankState.RETIRED)
    assert not of(p.Fence, actions), "nobody has noticed"
    assert shell.controller.next_deadline() is None


def test_time_that_is_over_in_the_last_step_does_not_undo_it() -> None:
    shell = Shell(SCALING).serve()
    shell.scale(5, timeout_s=2.0)
    shell.send(after=1.9)
    shell.ready(4)
    shell.tick()
    shell.send(p.Tick(), after=0.5)
    assert shell.report().state is State.RUNNING
    shell.recover(0, 1, 2, 3, 4)
    ended(shell, State.DONE, 5)


UP: tuple[tuple[str, Callable[[Shell], object]], ...] = (
    ("starting", lambda shell: shell.scale(6)),
    ("one is ready", lambda shell: shell.ready(4)),
    ("both are ready", lambda shell: shell.ready(5)),
    ("fencing", lambda shell: shell.tick()),
    ("regrouping", lambda shell: shell.fenced(*range(6))),
    ("resuming", lambda shell: shell.regrouped(*range(6))),
)


@pytest.mark.parametrize("victim", [0, 4])
@pytest.mark.parametrize("steps", range(1, len(UP) + 1), ids=[name for name, _ in UP])
def test_a_death_on_the_way_up_delays_it(steps: int, victim: int) -> None:
    shell = Shell(SCALING).serve()
    for _, step in UP[:steps]:
        step(shell)
    shell.exited(victim)
    assert shell.report().state is State.RUNNING
    shell.settle()
    ended(shell, State.DONE, 6)
    assert shell.serving == [0, 1, 2, 3, 4, 5]
    assert stored(shell) == [6]


def test_who_serves_is_worth_more_than_who_was_meant_to() -> None:
    """A rank is lost for good while others come: going back, the newcomer stays in its place."""
    shell = Shell(MANUAL).serve()
    shell.scale(6)
    shell.exited(0)
    shell.settle()
    ended(shell, State.TIMED_OUT, 4)
    assert shell.serving == [1, 2, 3, 4]
    assert shell.controller.status is Status.OK


def test_ranks_leave_in_order() -> None:
    shell = Shell(SINGLE).serve()
    leaving = shell.identity(4)
    actions = shell.scale(4)
    assert (published(actions).draining, shell.state(4)) == ((leaving,), RankState.DRAINING)
    assert (shell.report().phase, shell.report().ranks) == ("moving requests", (4,))
    assert not of(p.Respread, shell.send(p.FrontendMoved(1, (99,)))), "that is about others"
    moves = of(p.Respread, shell.moved())
    assert [move.rank for move in moves] == [0, 1, 2, 3, 4]
    assert missing(moves[0].placement.restricted([0, 1, 2, 3])) == (), "who stays comes to hold every expert"
    assert shell.report().phase == "moving experts"
    assert not of(p.Fence, shell.respread(0, 1, 2, 3))
    actions = shell.respread(4)
    assert of(p.KillRank, actions) == [p.KillRank(*leaving, "scaled down by an operator", doubtful=False)]
    assert [fence.rank for fence in of(p.Fence, actions)] == [0, 1, 2, 3]
    assert stored(shell) == []
    shell.fenced(0, 1, 2, 3)
    assert [regroup.loads for regroup in of(p.Regroup, shell.actions)[-4:]] == [()] * 4, "nothing has to be read"
    shell.regrouped(0, 1, 2, 3)
    shell.synced()
    assert ended(shell, State.DONE, 4) == "serving with 4 ranks"
    assert (shell.state(4), shell.controller.status) == (RankState.RETIRED, Status.OK)
    report = shell.controller.snapshot(shell.now).last_shrink
    assert report is not None and report.ranks == (4,)
    assert not of(p.StartRank, shell.exited(4)), "it is not missed"


def test_the_highest_ids_leave_or_those_that_are_named() -> None:
    for retire, draining in ((None, [2, 3]), ((1, 2), [1, 2])):
        shell = Shell(SCALING).serve()
        shell.scale(2, retire)
        assert [rank for rank, _ in published(shell.actions).draining] == draining
        shell.settle()
        ended(shell, State.DONE, 2)


def test_who_does_not_serve_is_the_first_that_is_not_wanted() -> None:
    shell = Shell(MANUAL).serve()
    shell.exited(1)
    shell.recover(0, 2, 3)
    actions = shell.scale(3)
    assert not of(p.Fence, actions) and not of(p.KillRank, actions)
    ended(shell, State.DONE, 3)
    assert (shell.state(1), shell.controller.status) == (RankState.RETIRED, Status.OK)


def test_a_rank_that_starts_is_stopped() -> None:
    shell = Shell(SCALING).serve()
    shell.exited(1)
    shell.recover(0, 2, 3).tick()
    assert shell.state(1) is RankState.STARTING
    kills = of(p.KillRank, shell.scale(3))
    assert kills == [p.KillRank(*shell.identity(1), "not wanted any more", doubtful=False)]
    ended(shell, State.DONE, 3)


def test_time_is_over_before_requests_have_moved() -> None:
    shell = Shell(SCALING).serve()
    shell.scale(3, timeout_s=10.0)
    actions = shell.tick()
    assert shell.now == 10.0
    told = "not done within 10 s, while moving requests; 4 ranks are wanted as before"
    assert ended(shell, State.TIMED_OUT, 4) == told
    assert (published(actions).draining, published(actions).status) == ((), Status.OK)
    assert not of(p.Fence, shell.actions) and not of(p.KillRank, shell.actions)


def test_time_that_is_over_in_a_recovery_is_what_it_ended_for() -> None:
    shell = Shell(replace(SCALING, target=5, fence_timeout_s=60.0)).serve()
    shell.scale(4, timeout_s=10.0)
    shell.exited(0)
    shell.send(p.Tick(), after=11.0)
    shell.recover(1, 2, 3, 4).tick()
    assert "not done within 10 s" in shell.report().message
    assert shell.report().state is State.TIMED_OUT
    assert shell.controller.target == 5


DOWN: tuple[tuple[str, Callable[[Shell], object]], ...] = (
    ("moving requests", lambda shell: shell.scale(4)),
    ("moving experts", lambda shell: shell.moved()),
    ("some have moved theirs", lambda shell: shell.respread(0, 4)),
    ("fencing", lambda shell: shell.respread(1, 2, 3)),
    ("regrouping", lambda shell: shell.fenced(0, 1, 2, 3)),
    ("resuming", lambda shell: shell.regrouped(0, 1, 2, 3)),
)


@pytest.mark.parametrize("victim", [0, 4])
@pytest.mark.parametrize("steps", range(1, len(DOWN) + 1), ids=[name for name, _ in DOWN])
def test_a_death_on_the_way_down_does_not_prevent_it(steps: int, victim: int) -> None:
    shell = Shell(SINGLE).serve()
    for _, step in DOWN[:steps]:
        step(shell)
    shell.exited(victim)
    shell.settle()
    ended(shell, State.DONE, 4)
    assert shell.serving == [0, 1, 2, 3]
    assert shell.controller.status is Status.OK


def test_those_who_cannot_be_spared_any_more_stay() -> None:
    shell = Shell(MANUAL).serve()
    shell.scale(2)
    shell.exited(0)
    shell.recover(1, 2, 3)
    told = "2 ranks are needed to hold every expert, and 1 would be left; 4 ranks are wanted as before"
    assert ended(shell, State.ROLLED_BACK, 4) == told
    assert shell.serving == [1, 2, 3]
    assert published(shell.actions).draining == ()


@pytest.mark.parametrize(
    ("target", "retire", "said"),
    [
        (1, None, "1 ranks cannot hold 16 experts: the minimum is 2"),
        (7, None, "at most 6 ranks can serve (--max-ranks), not 7"),
        (3, (7,), "retire_ranks: [7] do not serve; [0, 1, 2, 3] do"),
        (2, (1, 1), "retire_ranks: a rank is named twice"),
        (2, (1,), "retire_ranks: 4 ranks serve, so 2 must leave for 2"),
        (3, (1, 2), "retire_ranks: 4 ranks serve, so 1 must leave for 3"),
        (5, (1,), "retire_ranks: 4 ranks serve, so -1 must leave for 5"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(target: int, retire: tuple[int, ...] | None, said: str) -> None:
    shell = Shell(SCALING).serve()
    actions = shell.scale(target, retire)
    assert ended(shell, State.INVALID, 4) == said
    assert {type(action) for action in actions} == {p.RecordEvent, p.OperationChanged}
    assert shell.controller.next_deadline() is None


def test_ranks_that_no_gpu_has_room_for_are_refused() -> None:
    shell = Shell(SCALING, GpuPool(("GPU-a", "GPU-b", "GPU-c", "GPU-d", "GPU-e"), 1, 2.0)).serve()
    assert not of(p.StartRank, shell.scale(6))
    assert ended(shell, State.INVALID, 4) == "2 more ranks need a GPU, and 1 can have one"
    assert [start.gpu for start in of(p.StartRank, shell.scale(5))] == ["GPU-e"]


def test_one_at_a_time() -> None:
    shell = Shell(SCALING).serve()
    shell.scale(5)
    before = len(of(p.StartRank, shell.actions))
    shell.scale(6)
    report = shell.report()
    assert (report.state, report.busy_with) == (State.BUSY, "op-1")
    assert report.message == "operation op-1 is running: starting ranks"
    assert len(of(p.StartRank, shell.actions)) == before
    shell.settle()
    assert (shell.controller.target, stored(shell)) == (5, [5])


def test_it_begins_when_the_recovery_under_way_is_over() -> None:
    shell = Shell(MANUAL).serve()
    shell.exited(3)
    assert not of(p.StartRank, shell.scale(5))
    assert shell.report().phase == "waiting for the recovery under way"
    shell.fenced(0, 1, 2)
    shell.regrouped(0, 1, 2)
    assert [start.rank for start in of(p.StartRank, shell.synced())] == [3, 4]
    shell.settle()
    ended(shell, State.DONE, 5)


def test_it_does_not_begin_once_its_time_is_over() -> None:
    shell = Shell(replace(MANUAL, fence_timeout_s=60.0)).serve()
    shell.exited(3)
    shell.scale(5, timeout_s=1.0)
    shell.tick()
    told = "not done within 1 s, while waiting for the recovery under way; nothing was changed"
    assert ended(shell, State.TIMED_OUT, 4) == told
    assert not of(p.StartRank, shell.recover(0, 1, 2).actions[-20:])


def test_capacity_is_added_to_what_is_unavailable() -> None:
    shell = Shell(MANUAL).serve()
    shell.exited(1, 2, 3)
    shell.fenced(0)
    assert shell.controller.phase is Phase.UNAVAILABLE
    assert [start.rank for start in of(p.StartRank, shell.scale(3))] == [1, 2]
    shell.settle()
    ended(shell, State.DONE, 3)


@pytest.mark.parametrize("target", [3, 6])
def test_a_stop_ends_it(target: int) -> None:
    shell = Shell(SCALING).serve()
    shell.scale(target)
    shell.send(p.StopRequested(5.0))
    assert ended(shell, State.ROLLED_BACK, 4) == "the daemon is stopping"
    shell.scale(5)
    assert ended(shell, State.INVALID, 4) == "the daemon is stopping"
    [exit_] = of(p.Exit, shell.send(p.DrainComplete()))
    assert exit_.code == 0


def test_a_stop_that_undoes_it_while_the_group_changes_is_shown() -> None:
    shell = Shell(SCALING).serve()
    shell.scale(3)
    shell.quiesces = False
    shell.moved()
    assert shell.controller.phase is Phase.QUIESCING
    assert published(shell.actions).status is Status.OK
    shell.send(p.StopRequested(5.0))
    assert published(shell.actions).status is shell.controller.status is Status.DEGRADED


@given(st.frozensets(st.integers(0, 30)), st.integers(0, 10))
def test_lowest_free(taken: frozenset[int], count: int) -> None:
    new = lowest_free(taken, count)
    assert (len(new), sorted(new)) == (count, list(new))
    assert not taken & set(new)
    assert all(rank in taken or rank in new for rank in range(max(new, default=0)))


@given(st.dictionaries(st.integers(0, 9), st.sampled_from(RankState)), st.frozensets(st.integers(0, 9)), st.integers())
def test_victims(states: dict[int, RankState], wanted: frozenset[int], count: int) -> None:
    rows = [Rank(rank, rank, state, 0.0) for rank, state in states.items()]
    leave = victims(rows, wanted, count)
    assert len(leave) == min(max(count, 0), len(wanted))
    assert set(leave) <= wanted and list(leave) == sorted(leave)
    serve = {rank for rank in wanted if states.get(rank) in IN_GROUP}
    assert not serve & set(leave) or not (wanted - serve) - set(leave), "first those that do not serve"
    for state in RankState:
        alike = {rank for rank in wanted if states.get(rank) is state and state in IN_GROUP}
        assert max(alike - set(leave), default=-1) < min(alike & set(leave), default=99), "the highest of equals"
