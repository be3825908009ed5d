"""Load: how evenly a placement spreads it, and placements that spread it better."""

from __future__ import annotations

import numpy as np

from elastic_daemon.placement.model import FloatArray, IntArray, Load, Placement, PlacementError
from elastic_daemon.placement.moves import respread


def rank_loads(placement: Placement, load: Load) -> FloatArray:
    """Tokens that each rank computes, [layers, N], if the slots that hold an expert share its `load` alike."""
    tokens = np.asarray(load, dtype=np.float64)
    if tokens.shape != (placement.layers, placement.experts):
        raise PlacementError(f"load is {list(tokens.shape)}, want {[placement.layers, placement.experts]}")
    table = placement.physical_to_logical()
    slots = np.zeros(tokens.shape)
    layer, slot = np.nonzero(table >= 0)
    np.add.at(slots, (layer, table[layer, slot]), 1)
    share = np.where(table >= 0, np.take_along_axis(tokens / np.maximum(slots, 1), table, axis=1), 0.0)
    loads: FloatArray = share.reshape(placement.layers, len(placement.ranks), -1).sum(axis=2)
    return loads


def balancedness(placement: Placement, load: Load) -> float:
    """Mean over maximum of the rank loads, each summed over layers first, as vLLM reports it; 1.0 without load."""
    loads = rank_loads(placement, load)
    highest = loads.max(axis=1).sum()
    return float(loads.mean(axis=1).sum() / highest) if highest > 0 else 1.0


def rebalance(load: Load, physical_to_logical: IntArray, ranks: int) -> IntArray:
    """The table [layers, N * S] to change to, for `load` [layers, E]: `respread` with N dense ranks.

    To be used as the policy of vLLM's expert load balancer.
    """
    tokens = np.asarray(load)
    columns = np.split(np.asarray(physical_to_logical, dtype=np.int64), ranks, axis=1)
    placement = Placement(tokens.shape[1], dict(enumerate(columns)))
    return respread(placement, placement.ranks, load=tokens).placement.physical_to_logical()
