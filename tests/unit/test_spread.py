"""When experts are spread anew or copied to host memory, and what comes of it. How they move: test_respreading.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from elastic_daemon import protocol as p
from elastic_daemon.control.control_state import Phase
from elastic_daemon.control.policy import Policy
from elastic_daemon.membership import RankState
from elastic_daemon.placement import Placement, Source, copies
from tests.unit.driver import LAYERS, POLICY, Shell, events, of

SPREADING = replace(POLICY, target=5, respread=True)
"""Five ranks with 40 slots for 16 experts: after a loss some have a single copy, and there is room for two of each."""
COPYING = replace(POLICY, slots=6, host_copies=True)
"""Four ranks with 24 slots for 16 experts: some have a single copy, always."""


def safety(shell: Shell) -> int | None:
    return shell.controller.snapshot(shell.now).expert_safety


def after_a_loss(policy: Policy = SPREADING) -> Shell:
    shell = Shell(policy).serve().settle()
    shell.exited(2)
    return shell.recover(0, 1, 3, 4)


def spreading() -> Shell:
    """Four of five ranks have just been told to move experts."""
    shell = after_a_loss()
    assert [move.rank for move in of(p.Respread, shell.tick())] == [0, 1, 3, 4]
    return shell


def singles(placement: Placement) -> set[tuple[int, int]]:
    return {(layer, expert) for layer, expert in np.argwhere(copies(placement) == 1).tolist()}


def stores(shell: Shell) -> list[tuple[int, int]]:
    """(layer, expert) of all copies that were asked for."""
    return [(layer, expert) for store in of(p.StoreExperts, shell.actions) for layer, _, expert in store.experts]


def test_after_a_loss_copies_are_spread_anew_while_it_serves() -> None:
    shell = after_a_loss()
    began, before = shell.now, safety(shell)
    moves = of(p.Respread, shell.tick())
    assert shell.now == began + SPREADING.spread_delay_s, "requests come first"
    assert [(move.rank, move.epoch, move.serial) for move in moves] == [(rank, 2, 1) for rank in (0, 1, 3, 4)]
    assert (before, safety(shell)) == (0, 0), "what is planned is not there yet"
    assert copies(moves[0].placement).min() == 2
    shell.respread(0, 1, 3)
    assert events("experts_spread", shell.actions) == []
    shell.now += 0.75
    shell.respread(4)
    assert safety(shell) == 1
    [done] = events("experts_spread", shell.actions)
    assert done == {"epoch": 2, "purpose": "safety", "bytes": 40, "seconds": 0.75}
    assert shell.controller.phase is Phase.SERVING
    assert shell.controller.next_deadline() is None, "once"


def test_after_a_join_too() -> None:
    shell = Shell(replace(SPREADING, target=3)).serve().settle()
    assert safety(shell) == 0, "three ranks have no room for two copies of each"
    shell.scale(4)
    shell.settle()
    assert shell.report().state is p.OperationState.DONE
    assert [event["purpose"] for event in events("spreading_experts", shell.actions)] == ["safety"]
    assert safety(shell) == 1


def test_where_nothing_would_be_better_nothing_moves() -> None:
    shell = Shell(replace(POLICY, respread=True)).serve().settle()
    assert not of(p.Respread, shell.actions)


def test_off_means_that_copies_stay_where_they_are() -> None:
    shell = after_a_loss(replace(SPREADING, respread=False))
    assert shell.controller.next_deadline() is None


def test_a_new_epoch_voids_it_and_it_is_planned_anew() -> None:
    shell = spreading()
    shell.respread(0)
    late = [p.RankRespread(*shell.identity(rank), 2, 1, shell.column(rank), 0.1, 10) for rank in (1, 3, 4)]
    shell.fault(1)
    shell.tick()
    assert (shell.controller.epoch, "experts to be spread" in shell.controller.describe()) == (3, False)
    shell.recover(0, 1, 3, 4)
    shell.send(*late)
    moves = of(p.Respread, shell.tick())
    assert [(move.rank, move.epoch, move.serial) for move in moves] == [(rank, 3, 2) for rank in (0, 1, 3, 4)]
    shell.send(*late)
    assert events("experts_spread", shell.actions) == []
    shell.settle()
    assert (len(events("experts_spread", shell.actions)), safety(shell)) == (1, 1)


def test_ranks_that_take_too_long_are_not_waited_for() -> None:
    shell = spreading()
    began = shell.now
    shell.respread(0, 3)
    shell.tick()
    assert shell.now == began + SPREADING.spread_timeout_s
    assert events("spread_late", shell.actions) == [{"epoch": 2, "purpose": "safety", "ranks": [1, 4]}]
    assert not of(p.Fence, shell.actions[-5:]) and shell.controller.phase is Phase.SERVING
    assert safety(shell) == 0
    shell.respread(1, 4)
    assert events("experts_spread", shell.actions) == []
    assert safety(shell) == 1, "what they say they hold is true all the same"


def test_what_balancing_moves_is_known() -> None:
    shell = Shell().serve()
    assert safety(shell) == 1
    column = tuple((0,) * 8 for _ in range(LAYERS))
    shell.send(p.ColumnChanged(*shell.identity(2), 1, column))
    assert safety(shell) == 0
    shell.send(p.ColumnChanged(*shell.identity(2), 1, shell.column(2)))
    assert safety(shell) == 1
    shell.send(p.ColumnChanged(*shell.identity(2), 1, ((99,) * 8,) * LAYERS))
    shell.send(p.ColumnChanged(*shell.identity(2), 0, column))
    assert safety(shell) == 1, "neither nonsense nor what was said in another epoch counts"


def test_it_waits_for_who_is_leaving() -> None:
    shell = after_a_loss()
    shell.order(p.RankDeed.DRAIN, 4)
    assert not of(p.Respread, shell.tick())
    shell.moved()
    assert [event["purpose"] for event in events("spreading_experts", shell.actions)] == ["evacuation"]
    shell.respread(0, 1, 3, 4)
    shell.recover(0, 1, 3)
    assert (shell.state(4), shell.report().state) == (RankState.EXCLUDED, p.OperationState.DONE)


def test_who_leaves_takes_the_place_of_a_spread_under_way() -> None:
    shell = spreading()
    shell.order(p.RankDeed.DRAIN, 4)
    moves = of(p.Respread, shell.moved())
    assert {move.serial for move in moves} == {2}
    held = [p.RankRespread(*shell.identity(rank), 2, 1, shell.column(rank), 0.1, 10) for rank in (0, 1, 3, 4)]
    assert not of(p.Fence, shell.send(*held)), "that is about the one before"
    assert len(of(p.Fence, shell.respread(0, 1, 3, 4))) == 3
    assert [event["purpose"] for event in events("experts_spread", shell.actions)] == ["evacuation"]


def test_who_stays_after_all_has_copies_spread_anew() -> None:
    shell = spreading()
    shell.respread(0, 1, 3, 4)
    shell.order(p.RankDeed.DRAIN, 1, timeout_s=5.0)
    shell.tick()
    assert shell.report().state is p.OperationState.TIMED_OUT
    assert "a quiet moment to spread experts" in shell.controller.describe()


def test_experts_with_a_single_copy_get_one_in_host_memory() -> None:
    shell = Shell(COPYING).serve()
    shell.tick()
    assert set(stores(shell)) == singles(shell.first_placement()) != set()
    assert len(stores(shell)) == len(set(stores(shell))), "one rank stores it"
    for store in of(p.StoreExperts, shell.actions):
        for layer, slot, expert in store.experts:
            assert shell.columns[store.rank][layer][slot] == expert
    assert safety(shell) == 0
    for store in of(p.StoreExperts, shell.actions):
        shell.stored(store)
    assert safety(shell) == 1, "they count"
    assert sum(event["experts"] for event in events("experts_stored", shell.actions)) == len(stores(shell))


def test_each_is_made_once() -> None:
    shell = Shell(COPYING).serve().settle()
    made = stores(shell)
    shell.fault(1)
    shell.tick()
    shell.recover(0, 1, 2, 3).settle()
    assert (shell.controller.epoch, stores(shell)) == (2, made)


def test_they_are_made_after_experts_were_spread() -> None:
    shell = after_a_loss(replace(SPREADING, host_copies=True))
    [move, *_] = of(p.Respread, shell.tick())
    last = next(rank for rank in (0, 1, 3, 4) if (move.placement.columns[rank] != shell.columns[rank]).any())
    shell.respread(*{0, 1, 3, 4} - {last})
    assert stores(shell) == []
    unmoved = p.RankRespread(*shell.identity(last), 2, move.serial, shell.column(last), 0.1, 0)
    assert of(p.StoreExperts, shell.send(unmoved))
    assert safety(shell) == 0
    assert safety(shell.settle()) == 1


def test_they_are_made_where_copies_are_not_spread_too() -> None:
    shell = after_a_loss(replace(SPREADING, respread=False, host_copies=True)).settle()
    assert not of(p.Respread, shell.actions)
    assert stores(shell)
    assert safety(shell) == 1


def test_a_lost_expert_comes_back_from_host_memory() -> None:
    shell = Shell(COPYING).serve().settle()
    held = singles(shell.first_placement())
    lost = {key for key in held if key[1] in shell.columns[2][key[0]]}
    assert lost
    shell.exited(2)
    shell.fenced(0, 1, 3)
    loads = [load for regroup in of(p.Regroup, shell.actions)[-3:] for load in regroup.loads]
    assert {(load.layer, load.expert): load.source for load in loads} == dict.fromkeys(lost, Source.HOST)


def test_a_copy_that_cannot_be_used_is_forgotten_and_made_again() -> None:
    shell = Shell(COPYING).serve().settle()
    shell.exited(2)
    shell.fenced(0, 1, 3)
    load = next(load for regroup in of(p.Regroup, shell.actions)[-3:] for load in regroup.loads)
    bad = (load.layer, load.expert)
    shell.send(p.RankRegrouped(*shell.identity(load.rank), 2, {}, {}, (bad,)))
    shell.regroup_failed(next(rank for rank in (0, 1, 3) if rank != load.rank))
    shell.fenced(0, 1, 3)  # nothing of it is in the slots
    sources = {(load.layer, load.expert): load.source for r in of(p.Regroup, shell.actions)[-3:] for load in r.loads}
    assert sources.pop(bad) is Source.CHECKPOINT
    assert set(sources.values()) == {Source.HOST}
    shell.settle()
    assert stores(shell).count(bad) == 2


def test_off_means_none() -> None:
    shell = Shell(replace(COPYING, host_copies=False)).serve().settle()
    shell.exited(2)
    shell.fenced(0, 1, 3)
    loads = [load for regroup in of(p.Regroup, shell.actions)[-3:] for load in regroup.loads]
    assert {load.source for load in loads} == {Source.CHECKPOINT}
    assert not of(p.StoreExperts, shell.settle().actions)


def test_experts_that_balancing_leaves_alone_get_one() -> None:
    shell = Shell(replace(POLICY, host_copies=True)).serve().settle()
    assert stores(shell) == [], "each has two"
    column = tuple((0,) * 8 for _ in range(LAYERS))
    shell.send(p.ColumnChanged(*shell.identity(2), 1, column))
    shell.send(p.ColumnChanged(*shell.identity(2), 1, column))
    began = shell.now
    assert stores(shell) == []
    shell.tick()
    assert shell.now == began + POLICY.spread_delay_s
    lost = {(layer, expert) for layer, row in enumerate(shell.column(2)) for expert in row if expert}
    assert set(stores(shell)) == lost and len(stores(shell)) == len(lost)


def test_so_do_those_of_a_spread_that_is_late() -> None:
    shell = after_a_loss(replace(SPREADING, host_copies=True))
    assert of(p.Respread, shell.tick())
    shell.tick()
    assert events("spread_late", shell.actions) and stores(shell) == []
    shell.tick()
    assert stores(shell)
