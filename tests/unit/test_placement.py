"""Properties of placement.py, checked against brute force where the sizes allow, and small examples by hand."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_daemon.placement import (
    EMPTY,
    NotEnoughSlots,
    Placement,
    PlacementError,
    SlotLoad,
    Source,
    copies,
    expert_safety,
    initial,
    minimum_ranks,
    missing,
    repair,
    slots_per_rank,
    survivable_losses,
)
from tests.unit.placements import (
    arbitrary,
    check_steps,
    fresh,
    holders,
    no_deadline,
    pairs,
    placement_of,
    with_survivors,
)


@given(st.integers(1, 300), st.integers(1, 80), st.data())
def test_slots_per_rank_is_the_least_that_survives(experts: int, ranks: int, data: st.DataObject) -> None:
    losses = data.draw(st.integers(0, ranks - 1))
    slots = slots_per_rank(experts, ranks, losses)
    assert (ranks - losses) * slots >= experts > (ranks - losses) * (slots - 1)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 60))
def test_reserves_match_brute_force(experts: int, ranks: int, slots: int) -> None:
    able = [left for left in range(1, experts + 1) if left * slots >= experts]
    assert minimum_ranks(experts, slots) == able[0]
    losses = [lost for lost in range(ranks) if (ranks - lost) * slots >= experts]
    assert survivable_losses(experts, ranks, slots) == (losses[-1] if losses else -1)


@pytest.mark.parametrize("losses", [-1, 4, 5])
def test_slots_per_rank_refuses_impossible_losses(losses: int) -> None:
    with pytest.raises(ValueError, match=f"4 ranks can survive 0 to 3 losses, not {losses}"):
        slots_per_rank(16, 4, losses)


@pytest.mark.parametrize(("experts", "slots"), [(0, 1), (1, 0)])
def test_counts_are_positive(experts: int, slots: int) -> None:
    with pytest.raises(PlacementError, match="must be at least 1, got 0"):
        minimum_ranks(experts, slots)


def test_physical_ids_follow_dense_rank_order() -> None:
    placement = placement_of(4, {5: [3, 0], 0: [0, 1], 2: [2, 3]}, {5: [1, 2], 0: [3, EMPTY], 2: [0, 1]})
    assert placement.ranks == (0, 2, 5)
    assert (placement.layers, placement.slots_per_rank) == (2, 2)
    assert placement.physical_to_logical().tolist() == [[0, 1, 2, 3, 3, 0], [3, EMPTY, 0, 1, 1, 2]]


def test_subsets_and_replacements() -> None:
    placement = placement_of(3, {0: [0, 1], 4: [1, 2], 7: [2, 0]})
    assert placement.without([4, 9]) == placement.restricted([7, 0]) == placement_of(3, {0: [0, 1], 7: [2, 0]})
    grown = placement.without([4]).with_columns({4: placement.empty_column()})
    assert grown.columns[4].tolist() == [[EMPTY, EMPTY]]
    with pytest.raises(PlacementError, match=r"ranks \[5\] hold nothing here; known are \[0, 4, 7\]"):
        placement.restricted([0, 5])
    with pytest.raises(PlacementError, match="no ranks"):
        placement.without([0, 4, 7])


def test_after_refuses_a_plan_made_for_other_tables() -> None:
    placement = placement_of(3, {0: [0, 1], 4: [1, 2]})
    fits = SlotLoad(rank=4, layer=0, slot=0, expert=0, evicts=1, source=Source.PEER, peer=0)
    assert placement.after([fits]) == placement_of(3, {0: [0, 1], 4: [0, 2]})
    with pytest.raises(PlacementError, match="finds 0 in its slot"):
        placement.after([fits, fits])
    with pytest.raises(PlacementError, match="finds None in its slot"):
        placement.without([4]).after([fits])


def test_columns_are_copied_and_read_only() -> None:
    mine = np.array([[0, 1]])
    placement = Placement(2, {0: mine})
    mine[0, 0] = 1
    assert placement.columns[0].tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="read-only"):
        placement.columns[0][0, 0] = 1


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "no ranks"),
        ({0: [[0, 1]], 1: [[0]]}, "one shape"),
        ({0: [[0, 2]]}, r"rank 0 holds ids outside -1\.\.1"),
        ({0: [[-2, 0]]}, r"rank 0 holds ids outside -1\.\.1"),
        ({3: [[0.0, 1.0]]}, "rank 3: want integers"),
        ({0: [0, 1]}, "rank 0: want integers"),
        ({0: [[], []]}, "rank 0: want integers"),
        ({0: [[0, 1], [0]]}, "rank 0: "),
        ({-1: [[0, 1]]}, "rank -1: "),
    ],
)
def test_placement_refuses_nonsense(columns: dict[int, list[list[int]]], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        Placement.from_json({"experts": 2, "columns": columns})


@given(st.one_of(fresh(), arbitrary()))
def test_json_round_trip_and_equality(placement: Placement) -> None:
    again = Placement.from_json(json.loads(json.dumps(placement.to_json())))
    assert again == placement
    assert hash(again) == hash(placement)
    assert all(column.dtype == np.int64 for column in again.columns.values())
    rank = placement.ranks[0]
    changed = placement.columns[rank].copy()
    changed[0, 0] = EMPTY if changed[0, 0] != EMPTY else 0
    assert placement.with_columns({rank: changed}) != placement
    assert Placement(placement.experts + 1, placement.columns) != placement
    assert placement != "something else"


@given(arbitrary())
def test_copies_and_missing_count_ranks_not_slots(placement: Placement) -> None:
    counted = {pair: len(holders(placement, *pair)) for pair in pairs(placement)}
    assert {(layer, expert): n for (layer, expert), n in np.ndenumerate(copies(placement))} == counted
    assert missing(placement) == tuple(pair for pair, number in counted.items() if number == 0)


@no_deadline
@given(st.one_of(fresh(), arbitrary()), st.data())
def test_expert_safety_matches_brute_force(placement: Placement, data: st.DataObject) -> None:
    host = data.draw(st.sets(st.sampled_from(list(pairs(placement)))))

    def no_disk_read_after(losses: int) -> bool:
        return all(
            pair in host or holders(placement, *pair) - set(lost)
            for lost in itertools.combinations(placement.ranks, losses)
            for pair in pairs(placement)
        )

    survived = itertools.takewhile(no_disk_read_after, range(len(placement.ranks)))
    assert expert_safety(placement, host) == max(survived, default=-1)


def test_expert_safety_by_hand() -> None:
    placement = placement_of(3, {0: [0, 1], 2: [1, 2], 5: [0, 1]})
    assert expert_safety(placement) == 0  # expert 2 is on one rank
    assert expert_safety(placement, {(0, 2)}) == 1
    assert expert_safety(placement, {(0, 0), (0, 1), (0, 2)}) == 2
    assert expert_safety(placement.without([2])) == -1
    assert expert_safety(placement.without([2]), [(0, 2)]) == 1


@given(fresh())
def test_initial_fills_evenly_with_copies_on_distinct_ranks(placement: Placement) -> None:
    distinct, slots, experts = copies(placement), placement.slots_per_rank, placement.experts
    assert missing(placement) == ()
    for layer, row in enumerate(placement.physical_to_logical()):
        total = np.bincount(row, minlength=experts)  # fails on an empty slot
        assert total.max() - total.min() <= 1
        if slots <= experts:
            assert distinct[layer].tolist() == total.tolist()
        else:
            assert set(distinct[layer].tolist()) == {len(placement.ranks)}


@given(st.integers(1, 40), st.integers(2, 9), st.data())
def test_initial_has_no_mirror_partner(experts: int, ranks: int, data: st.DataObject) -> None:
    """The load of a lost rank's replicated experts falls on all others about alike."""
    slots = data.draw(st.integers(-(-experts // ranks), max(experts, -(-experts // ranks))))
    placement = initial(experts, 2, range(ranks), slots)
    for layer, lost in itertools.product(range(2), placement.ranks):
        load = dict.fromkeys(placement.ranks, 0.0)
        replicated = 0
        for expert in placement.columns[lost][layer].tolist():
            others = holders(placement, layer, expert) - {lost}
            replicated += bool(others)
            for rank in others:
                load[rank] += 1 / len(others)
        fair = -(-replicated // (ranks - 1))
        assert max(load.values()) <= fair + 2


def test_initial_varies_which_experts_get_the_extra_copy() -> None:
    placement = initial(experts=256, layers=4, ranks=range(72), slots=4)  # the 256 + 32 of production layouts
    extra = copies(placement) == 2
    assert extra.sum(axis=1).tolist() == [32] * 4
    assert extra.any(axis=0).sum() == 4 * 32


def test_initial_refuses_too_few_slots_and_repeated_ranks() -> None:
    with pytest.raises(NotEnoughSlots, match="16 experts need 16 slots per layer, but 3 ranks have only 15") as caught:
        initial(16, 1, [0, 1, 2], 5)
    assert (caught.value.needed, caught.value.available) == (16, 15)
    with pytest.raises(PlacementError, match="distinct"):
        initial(2, 1, [0, 0], 2)
    with pytest.raises(NotEnoughSlots):
        initial(2, 1, [], 2)


@no_deadline
@given(with_survivors(), st.data())
def test_repair_restores_coverage_with_fewest_loads(case: tuple[Placement, list[int]], data: st.DataObject) -> None:
    placement, survivors = case
    host = data.draw(st.sets(st.sampled_from(list(pairs(placement)))))
    start = placement.restricted(survivors)
    plan = repair(placement, survivors, host)
    check_steps(start, plan)
    assert plan.placement.ranks == tuple(sorted(survivors))
    assert missing(plan.placement) == ()
    assert sorted((load.layer, load.expert) for load in plan.loads) == list(missing(start))
    for load in plan.loads:
        assert load.source is (Source.HOST if (load.layer, load.expert) in host else Source.CHECKPOINT)
    changed = {
        (rank, layer, slot)
        for rank in start.ranks
        for layer, slot in np.argwhere(start.columns[rank] != plan.placement.columns[rank]).tolist()
    }
    assert changed == {(load.rank, load.layer, load.slot) for load in plan.loads}
    assert repair(placement, reversed(survivors), sorted(host)) == plan


@no_deadline
@given(with_survivors())
def test_repair_takes_from_what_there_is_most_of(case: tuple[Placement, list[int]]) -> None:
    placement, survivors = case
    start, plan = placement.restricted(survivors), repair(placement, survivors)
    before, left = copies(start), copies(plan.placement)
    for load in plan.loads:
        if load.evicts == EMPTY or load.evicts in plan.placement.columns[load.rank][load.layer]:
            continue  # that cost no copy
        assert before[load.layer].max() >= 2
        assert left[load.layer].max() <= left[load.layer, load.evicts] + 1
        for column in plan.placement.columns.values():
            assert EMPTY not in column[load.layer]
            assert len(set(column[load.layer].tolist())) == placement.slots_per_rank


@no_deadline
@given(with_survivors())
def test_repair_balances_loads(case: tuple[Placement, list[int]]) -> None:
    """No load could go to a rank with two fewer loads that holds another copy of the evicted expert."""
    placement, survivors = case
    plan = repair(placement, survivors)
    count = Counter(load.rank for load in plan.loads)
    for load in plan.loads:
        remaining = holders(plan.placement, load.layer, load.evicts)
        if load.evicts != EMPTY and load.rank not in remaining:
            assert count[load.rank] - min(count[rank] for rank in remaining) <= 1


@no_deadline
@given(fresh(max_slots_over=0), st.data())
def test_random_losses_are_survived_until_slots_run_out(placement: Placement, data: st.DataObject) -> None:
    budget = survivable_losses(placement.experts, len(placement.ranks), placement.slots_per_rank)
    order = data.draw(st.permutations(placement.ranks))
    for losses, _ in enumerate(order, start=1):
        survivors = order[losses:]
        if losses > budget:
            with pytest.raises(NotEnoughSlots):
                repair(placement, survivors)
            return
        placement = repair(placement, survivors).placement
        assert missing(placement) == ()


def test_repair_by_hand() -> None:
    # Rank 2 takes expert 3 with it. Expert 1 has three copies left, 0 has two, 2 has one.
    placement = placement_of(4, {0: [0, 1], 1: [0, 1], 2: [3, 0], 3: [2, 1]})
    plan = repair(placement, [3, 0, 1])
    assert plan.loads == (SlotLoad(rank=0, layer=0, slot=1, expert=3, evicts=1, source=Source.CHECKPOINT),)
    assert plan.placement == placement_of(4, {0: [0, 3], 1: [0, 1], 3: [2, 1]})
    assert repair(placement, [0, 1, 3], host_copies={(0, 3)}).loads[0].source is Source.HOST
    assert repair(placement, [0, 2, 3]).loads == ()


def test_repair_revises_early_choices_that_unbalance_it() -> None:
    # Expert 2 is lost in three layers. Rank 0 could take each, rank 1 only the first, rank 2 only the others.
    first, other = {0: [0], 1: [0], 2: [1], 5: [2]}, {0: [0], 1: [1], 2: [0], 5: [2]}
    plan = repair(placement_of(3, first, other, other), [0, 1, 2])
    assert Counter(load.rank for load in plan.loads) == {0: 1, 1: 1, 2: 1}


def test_repair_prefers_duplicates_within_a_rank_to_balance() -> None:
    layer = {0: [0, 0], 1: [0, 1], 2: [2, 1]}
    plan = repair(placement_of(3, layer, layer), [0, 1])
    assert [(load.rank, load.evicts) for load in plan.loads] == [(0, 0), (0, 0)]
    assert expert_safety(plan.placement, {(0, 1), (0, 2), (1, 1), (1, 2)}) == 1  # expert 0 kept both its ranks


def test_repair_refuses_strangers_and_nobody() -> None:
    placement = placement_of(2, {0: [0, 1], 1: [1, 0]})
    with pytest.raises(PlacementError, match="known are"):
        repair(placement, [0, 7])
    with pytest.raises(NotEnoughSlots, match="0 ranks have only 0"):
        repair(placement, [])


def test_repair_of_a_production_layout_spreads_its_loads() -> None:
    placement = initial(experts=256, layers=8, ranks=range(72), slots=5)
    survivors = [rank for rank in range(72) if rank not in (0, 17, 18, 55)]
    plan = repair(placement, survivors)
    assert len(plan.loads) == len(missing(placement.restricted(survivors))) > 0
    count = Counter(load.rank for load in plan.loads)
    assert max(count.values()) - min(count[rank] for rank in survivors) <= 1
