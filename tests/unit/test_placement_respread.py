"""Properties of respreading, which gives experts the most even safety that a group's slots allow."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_daemon.placement import (
    EMPTY,
    NotEnoughSlots,
    Placement,
    SlotLoad,
    Source,
    copies,
    expert_safety,
    initial,
    minimum_ranks,
    missing,
    repair,
    respread,
    slots_per_rank,
    survivable_losses,
)
from tests.unit.placements import (
    check_steps,
    fresh,
    no_deadline,
    placement_of,
    with_members,
)


@no_deadline
@given(with_members())
def test_respread_reaches_the_best_safety_step_by_step(case: tuple[Placement, list[int]]) -> None:
    placement, members = case
    strangers = set(members) - set(placement.ranks)
    start = placement.with_columns(dict.fromkeys(strangers, placement.empty_column())).restricted(members)
    plan = respread(placement, members)
    check_steps(start, plan)
    goal = min(len(members), len(members) * placement.slots_per_rank // placement.experts)
    assert expert_safety(plan.placement) == goal - 1
    assert plan.placement.ranks == tuple(sorted(members))
    assert EMPTY not in plan.placement.physical_to_logical()
    assert respread(placement, reversed(members)) == plan
    assert respread(plan.placement, members).loads == ()
    # Few moves: at most two for each copy that lacked, and one for each slot that was empty, or as good as empty.
    lacking = int(np.maximum(goal - copies(start), 0).sum())
    empty = int((start.physical_to_logical() == EMPTY).sum())
    doubled = start.physical_to_logical().size - empty - int(copies(start).sum())
    assert len(plan.loads) <= 2 * lacking + empty + doubled
    from_disk = {(load.layer, load.expert) for load in plan.loads if load.source is not Source.PEER}
    assert sorted(from_disk) == list(missing(start))


@no_deadline
@given(fresh(max_slots_over=0), st.data())
def test_a_life_of_losses_and_replacements(placement: Placement, data: st.DataObject) -> None:
    """However ranks went and came back, full strength has the safety of the first day."""
    everyone, safety = placement.ranks, expert_safety(placement)
    need = minimum_ranks(placement.experts, placement.slots_per_rank)
    for _ in range(data.draw(st.integers(1, 4))):
        survivors = data.draw(st.permutations(everyone))[: data.draw(st.integers(need, len(everyone)))]
        repaired = repair(placement, survivors).placement
        shrunk = respread(repaired, survivors)
        lacking = np.maximum(expert_safety(shrunk.placement) + 1 - copies(repaired), 0)
        assert len(shrunk.loads) == lacking.sum()  # from tables of our own making every move gains a copy
        grown = respread(shrunk.placement, everyone)
        assert all(load.source is Source.PEER for load in shrunk.loads + grown.loads)
        placement = grown.placement
        assert expert_safety(placement) == safety


def test_respread_moves_an_expert_aside_when_the_free_slot_is_on_the_wrong_rank() -> None:
    # Expert 0 needs a second rank, but the only slot to spare is rank 0's duplicate of it.
    plan = respread(placement_of(3, {0: [0, 0], 1: [1, 2], 2: [1, 2]}), [0, 1, 2])
    assert plan.loads == (
        SlotLoad(rank=0, layer=0, slot=0, expert=1, evicts=0, source=Source.PEER, peer=1),
        SlotLoad(rank=1, layer=0, slot=0, expert=0, evicts=1, source=Source.PEER, peer=0),
    )
    assert expert_safety(plan.placement) == 1


def test_respread_fills_empty_slots_with_what_is_rarest_there() -> None:
    # Expert 0 has two copies already; 1 and 2 come from different ranks, so that rank 3 mirrors neither.
    placement = placement_of(5, {0: [0, 1], 1: [2, 3], 2: [4, 0]})
    assert respread(placement, range(4)).placement.columns[3].tolist() == [[1, 2]]
    # Experts 0 and 1 are rarest, but a second copy on rank 0 would be worth nothing.
    placement = placement_of(4, {0: [0, 1, EMPTY], 1: [2, 3, 0], 2: [2, 3, 0], 3: [2, 3, 1], 4: [2, 3, 1]})
    assert respread(placement, range(5)).placement.columns[0].tolist() == [[0, 1, 2]]


def test_a_joiner_that_loaded_its_column_itself_needs_no_transfer() -> None:
    survivors = initial(experts=16, layers=3, ranks=range(4), slots=8).without([2])
    column = respread(survivors, range(4)).placement.columns[2]
    assert respread(survivors.with_columns({2: column}), range(4)).loads == ()


def test_joiners_do_not_become_mirrors() -> None:
    """Two of four ranks replaced: what one of the old ranks holds is then on both new ones in equal parts."""
    placement = initial(experts=16, layers=2, ranks=range(4), slots=8)
    survivors = repair(placement, [1, 2]).placement
    grown = respread(survivors, range(4)).placement
    for layer in range(2):
        for old, new in itertools.product((1, 2), (0, 3)):
            assert len(set(grown.columns[old][layer]) & set(grown.columns[new][layer])) == 4


def test_the_bundled_model_loses_two_ranks_and_gets_them_back() -> None:
    slots = slots_per_rank(experts=16, ranks=4, survive_losses=2)
    placement = initial(16, 6, range(4), slots)
    assert (slots, expert_safety(placement), survivable_losses(16, 4, slots)) == (8, 1, 2)
    first = repair(placement, [0, 1, 3])
    assert first.loads == ()  # tables alone suffice
    assert expert_safety(first.placement) == 0
    second = repair(first.placement, [1, 3])
    assert len(second.loads) == len(missing(placement.restricted([1, 3]))) > 0
    assert survivable_losses(16, 2, slots) == 0
    with pytest.raises(NotEnoughSlots, match="16 experts need 16 slots per layer, but 1 rank has only 8"):
        repair(second.placement, [3])
    assert expert_safety(respread(second.placement, range(4)).placement) == 1
