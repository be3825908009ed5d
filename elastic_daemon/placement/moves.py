"""Changes to a placement that runs: repair after a loss, respread after a loss or a gain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from elastic_daemon.placement.model import (
    EMPTY,
    HostCopies,
    Hosts,
    IntArray,
    Load,
    Placement,
    RepairPlan,
    SlotLoad,
    Source,
    held_slots,
    require_slots,
    stacked,
)


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
        edit.load(layer, edit.best_slot(edit.spare(layer, keep=1)), expert)
    _even_out(edit)
    return edit.plan()


def evacuate(placement: Placement, leaving: Iterable[int]) -> RepairPlan:
    """The fewest loads after which the ranks that stay hold every expert. The leaving ones keep what they hold.

    As `repair`, but the source is PEER: a leaving rank, which still lives. CHECKPOINT only for what nobody holds.
    Raises NotEnoughSlots when the slots of those that stay are fewer than E.
    """
    gone = set(leaving) & set(placement.ranks)
    plan = repair(placement, set(placement.ranks) - gone)
    sent = dict.fromkeys(sorted(gone), 0)
    for number, want in enumerate(loads := list(plan.loads)):
        if holders := [rank for rank in sent if want.expert in placement.columns[rank][want.layer]]:
            peer = min(holders, key=sent.__getitem__)
            sent[peer] += 1
            loads[number] = replace(want, source=Source.PEER, peer=peer)
    return RepairPlan(placement.with_columns(plan.placement.columns), tuple(loads))


def respread(
    placement: Placement,
    ranks: Iterable[int],
    host_copies: HostCopies | None = None,
    load: Load | None = None,
    hosts: Hosts | None = None,
) -> RepairPlan:
    """Loads after which `expert_safety` on `ranks` is as high as slots allow: min(N, N * S // E) copies of everything.

    Ranks that the placement does not know start empty; no slot stays empty. Few moves: a copy moves only where it
    raises the minimum or fills a slot. Executed in order, no load overwrites the last live copy of an expert, so that
    the group can serve in between. Source is PEER whenever a live rank has the expert at that point. Raises
    NotEnoughSlots when N * S < E.
    """
    members = set(ranks)
    require_slots(placement.experts, len(members), placement.slots_per_rank)
    new = members - set(placement.ranks)
    start = placement.with_columns({rank: placement.empty_column() for rank in new}).restricted(members)
    edit = _Edit(start, host_copies)
    goal = min(len(members), len(members) * placement.slots_per_rank // placement.experts)
    for layer in range(placement.layers):
        _raise_copies(edit, layer, goal)
        _fill_empty(edit, layer)
    return edit.plan()


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
            edit.loads[number] = replace(load, rank=edit.start.ranks[other], slot=slot)
            moved = True


def _raise_copies(edit: _Edit, layer: int, goal: int) -> None:
    """Until every expert of the layer is on `goal` ranks: rarest first, then those with least choice of ranks."""
    held, copies = edit.held[layer], edit.copies[layer]  # views: they follow every load
    while len(needy := np.flatnonzero(copies < goal)):
        spare = edit.spare(layer, keep=goal)  # never all zero here: N * S >= goal * E
        openings = ((held[:, needy] == 0) & spare.any(axis=1, keepdims=True)).sum(axis=0)  # ranks that can take each
        if openings.any():
            key = np.where(openings > 0, copies[needy] * (len(held) + 1) + openings, np.iinfo(np.int64).max)
            expert = int(needy[key.argmin()])
            edit.load(layer, edit.best_slot(spare, avoid=edit.shared(layer, expert)), expert)
        else:
            # Only ranks that hold it already have a slot to spare. Move an expert there from a rank that does not
            # hold it. One can move: that rank's S experts are distinct, the other has at most S - 1 besides its spare.
            expert = int(needy[0])
            index, slot = edit.best_slot(spare)
            donor = int(np.where(held[:, expert] > 0, np.iinfo(np.int64).max, edit.received).argmin())
            donated = int((held[index, edit.table[layer, donor]] == 0).argmax())
            edit.load(layer, (index, slot), int(edit.table[layer, donor, donated]))
            edit.load(layer, (donor, donated), expert)


def _fill_empty(edit: _Edit, layer: int) -> None:
    """Every empty slot gets the rarest expert that its rank lacks, from ranks it shares least with."""
    held, present, copies = edit.held[layer], edit.present[layer], edit.copies[layer]
    for index, slot in np.argwhere(edit.table[layer] == EMPTY).tolist():
        shared = (present @ present[index] @ present).astype(np.int64)
        key = (held[index] * (len(held) + 1) + copies) * (shared.max() + 1) + shared
        edit.load(layer, (index, slot), int(key.argmin()))


class _Edit:
    """A placement under change, and the loads so far. Ranks are dense indices in here."""

    def __init__(self, start: Placement, host_copies: HostCopies | None) -> None:
        self.start = start
        self.host_copies = frozenset(host_copies or ())
        self.table = stacked(start)  # [layers, N, S]
        self.held = held_slots(start)  # [layers, N, E]
        self.present = (self.held > 0).astype(np.float32)  # [layers, N, E], 0 or 1; products are faster in float
        self.copies: IntArray = (self.held > 0).sum(axis=1)  # [layers, E]
        self.received = np.zeros(len(start.ranks), dtype=np.int64)  # loads per rank
        self.sent = np.zeros(len(start.ranks), dtype=np.int64)  # loads that read from a rank
        self.loads: list[SlotLoad] = []

    def spare(self, layer: int, keep: int) -> IntArray:
        """How readily each slot [N, S] may be overwritten; 0 where its expert would be left less than `keep` copies."""
        table, held, copies = self.table[layer], self.held[layer], self.copies[layer]
        spare = np.where(copies[table] > keep, copies[table], 0)
        spare[np.take_along_axis(held, table, axis=1) > 1] = len(held) + 1  # a duplicate within its rank
        spare[table == EMPTY] = len(held) + 2
        return spare

    def shared(self, layer: int, expert: int) -> IntArray:
        """How many experts each rank shares with those that hold `expert`, [N]; -1 for those themselves."""
        present = self.present[layer]
        holders = present[:, expert] > 0
        shared: IntArray = (present @ present[holders].sum(axis=0)).astype(np.int64)
        shared[holders] = -1
        return shared

    def best_slot(self, spare: IntArray, avoid: IntArray | None = None) -> tuple[int, int]:
        """(index, slot) of the sparest slot; among equals, least of `avoid` [N] (never where -1), then fewest loads."""
        rank_cost = self.received.copy()
        key = np.where(spare > 0, spare, -1)
        if avoid is not None:
            rank_cost += avoid * (self.received.max() + 1)
            key[avoid < 0] = -1
        key = np.where(key > 0, key * (rank_cost.max() + 1) - rank_cost[:, None], 0)
        index, slot = divmod(int(key.argmax()), spare.shape[1])
        return index, slot

    def load(self, layer: int, where: tuple[int, int], expert: int) -> None:
        """Overwrite one slot. Source: this rank itself, else the live holder that sent least, else host, else disk."""
        index, slot = where
        evicts = self.put(layer, index, slot, EMPTY)
        peer = None
        source = Source.HOST if (layer, expert) in self.host_copies else Source.CHECKPOINT
        if len(holders := np.flatnonzero(self.held[layer, :, expert])):
            sender = index if self.held[layer, index, expert] else int(holders[self.sent[holders].argmin()])
            self.sent[sender] += 1
            source, peer = Source.PEER, self.start.ranks[sender]
        self.put(layer, index, slot, expert)
        self.received[index] += 1
        self.loads.append(SlotLoad(self.start.ranks[index], layer, slot, expert, evicts, source, peer))

    def put(self, layer: int, index: int, slot: int, expert: int) -> int:
        """Change the tables alone; returns what the slot held."""
        before = int(self.table[layer, index, slot])
        self.table[layer, index, slot] = expert
        for changed, by in ((before, -1), (expert, 1)):
            if changed != EMPTY:
                had = self.held[layer, index, changed]
                self.held[layer, index, changed] = had + by
                if had == 0 or had + by == 0:
                    self.present[layer, index, changed] = had == 0
                    self.copies[layer, changed] += by
        return before

    def plan(self) -> RepairPlan:
        columns = {rank: self.table[:, index] for index, rank in enumerate(self.start.ranks)}
        return RepairPlan(Placement(self.start.experts, columns), tuple(self.loads))
