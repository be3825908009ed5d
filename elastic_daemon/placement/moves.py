"""Changes to a placement that runs: repair after a loss, evacuation before one, respread after either, or a gain."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from elastic_daemon.placement.balance import balance, tokens_per_expert
from elastic_daemon.placement.model import (
    EMPTY,
    HostCopies,
    Hosts,
    IntArray,
    Load,
    Placement,
    PlacementError,
    RepairPlan,
    SlotLoad,
    Source,
    held_slots,
    require_slots,
    stacked,
)
from elastic_daemon.placement.order import plan_between
from elastic_daemon.placement.spread import clear_duplicates, fill_empty, raise_copies, spread_over_hosts
from elastic_daemon.placement.tables import Tables


def repair(placement: Placement, survivors: Iterable[int], host_copies: HostCopies | None = None) -> RepairPlan:
    """The fewest loads after which `survivors` hold every expert: one for each (layer, expert) that none of them has.

    No load when tables alone suffice. A lost expert replaces the expert with most copies (before that, a duplicate
    within its rank or nothing), never a last copy, on the rank with fewest loads so far. Source is HOST for pairs in
    `host_copies`, else CHECKPOINT. Raises NotEnoughSlots when the survivors' slots are fewer than E, PlacementError
    for a survivor that the placement does not know.
    """
    kept = set(survivors)
    require_slots(placement.experts, len(kept), placement.slots_per_rank)
    edit = _Edit(placement.restricted(kept), host_copies)
    for layer, expert in np.argwhere(edit.copies == 0).tolist():
        edit.load(layer, expert)
    _even_out(edit)
    return edit.plan()


def evacuate(placement: Placement, leaving: Iterable[int]) -> RepairPlan:
    """The fewest loads after which the ranks that stay hold every expert. The leaving ones keep what they hold.

    As `repair`, but the source is PEER: a leaving rank, which still lives. CHECKPOINT only for what nobody holds.
    Raises NotEnoughSlots when the slots of those that stay are fewer than E.
    """
    gone = sorted(set(leaving) & set(placement.ranks))
    plan = repair(placement, set(placement.ranks) - set(gone))
    holders: dict[tuple[int, int], list[int]] = {}
    for rank in gone:
        for layer, row in enumerate(placement.columns[rank].tolist()):
            for expert in row:
                holders.setdefault((layer, expert), []).append(rank)
    sent = dict.fromkeys(gone, 0)
    loads = list(plan.loads)
    for number, load in enumerate(loads):
        if senders := holders.get((load.layer, load.expert)):
            peer = min(senders, key=sent.__getitem__)
            sent[peer] += 1
            loads[number] = load._replace(source=Source.PEER, peer=peer)
    return RepairPlan(placement.with_columns(plan.placement.columns), tuple(loads))


def respread(
    placement: Placement,
    ranks: Iterable[int],
    host_copies: HostCopies | None = None,
    load: Load | None = None,
    hosts: Hosts | None = None,
) -> RepairPlan:
    """Loads after which `expert_safety` on `ranks` is as high as slots allow: min(N, N * S // E) copies of everything.

    Ranks that the placement does not know start empty; no slot stays empty, or holds what its rank has already. Few
    moves: a copy moves only where it raises the minimum, fills a slot, comes to a second host or is worth it for
    balance.

    `load` [layers, E]: tokens per expert; slots beyond the guaranteed copies go to the hottest experts, and the
    hottest rank of each layer is relieved (`balance`). None: nothing is known, and nothing moves for balance.
    `hosts`: the host of each rank, all on one without it; no expert with several copies has them all on one host, if
    that is possible, so that with two copies of everything the loss of a whole host needs no disk read.

    Executed in order, no load overwrites the last live copy of an expert, so that the group can serve in between; see
    `plan_between` for what else holds of the order. Source is PEER for what a live rank has. Raises NotEnoughSlots
    when N * S < E, PlacementError for a load of another shape.
    """
    members = set(ranks)
    require_slots(placement.experts, len(members), placement.slots_per_rank)
    tokens = None if load is None else tokens_per_expert(load, placement.layers, placement.experts)
    new = members - set(placement.ranks)
    start = placement.with_columns({rank: placement.empty_column() for rank in new}).restricted(members)
    tables = Tables(start, hosts)
    goal = min(len(members), len(members) * placement.slots_per_rank // placement.experts)
    clear_duplicates(tables)
    raise_copies(tables, goal)
    fill_empty(tables, tokens)
    spread_over_hosts(tables, goal)
    target = tables.table if tokens is None else balance(tables, tokens, goal)
    return plan_between(start, target, host_copies, hosts)


def rebalance(load: Load, physical_to_logical: IntArray, ranks: int) -> IntArray:
    """The table [layers, N * S] to change to, for `load` [layers, E]: `respread` over N dense ranks.

    To be used as the policy of vLLM's expert load balancer. Raises PlacementError if the table cannot be split over
    `ranks`.
    """
    tokens, table = np.asarray(load), np.asarray(physical_to_logical)
    if table.ndim != 2 or tokens.ndim != 2 or ranks < 1 or table.shape[1] % ranks:
        raise PlacementError(f"{list(table.shape)} slots and load {list(tokens.shape)} do not fit {ranks} ranks")
    placement = Placement(tokens.shape[1], dict(enumerate(np.split(table, ranks, axis=1))))
    return respread(placement, placement.ranks, load=tokens).placement.physical_to_logical()


def _even_out(edit: _Edit) -> None:
    """Move loads from busy ranks to less busy ones that hold another copy of what was evicted.

    Sound for repairs only: their loads read from no rank, so none depends on the place of another.
    """
    moved = True
    while moved:  # ends: each move lowers the sum of squared loads
        moved = False
        for number, load in enumerate(edit.loads):
            index = edit.start.ranks.index(load.rank)
            held = edit.held[load.layer]
            if load.evicts == EMPTY or held[index, load.evicts]:
                continue  # it cost no copy here, it would there
            holders = np.flatnonzero(held[:, load.evicts])
            other = int(holders[edit.received[holders].argmin()])
            if edit.received[index] - edit.received[other] < 2:
                continue
            slot = int((edit.table[load.layer, other] == load.evicts).argmax())
            edit.put(load.layer, index, load.slot, load.evicts)
            edit.put(load.layer, other, slot, load.expert)
            edit.received[[index, other]] += -1, 1
            edit.loads[number] = load._replace(rank=edit.start.ranks[other], slot=slot)
            moved = True


class _Edit:
    """A placement under repair, and the loads so far. Ranks are dense indices in here."""

    def __init__(self, start: Placement, host_copies: HostCopies | None) -> None:
        self.start = start
        self.host_copies = frozenset(host_copies or ())
        self.table = stacked(start)  # [layers, N, S]
        self.held = held_slots(start)  # [layers, N, E]
        self.copies: IntArray = (self.held > 0).sum(axis=1)  # [layers, E]
        self.received = np.zeros(len(start.ranks), dtype=np.int64)  # loads per rank
        self.loads: list[SlotLoad] = []

    def load(self, layer: int, expert: int) -> None:
        """Bring an expert that nobody has into the slot that is missed least; among equals, fewest loads so far."""
        table, held, copies = self.table[layer], self.held[layer], self.copies[layer]
        spare = np.where(copies[table] > 1, copies[table], 0)
        spare[np.take_along_axis(held, table, axis=1) > 1] = len(held) + 1  # a duplicate within its rank
        spare[table == EMPTY] = len(held) + 2
        key = np.where(spare > 0, spare * (self.received.max() + 1) - self.received[:, None], 0)
        index, slot = divmod(int(key.argmax()), spare.shape[1])
        source = Source.HOST if (layer, expert) in self.host_copies else Source.CHECKPOINT
        evicts = self.put(layer, index, slot, expert)
        self.received[index] += 1
        self.loads.append(SlotLoad(self.start.ranks[index], layer, slot, expert, evicts, source))

    def put(self, layer: int, index: int, slot: int, expert: int) -> int:
        """Change the tables alone; returns what the slot held."""
        before = int(self.table[layer, index, slot])
        self.table[layer, index, slot] = expert
        for changed, by in ((before, -1), (expert, 1)):
            if changed != EMPTY:
                had = self.held[layer, index, changed]
                self.held[layer, index, changed] = had + by
                if had == 0 or had + by == 0:
                    self.copies[layer, changed] += by
        return before

    def plan(self) -> RepairPlan:
        columns = {rank: self.table[:, index] for index, rank in enumerate(self.start.ranks)}
        return RepairPlan(Placement(self.start.experts, columns), tuple(self.loads))
