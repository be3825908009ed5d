"""Copies: enough of each expert, on distinct ranks, and where hosts are known not all on one of them."""

from __future__ import annotations

from typing import Final

import numpy as np

from elastic_daemon.placement.model import EMPTY, FloatArray, IntArray
from elastic_daemon.placement.tables import BoolArray, Tables

NEVER: Final = np.iinfo(np.int64).max

FEW_RANKS: Final = 8
"""Ranks that are looked at first for a copy on another host: nearly always one of them will do."""


def clear_duplicates(tables: Tables) -> None:
    """Empty slots whose expert is in another slot of the same rank: they add nothing. Not where S > E."""
    if tables.table.shape[2] > tables.copies.shape[1]:
        return
    while len(layers := np.flatnonzero((tables.held > 1).any(axis=(1, 2)))):
        rank, expert = np.divmod(
            (tables.held[layers] > 1).reshape(len(layers), -1).argmax(axis=1), tables.held.shape[2]
        )
        slot = (tables.table[layers, rank] == expert[:, None]).argmax(axis=1)
        tables.put(layers, rank, slot, np.full(len(layers), EMPTY))


def raise_copies(tables: Tables, goal: int) -> None:
    """Until every expert is on `goal` ranks: rarest first, then those with least choice of ranks."""
    while len(layers := np.flatnonzero((tables.copies < goal).any(axis=1))):
        copies, ranks = tables.copies[layers], tables.table.shape[1]
        spare = tables.spare(layers, keep=goal)  # never all zero here: N * S >= goal * E
        able = (spare > 0).any(axis=2).astype(np.float32)
        taken: FloatArray = np.einsum("ln,lne->le", able, tables.presence(layers), optimize=True)
        openings = able.sum(axis=1, keepdims=True) - taken  # ranks that can take each expert, [layers, E]
        open_ = (copies < goal) & (openings > 0)
        key = np.where(open_, copies * (ranks + 1) + openings, np.inf)
        some = open_.any(axis=1)
        for index in np.flatnonzero(~some).tolist():
            _move_aside(tables, int(layers[index]), spare[index], goal)
        if some.any():
            _raise_one(tables, layers[some], key[some].argmin(axis=1), spare[some])


def _raise_one(tables: Tables, layers: IntArray, experts: IntArray, spare: IntArray) -> None:
    """One more copy in each layer: over the sparsest slot, on a new host, away from the expert's other partners."""
    shared = tables.shared(layers, experts)
    shared += (shared.max() + 1) * (tables.on_host[layers[:, None], tables.host, experts[:, None]] > 0)
    turns = tables.turns(layers)
    cost = shared * (turns.max() + 1) + turns
    cost[tables.present[layers, :, experts] > 0] = np.inf
    best = np.where(np.isfinite(cost)[:, :, None], spare, 0)
    sparsest = best == best.max(axis=(1, 2), keepdims=True)
    choice = np.where(sparsest, cost[:, :, None], np.inf).reshape(len(layers), -1).argmin(axis=1)
    rank, slot = np.divmod(choice, spare.shape[2])
    tables.put(layers, rank, slot, experts)


def _move_aside(tables: Tables, layer: int, spare: IntArray, goal: int) -> None:
    """Only ranks that hold it already have a slot to spare: move an expert there from a rank that does not hold it.

    One can move: that rank's S experts are distinct, the other has at most S - 1 besides its spare slot.
    """
    held = tables.held[layer]
    expert = int(np.flatnonzero(tables.copies[layer] < goal)[0])
    index, slot = divmod(int(spare.argmax()), spare.shape[1])
    donor = int(np.where(held[:, expert] > 0, NEVER, tables.received).argmin())
    donated = int((held[index, tables.table[layer, donor]] == 0).argmax())
    here = np.array([layer])
    tables.put(here, np.array([index]), np.array([slot]), tables.table[here, donor, donated])
    tables.put(here, np.array([donor]), np.array([donated]), np.array([expert]))


def fill_empty(tables: Tables, load: FloatArray | None) -> None:
    """Every empty slot gets what its rank lacks: the expert with most `load` per copy, without load the rarest.

    Not one that would then be on this host alone, if there is another; among equals one from ranks that this rank
    shares least with.
    """
    while len(layers := np.flatnonzero((tables.table == EMPTY).any(axis=(1, 2)))):
        first = (tables.table[layers] == EMPTY).reshape(len(layers), -1).argmax(axis=1)
        rank, slot = np.divmod(first, tables.table.shape[2])
        present = tables.presence(layers)
        own = tables.present[layers, rank]
        together = np.matmul(present, own[:, :, None])
        shared = np.matmul(together.transpose(0, 2, 1), present)[:, 0]
        if load is None:
            want = -tables.copies[layers].astype(np.float64)
        else:
            want = load[layers] / np.maximum(tables.slots[layers], 1)
        alone = (tables.spans[layers] == 1) & (tables.on_host[layers, tables.host[rank]] > 0)
        avoid = tables.held[layers, rank] * 2 + alone
        want = np.where(avoid == avoid.min(axis=1, keepdims=True), want, -np.inf)
        best = want == want.max(axis=1, keepdims=True)
        tables.put(layers, rank, slot, np.where(best, shared, np.inf).argmin(axis=1))


def spread_over_hosts(tables: Tables, goal: int) -> None:
    """Until no expert has several copies on one host only, or none of those can be helped.

    A confined expert replaces a copy beyond `goal` on another host, or trades places with a copy there. With two
    copies of everything (goal >= 2) that always succeeds if the hosts other than its own have E slots: some expert
    then has two copies there, and either trades one, or has more than `goal`.
    """
    if tables.hosts == 1:
        return
    helpless = np.zeros(tables.copies.shape, dtype=bool)
    while len(layers := np.flatnonzero((todo := tables.confined() & ~helpless).any(axis=1))):
        experts = todo[layers].argmax(axis=1)
        few = _first_away(tables, layers, experts, FEW_RANKS)
        done = _help(tables, layers, experts, few, goal)
        if not done.all():
            layers, experts = layers[~done], experts[~done]
            away = _first_away(tables, layers, experts, len(tables.host))
            helpless[layers, experts] = ~_help(tables, layers, experts, away, goal)


def _first_away(tables: Tables, layers: IntArray, experts: IntArray, number: int) -> IntArray:
    """The first so many ranks in turn, those on other hosts before all others, [len(layers), number]."""
    turns = tables.turns(layers)
    key = turns + (turns.max() + 1) * (tables.on_host[layers[:, None], tables.host, experts[:, None]] > 0)
    return np.argsort(key, axis=1)[:, :number]


def _help(tables: Tables, layers: IntArray, experts: IntArray, ranks: IntArray, goal: int) -> BoolArray:
    """Give confined experts a copy on one of `ranks` [len(layers), any number]; says where that was possible."""
    drop, trade = _away(tables, layers, experts, ranks, goal)
    can_drop = drop.any(axis=(1, 2)) & (goal > 1)  # with less, what is dropped is a second copy
    can_trade = trade.any(axis=(1, 2)) & ~can_drop
    size = trade.shape[1] * trade.shape[2]
    for can, where, place in ((can_drop, drop, _drop), (can_trade, trade, _trade)):
        index, slot = np.divmod(where[can].reshape(-1, size).argmax(axis=1), where.shape[2])
        place(tables, layers[can], experts[can], ranks[can, index], slot)
    return np.asarray(can_drop | can_trade)


def _away(
    tables: Tables, layers: IntArray, experts: IntArray, ranks: IntArray, goal: int
) -> tuple[BoolArray, BoolArray]:
    """Slots of `ranks` [len(layers), ranks, S] on other hosts: those that can be overwritten, or trade places."""
    at, rank = layers[:, None, None], ranks[:, :, None]
    table = tables.table[layers[:, None], ranks]
    here = (tables.on_host[layers, :, experts] > 0).argmax(axis=1)[:, None, None]
    away = tables.host[rank] != here
    can_go = (tables.copies[at, table] > goal) & ~tables.drop_confines(at, table, rank)
    can_go |= tables.held[at, rank, table] > 1
    holders = tables.present[layers, :, experts]
    beside = np.matmul(holders[:, None, :], tables.presence(layers))[:, 0]  # holders of the expert that hold others
    can_come = beside[np.arange(len(layers))[:, None, None], table] < holders.sum(axis=1)[:, None, None]
    can_come &= ~tables.move_confines(at, table, tables.host[rank], here)
    return away & can_go, away & can_come


def _drop(tables: Tables, layers: IntArray, experts: IntArray, rank: IntArray, slot: IntArray) -> None:
    tables.put(layers, rank, slot, experts)


def _trade(tables: Tables, layers: IntArray, experts: IntArray, rank: IntArray, slot: IntArray) -> None:
    other = tables.table[layers, rank, slot]
    can_give = (tables.present[layers, :, experts] > 0) & (tables.present[layers, :, other] == 0)
    source = np.where(can_give, tables.turns(layers), NEVER).argmin(axis=1)
    own = (tables.table[layers, source] == experts[:, None]).argmax(axis=1)
    tables.put(layers, rank, slot, experts)
    tables.put(layers, source, own, other)
