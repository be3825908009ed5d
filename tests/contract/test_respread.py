"""Experts move among ranks of a real gloo group that step meanwhile."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from vllm.config import ParallelConfig
from vllm.distributed.eplb.eplb_state import EplbModelState

from elastic_daemon.engine.eplb import ElasticEplbState
from elastic_daemon.engine.experts import SlotContent
from elastic_daemon.placement import Placement, initial
from elastic_daemon.processes.messages import Message
from tests.contract.group_ranks import RankProcess, Ranks, all_do, build, checked, running
from tests.contract.respread_ranks import EPOCH, ServingRank

pytestmark = pytest.mark.contract

EXPERTS, LAYERS, SLOTS = 6, 3, 4
HELD = initial(EXPERTS, LAYERS, (0, 2, 5), SLOTS)
WANTED = Placement(EXPERTS, dict(zip(HELD.ranks, np.roll(list(HELD.columns.values()), 1, axis=0), strict=True)))


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with running() as ranks:
        yield ranks


@pytest.fixture
def group(ranks: Ranks) -> list[RankProcess]:
    group = ranks.spawn(len(HELD.ranks), ServingRank)
    build(group, "respread")
    all_do(group, "hold_experts", HELD)
    return group


def respread(serial: int, placement: Placement, epoch: int = EPOCH) -> Message:
    return {"type": "respread", "epoch": epoch, "serial": serial, "placement": placement.to_json()}


def order(rank: RankProcess, message: Message) -> None:
    assert rank.ask_meanwhile("order", message).error is None


def state(rank: RankProcess) -> dict[str, Any]:
    found: dict[str, Any] = checked(rank.ask_meanwhile("state"))
    return found


def step_on(rank: RankProcess, steps: int = 20) -> None:
    """Wait until it has done so many more steps."""
    goal, deadline = state(rank)["steps"] + steps, time.monotonic() + 20
    while state(rank)["steps"] < goal:
        assert time.monotonic() < deadline, "it steps no more"


def finish(group: list[RankProcess]) -> None:
    for rank in group:
        rank.ask_meanwhile("finish_requests")
    assert len({checked(rank.answer()) for rank in group}) == 1, "all stop at the same step"


def assert_all_hold(group: list[RankProcess], placement: Placement) -> None:
    for rank, column in zip(group, placement.columns.values(), strict=True):
        found = state(rank)
        assert found["column"] == column.tolist()
        assert found["table"] == placement.physical_to_logical().tolist()
        assert found["right"]
        assert not found["postponed"]


def test_nothing_moves_before_the_last_rank_holds_the_plan_then_all_move_together(group: list[RankProcess]) -> None:
    for rank in group:
        rank.start("serve")
    for rank in group[:-1]:
        order(rank, respread(1, WANTED))
        step_on(rank)
    assert all(not state(rank)["sent"] for rank in group)
    order(group[-1], respread(1, WANTED))
    step_on(group[0])
    finish(group)
    assert_all_hold(group, WANTED)
    for rank in group:
        found = state(rank)
        (done,) = found["sent"]
        assert (done["type"], done["epoch"], done["serial"]) == ("respread_done", EPOCH, 1)
        assert done["column"] == found["column"]
        assert done["bytes"] > 0
        assert found["window"] == 0, "load was counted for slots that hold other experts now"


def test_idle_ranks_run_until_all_is_moved_and_no_longer(group: list[RankProcess]) -> None:
    """Nobody has a request. The plan reaches one rank first: it steps, and waits in its collective for the others."""
    all_do(group, "finish_requests")
    for rank in group:
        order(rank, respread(1, WANTED))
        rank.start("serve")
        time.sleep(0.1)  # it is in its first step then, alone; that it need not be makes the test no weaker
    assert {checked(rank.answer()) for rank in group} == {LAYERS + 1}
    assert_all_hold(group, WANTED)


def test_a_rank_without_the_plan_keeps_all_running_until_it_has_it(group: list[RankProcess]) -> None:
    all_do(group, "finish_requests")
    order(group[0], respread(1, WANTED))
    for rank in group:
        rank.start("serve")
    step_on(group[1])
    for rank in group[1:]:
        order(rank, respread(1, WANTED))
    assert len({checked(rank.answer()) for rank in group}) == 1
    assert_all_hold(group, WANTED)


def test_the_newest_plan_counts_and_one_after_another(group: list[RankProcess]) -> None:
    for rank in group:
        rank.start("serve")
    order(group[0], respread(1, HELD))
    order(group[1], respread(1, HELD))
    for rank in group:
        order(rank, respread(2, WANTED))  # the last one never sees plan 1
    step_on(group[0])
    for rank in group:
        order(rank, respread(3, HELD))
    step_on(group[0])
    finish(group)
    assert_all_hold(group, HELD)
    assert [[done["serial"] for done in state(rank)["sent"]] for rank in group] == [[2, 3]] * len(group)


def test_plans_of_another_epoch_or_size_are_not_followed(group: list[RankProcess]) -> None:
    for rank in group:
        order(rank, respread(1, WANTED, epoch=EPOCH + 1))
        order(rank, respread(2, WANTED.without(WANTED.ranks[:1])))
        rank.start("serve")
    finish(group)
    assert_all_hold(group, HELD)
    assert all(not state(rank)["sent"] for rank in group)


def test_balancing_moves_a_layer_after_each_step_and_then_a_waiting_plan(group: list[RankProcess]) -> None:
    all_do(group, "finish_requests")
    all_do(group, "balance_in_step", 1, WANTED)
    for rank in group:
        order(rank, respread(1, HELD))
        rank.start("serve")
    assert {checked(rank.answer()) for rank in group} == {LAYERS + LAYERS}
    assert_all_hold(group, HELD)
    for rank in group:
        column, done = state(rank)["sent"]
        assert (column["type"], column["epoch"]) == ("column", EPOCH)
        assert column["column"] == WANTED.columns[WANTED.ranks[group.index(rank)]].tolist()
        assert (done["type"], done["serial"]) == ("respread_done", 1)


@pytest.mark.parametrize("after_layers", range(LAYERS))
def test_a_death_leaves_each_layer_whole(group: list[RankProcess], after_layers: int) -> None:
    """The last rank makes no further step once `after_layers` layers have moved, and is killed. In a ring of three all
    are its neighbours, whom gloo tells."""
    all_do(group, "finish_requests")
    for rank in group:
        order(rank, respread(1, WANTED))
    for rank in group[:-1]:
        rank.start("serve")
    group[-1].start("serve_steps", 1 + after_layers)
    checked(group[-1].answer())
    group[-1].kill()
    for rank in group[:-1]:
        assert rank.answer().peer_fault
        found = state(rank)
        assert found["right"], "a slot does not hold what its table says"
        moved, held = WANTED.physical_to_logical().tolist(), HELD.physical_to_logical().tolist()
        assert found["table"] == moved[:after_layers] + held[after_layers:]
        assert not found["sent"]
        rank.ask_meanwhile("void")
        assert not state(rank)["postponed"]


def test_without_a_plan_the_answer_is_that_of_vllm(ranks: Ranks) -> None:
    group = ranks.spawn(2, ServingRank)
    build(group, "sync")
    for said in itertools.product(itertools.product((False, True), repeat=2), repeat=2):
        for rank, (unfinished, pausing) in zip(group, said, strict=True):
            rank.start("sync_as_vllm", unfinished, pausing)
        for rank in group:
            theirs, ours = checked(rank.answer())
            assert ours == theirs, said


@pytest.mark.parametrize("said", [(False, False), (True, False), (False, True), (True, True)])
def test_ranks_stand_still_when_all_were_told_and_step_until_then(ranks: Ranks, said: tuple[bool, bool]) -> None:
    group = ranks.spawn(2, ServingRank)
    build(group, "quiesce")
    for rank, quiescing in zip(group, said, strict=True):
        rank.start("sync_quiescing", quiescing)
    for rank in group:
        running, quiet = checked(rank.answer())
        assert (running, quiet) == (any(said), all(said))


def test_a_slot_that_was_loaded_is_in_the_column_at_once() -> None:
    """Whatever becomes of the regroup that it was loaded for."""
    state = ElasticEplbState(ParallelConfig(), torch.device("cpu"))
    table = torch.from_numpy(HELD.physical_to_logical())
    state.model_states["model"] = cast(EplbModelState, SimpleNamespace(physical_to_logical_map=table))
    state.loaded(1, SLOTS, [SlotContent(2, 3, 77)])
    expected = HELD.columns[HELD.ranks[1]].copy()
    expected[2, 3] = 77
    assert state.column(1, SLOTS).tolist() == expected.tolist()
    assert state.column(0, SLOTS).tolist() == HELD.columns[HELD.ranks[0]].tolist()


def test_balancing_waits_while_experts_move_for_another_reason() -> None:
    state = ElasticEplbState(ParallelConfig(), torch.device("cpu"))
    state.model_states["one that nothing can be asked of"] = cast(EplbModelState, None)
    with pytest.raises(AttributeError):
        state.rearrange()
    state.postponed = True
    state.rearrange()
