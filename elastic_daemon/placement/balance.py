"""Load: how evenly a placement spreads it, and few moves that spread it better.

The slots that hold an expert are taken to share its tokens alike, which is what vLLM's choice of copies comes to.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from elastic_daemon.placement.model import FloatArray, IntArray, Load, Placement, PlacementError
from elastic_daemon.placement.tables import BoolArray, Tables

TOLERANCE: Final = 0.05
"""A layer whose hottest rank has at most this much more than the mean stays as it is."""

WORTH: Final = 0.03
"""A layer changes only if that takes at least this share of the mean rank load off its hottest rank."""

STEP: Final = 0.005
"""Two experts trade places only where that takes this share of the mean rank load off the hottest rank."""

EXCHANGE_GAIN: Final = 0.1
"""A copy changes from one expert to another only where the load per copy of the first was this much higher than that of
the other becomes."""

SMALL: Final = 0.3
"""An expert whose copies have less load than this share of the mean rank load needs no more of them."""

DETOUR: Final = 0.005
"""A trade of two single copies has to take that much more off: on the way one of them waits in a slot to spare, which
costs a load or two more."""

COLDEST: Final = 8
"""Trades of the hottest rank are first looked for among that many coldest heat, then among all."""


def tokens_per_expert(load: Load, layers: int, experts: int) -> FloatArray:
    """`load` as [layers, E]. Raises PlacementError if that is not its shape, or a number is negative or no number."""
    tokens = np.asarray(load, dtype=np.float64)
    if tokens.shape != (layers, experts):
        raise PlacementError(f"load must be [layers, experts] = {[layers, experts]}, got {list(tokens.shape)}")
    if not (np.isfinite(tokens).all() and (tokens >= 0).all()):
        raise PlacementError("load must be finite and not negative")
    return tokens


def balancedness(placement: Placement, load: Load) -> float:
    """Mean rank load over the highest, each summed over layers first, as vLLM reports it. 1.0 without load."""
    tables = Tables(placement)
    loads = rank_loads(tables, tokens_per_expert(load, placement.layers, placement.experts))
    highest = loads.max(axis=1).sum()
    return float(loads.mean(axis=1).sum() / highest) if highest > 0 else 1.0


def rank_loads(tables: Tables, load: FloatArray) -> FloatArray:
    """Tokens that each rank computes, [layers, N]."""
    share = load / np.maximum(tables.slots, 1)
    loads: FloatArray = np.einsum("lne,le->ln", tables.held, share, optimize=True)
    return loads


def balance(tables: Tables, load: FloatArray, goal: int) -> IntArray:
    """The table [layers, N, S] with a cooler hottest rank in each layer that is out of balance. No slot is empty.

    First hot experts get copies of cold ones that have more than `goal`, which costs one load each; then experts of
    the hottest rank trade places with colder ones. Every copy stays the only one on its rank, and no expert comes to
    have several copies on one host alone. `tables` is used up.
    """
    before, heat = tables.table.copy(), rank_loads(tables, load)
    hottest, mean = heat.max(axis=1), heat.mean(axis=1)
    layers = np.flatnonzero(hottest > (1 + TOLERANCE) * mean)
    if not len(layers):
        return before
    _exchange_copies(tables, load, heat, layers, goal)
    _trade_places(tables, load, heat, layers)
    worth = heat.max(axis=1) < hottest - WORTH * mean
    return np.where(worth[:, None, None], tables.table, before)


def _exchange_copies(tables: Tables, load: FloatArray, heat: FloatArray, layers: IntArray, goal: int) -> None:
    """In each step the expert with most load per copy takes the copy of which least is missed, on the coldest rank."""
    mean = heat.mean(axis=1)
    done = tables.copies >= heat.shape[1]
    while True:
        share = np.where(done[layers], -1.0, load[layers] / tables.slots[layers])
        hot, hottest = share.argmax(axis=1), share.max(axis=1)
        wanting = hottest > SMALL * mean[layers]
        layers, hot, hottest = layers[wanting], hot[wanting], hottest[wanting]
        if not len(layers):
            return
        cold, least, can = _coldest(tables, load, layers, hot, goal)
        rank = np.where(can, heat[layers], np.inf).argmin(axis=1)
        worth = can.any(axis=1) & (hottest > (1 + EXCHANGE_GAIN) * least)
        done[layers[~worth], hot[~worth]] = True
        if worth.any():
            _exchange(tables, load, heat, layers[worth], hot[worth], cold[worth], rank[worth])
            now = layers[worth]
            done[now] |= tables.copies[now] >= heat.shape[1]


def _coldest(
    tables: Tables, load: FloatArray, layers: IntArray, hot: IntArray, goal: int
) -> tuple[IntArray, FloatArray, BoolArray]:
    """The expert of each layer that has least load per copy with one copy less, that load, and on which ranks [N] `hot`
    can have its copy.
    """
    spare = tables.copies[layers] > goal
    missed = np.where(spare, load[layers] / np.maximum(tables.slots[layers] - 1, 1), np.inf)
    missed[np.arange(len(layers)), hot] = np.inf
    cold = missed.argmin(axis=1)
    can = _can_exchange(tables, layers, hot, cold)
    if len(stuck := np.flatnonzero(~can.any(axis=1))):  # the hot expert is wherever the coldest is: one that is not
        where = layers[stuck]
        lacks = 1 - tables.present[where, :, hot[stuck]]
        elsewhere = np.matmul(lacks[:, None, :], tables.presence(where))[:, 0] > 0
        missed[stuck] = np.where(elsewhere, missed[stuck], np.inf)
        cold[stuck] = missed[stuck].argmin(axis=1)
        can[stuck] = _can_exchange(tables, where, hot[stuck], cold[stuck])
    return cold, missed[np.arange(len(layers)), cold], can


def _can_exchange(tables: Tables, layers: IntArray, hot: IntArray, cold: IntArray) -> BoolArray:
    """Ranks [len(layers), N] on which `hot` can take the place of `cold`."""
    can: BoolArray = (tables.present[layers, :, cold] > 0) & (tables.present[layers, :, hot] == 0)
    if tables.hosts > 1:
        at, rank = layers[:, None], np.arange(can.shape[1])
        can &= ~tables.drop_confines(at, cold[:, None], rank)
        one_host = tables.spans[layers, hot] == 1
        can &= ~(one_host[:, None] & (tables.on_host[at, tables.host, hot[:, None]] > 0))
    return can


def _exchange(
    tables: Tables,
    load: FloatArray,
    heat: FloatArray,
    layers: IntArray,
    hot: IntArray,
    cold: IntArray,
    rank: IntArray,
) -> None:
    slot = (tables.table[layers, rank] == cold[:, None]).argmax(axis=1)
    both = np.stack([hot, cold])
    before = load[layers, both] / tables.slots[layers, both]
    held = tables.held[layers, :, both]  # [2, len(layers), N]
    tables.put(layers, rank, slot, hot)
    after = load[layers, both] / tables.slots[layers, both]
    heat[layers] += (tables.held[layers, :, both] * after[:, :, None] - held * before[:, :, None]).sum(axis=0)


def _trade_places(tables: Tables, load: FloatArray, heat: FloatArray, layers: IntArray) -> None:
    """In each step one expert of the hottest rank trades places with one of a colder rank.

    Ends: each trade leaves fewer ranks as hot as the hottest was.
    """
    share, number = load / tables.slots, heat.shape[1]
    # A trade of two single copies needs a slot for one of them to wait in.
    layers = layers[(tables.copies[layers] > 1).any(axis=1)]
    while len(layers) and number > 1:
        narrow = layers
        while len(narrow):
            narrow = narrow[_trade(tables, share, heat, narrow, min(COLDEST, number))]
        layers = layers[_trade(tables, share, heat, layers, number)]


def _trade(tables: Tables, share: FloatArray, heat: FloatArray, layers: IntArray, coldest: int) -> BoolArray:
    """The best trade of each layer with one of its `coldest` ranks, if it is worth it; says in which layers it was."""
    partners = np.argpartition(heat[layers], coldest - 1, axis=1)[:, :coldest]
    hottest = heat[layers].argmax(axis=1)
    worst, (own, partner, other) = _best_trade(tables, share, heat, layers, hottest, partners)
    worth: BoolArray = worst < heat[layers, hottest] - STEP * heat[layers].mean(axis=1)
    at, here, own, other = layers[worth], hottest[worth], own[worth], other[worth]
    there = partners[worth, partner[worth]]
    mine, theirs = tables.table[at, here, own], tables.table[at, there, other]
    tables.put(at, here, own, theirs)
    tables.put(at, there, other, mine)
    less = share[at, mine] - share[at, theirs]
    heat[at, here] -= less
    heat[at, there] += less
    return worth


def _best_trade(
    tables: Tables, share: FloatArray, heat: FloatArray, layers: IntArray, hottest: IntArray, partners: IntArray
) -> tuple[FloatArray, tuple[IntArray, ...]]:
    """The load of the hotter of the two ranks after the best trade, `DETOUR` added; (own slot, partner, other slot)."""
    at = layers[:, None]
    mine = tables.table[layers, hottest]  # [layers, S]
    theirs = tables.table[at, partners]  # [layers, partners, S]
    less = share[at, mine][:, :, None, None] - share[at[:, :, None], theirs][:, None]
    colder = heat[at, partners][:, None, :, None] + less
    worst = np.maximum(heat[layers, hottest][:, None, None, None] - less, colder)
    comes = tables.present[at[:, :, None], partners[:, None, :], mine[:, :, None]] == 0  # [layers, S, partners]
    goes = tables.present[at[:, :, None], hottest[:, None, None], theirs] == 0  # [layers, partners, S]
    if tables.hosts > 1:
        here, there = tables.host[hottest][:, None, None], tables.host[partners]
        comes &= ~tables.move_confines(at[:, :, None], mine[:, :, None], here, there[:, None, :])
        goes &= ~tables.move_confines(at[:, :, None], theirs, there[:, :, None], here)
    alone = tables.copies[at, mine][:, :, None, None] == 1, tables.copies[at[:, :, None], theirs][:, None] == 1
    worst += (alone[0] & alone[1]) * (DETOUR * heat[layers].mean(axis=1)[:, None, None, None])
    worst = np.where(comes[:, :, :, None] & goes[:, None], worst, np.inf).reshape(len(layers), -1)
    best = worst.argmin(axis=1)
    return worst[np.arange(len(layers)), best], np.unravel_index(best, less.shape[1:])
