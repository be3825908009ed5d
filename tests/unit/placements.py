"""Placements to test with, and what must hold of any plan."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from elastic_daemon.placement import EMPTY, Placement, RepairPlan, Source, initial, minimum_ranks

no_deadline = settings(deadline=None)


def placement_of(experts: int, *layers: Mapping[int, list[int]]) -> Placement:
    """From one {rank: slots} per layer, as a reader would write it down."""
    return Placement(experts, {rank: np.array([layer[rank] for layer in layers]) for rank in layers[0]})


def holders(placement: Placement, layer: int, expert: int) -> set[int]:
    return {rank for rank, column in placement.columns.items() if expert in column[layer]}


def pairs(placement: Placement) -> Iterable[tuple[int, int]]:
    return itertools.product(range(placement.layers), range(placement.experts))


@st.composite
def fresh(draw: st.DrawFn, max_slots_over: int = 2) -> Placement:
    """What `initial` makes of any sizes that fit, on ranks that are not dense."""
    experts = draw(st.integers(1, 14))
    ranks = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True))
    slots = draw(st.integers(-(-experts // len(ranks)), experts + max_slots_over))
    return initial(experts, draw(st.integers(1, 3)), ranks, slots)


@st.composite
def arbitrary(draw: st.DrawFn) -> Placement:
    """Any table whose slots could hold every expert: empty slots, duplicates and missing experts included."""
    experts = draw(st.integers(1, 10))
    ranks = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True))
    slots = draw(st.integers(-(-experts // len(ranks)), experts + 1))
    layers = draw(st.integers(1, 2))
    column = st.lists(
        st.lists(st.integers(EMPTY, experts - 1), min_size=slots, max_size=slots), min_size=layers, max_size=layers
    )
    return Placement(experts, {rank: np.array(draw(column)) for rank in ranks})


@st.composite
def with_survivors(draw: st.DrawFn) -> tuple[Placement, list[int]]:
    """A placement and enough of its ranks, in any order."""
    placement = draw(st.one_of(fresh(), arbitrary()))
    order = draw(st.permutations(placement.ranks))
    need = minimum_ranks(placement.experts, placement.slots_per_rank)
    return placement, list(order[: draw(st.integers(need, len(order)))])


@st.composite
def with_members(draw: st.DrawFn) -> tuple[Placement, list[int]]:
    """A placement and enough ranks to spread over, new ones among them."""
    placement, survivors = draw(with_survivors())
    strangers = [rank for rank in range(12) if rank not in placement.ranks]
    return placement, survivors + draw(st.lists(st.sampled_from(strangers), max_size=3, unique=True))


def check_steps(start: Placement, plan: RepairPlan) -> None:
    """Replay a plan: no load overwrites a last copy, and a peer has what it sends when the layer begins."""
    now, before = start, start
    layer = -1
    for load in plan.loads:
        assert load.layer >= layer
        if load.layer > layer:
            layer, before = load.layer, now
        if load.evicts != EMPTY:
            assert len(holders(now, load.layer, load.evicts)) > 1 or (
                np.count_nonzero(now.columns[load.rank][load.layer] == load.evicts) > 1
            )
        sources = holders(before, load.layer, load.expert)
        if load.source is Source.PEER:
            assert load.peer in sources
        else:
            assert load.peer is None
            assert not sources
        now = now.after([load])
        assert load.evicts == EMPTY or holders(now, load.layer, load.evicts)
    assert now == plan.placement
    for load in plan.loads:  # no second copy on a rank, unless there was one
        doubled = np.count_nonzero(now.columns[load.rank][load.layer] == load.expert)
        had = np.count_nonzero(start.columns[load.rank][load.layer] == load.expert)
        assert doubled <= max(int(had), 1) or start.slots_per_rank > start.experts
    assert RepairPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
