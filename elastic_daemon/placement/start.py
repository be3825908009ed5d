"""The first placement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from elastic_daemon.placement.model import Hosts, IntArray, Placement, PlacementError, require_positive, require_slots
from elastic_daemon.placement.moves import respread


def initial(experts: int, layers: int, ranks: Sequence[int], slots: int, hosts: Hosts | None = None) -> Placement:
    """A fresh placement that fills every slot.

    Numbers of copies differ by at most one, copies of one expert are on distinct ranks (beyond one full set per rank,
    S > E, the rest are duplicates), and the experts of a rank have their other copies on many ranks, not on one
    mirror. With `hosts` no expert has several copies on one host alone, if that is possible (see `respread`). Raises
    NotEnoughSlots when N * S < E.
    """
    require_positive(experts=experts, layers=layers, slots=slots)
    members = sorted(set(ranks))
    if len(members) != len(ranks):
        raise PlacementError(f"ranks must be distinct, got {list(ranks)}")
    require_slots(experts, len(members), slots)
    pattern = _spread(experts, len(members), slots)
    # One pattern for all layers, turned by one rank and one expert per layer: what is uneven in it (the experts with
    # one copy more, the partners met once more) hits other experts and ranks in other layers.
    table = np.stack([np.sort((np.roll(pattern, layer, axis=0) + layer) % experts) for layer in range(layers)], axis=1)
    placement = Placement(experts, dict(zip(_across(members, hosts or {}), table, strict=True)))
    return respread(placement, members, hosts=hosts).placement if hosts else placement


def _across(members: Sequence[int], hosts: Hosts) -> list[int]:
    """Ranks in turn from each host: neighbours, which share experts first, are on different ones."""
    seen: Counter[str] = Counter()
    order: list[tuple[int, int]] = []
    for rank in members:
        host = hosts.get(rank, "")
        order.append((seen[host], rank))
        seen[host] += 1
    return [rank for _, rank in sorted(order)] if len(seen) > 1 else list(members)


def _spread(experts: int, ranks: int, slots: int) -> IntArray:
    """One layer of `initial`, [N, S]."""
    if slots >= experts:  # a full set on every rank, then duplicates, from where the previous rank's left off
        return (np.arange(slots) + np.arange(ranks)[:, None] * (slots - experts)) % experts

    room = np.full(ranks, slots)
    shared = np.zeros((ranks, ranks), dtype=np.int64)  # number of experts that two ranks both hold
    held: list[list[int]] = [[] for _ in range(ranks)]

    def holders_for(number: int) -> IntArray:
        # Always ranks with most room left (so that no expert ever finds too few with room); among those, the one that
        # shares least with the holders so far.
        holders: list[int] = []
        for _ in range(number):
            key = room * (ranks * experts) - shared[holders].sum(axis=0)
            key[holders] = -1
            holders.append(int(key.argmax()))
        return np.array(holders)

    def place(expert: int, holders: IntArray) -> None:
        for rank in holders:
            held[rank].append(expert)
        room[holders] -= 1
        shared[np.ix_(holders, holders)] += 1

    quota = np.diff(np.arange(experts + 1) * (ranks * slots) // experts)  # copies of each expert, in total N * S
    rest: list[int] = []
    for number in np.unique(quota)[::-1].tolist():  # the harder to spread first
        group = np.flatnonzero(quota == number)
        # N experts take one choice of holders, turned by 0..N-1: all ranks fill alike and meet alike.
        turns = len(group) // ranks
        for cycle in group[: turns * ranks].reshape(turns, ranks):
            holders = holders_for(number)
            for turn, expert in enumerate(cycle.tolist()):
                place(expert, (holders + turn) % ranks)
        rest += group[turns * ranks :].tolist()
    for expert in rest:
        place(expert, holders_for(quota[expert]))
    return np.array(held)
