"""From one table to another: which loads, in which order, from where."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

import numpy as np

from elastic_daemon.placement.model import (
    EMPTY,
    HostCopies,
    Hosts,
    IntArray,
    Placement,
    RepairPlan,
    SlotLoad,
    Source,
    stacked,
)


def plan_between(
    start: Placement, target: IntArray, host_copies: HostCopies | None = None, hosts: Hosts | None = None
) -> RepairPlan:
    """Loads that change `start` into `target` [layers, N, S], layer by layer.

    What stays on a rank keeps its slot. Executed in order, no load overwrites the last live copy of an expert. A peer
    holds what it sends when its layer begins, so that a layer can also be executed as one exchange. Where slots trade
    single copies in a circle, one of these waits in a slot to spare meanwhile; where there is none, the circle stays
    as it was.
    """
    sources = _Sources(start, host_copies, hosts)
    slots = start.slots_per_rank
    old = stacked(start)
    rows = zip(old.reshape(len(old), -1).tolist(), target.reshape(len(old), -1).tolist(), strict=True)
    loads: list[SlotLoad] = []
    table = []
    for layer, (before, after) in enumerate(rows):
        _keep_slots(before, after, slots)
        steps = _Steps(before, after, slots)
        steps.run()
        sources.enter(layer, before)
        loads += [sources.load(*divmod(at, slots), expert, evicts) for at, expert, evicts in steps.done]
        table.append(steps.now)
    columns = np.array(table, dtype=np.int64).reshape(old.shape)
    ranks = {rank: columns[:, index] for index, rank in enumerate(start.ranks)}
    return RepairPlan(Placement(start.experts, ranks), tuple(loads))


def _keep_slots(before: list[int], after: list[int], slots: int) -> None:
    """Sort what each rank holds afterwards, so that an expert that stays there stays in its slot."""
    for first in range(0, len(before), slots):
        if before[first : first + slots] == after[first : first + slots]:
            continue
        for at in range(first, first + slots):
            expert = before[at]
            while after[at] != expert and expert != EMPTY:  # each exchange settles `at`, or there is none
                found = next((i for i in range(first, first + slots) if after[i] == expert != before[i]), None)
                if found is None:
                    break
                after[found], after[at] = after[at], expert


class _Steps:
    """The order within one layer. Slots are numbered over all ranks: dense index * S + slot."""

    def __init__(self, before: list[int], after: list[int], slots: int) -> None:
        self.before = before
        self.after = after
        self.now = list(before)
        self.slots = slots  # of one rank
        self.live = Counter(before)
        self.waiting: dict[int, list[int]] = {}  # slots that hold the last copy of an expert, by it
        self.ready = deque(at for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new)
        self.settled: list[int] | None = None  # slots that hold what they are to hold, and no last copy
        self.done: list[tuple[int, int, int]] = []  # (slot, expert, what it overwrites)

    def run(self) -> None:
        self._run_ready()
        while self.waiting:  # all of these hold the only copy of what another of these is to hold
            at = next(iter(self.waiting.values()))[0]
            if not self._break_circle(self.before[at]):
                return
            self._run_ready()

    def _run_ready(self) -> None:
        while self.ready:
            at = self.ready.popleft()
            old = self.now[at]
            if old != EMPTY and self.live[old] == 1:
                self.waiting.setdefault(old, []).append(at)
            else:
                self._load(at, self.after[at])

    def _load(self, at: int, expert: int) -> None:
        old, self.now[at] = self.now[at], expert
        self.live[old] -= 1
        self.live[expert] += 1
        self.done.append((at, expert, old))
        self.ready.extend(self.waiting.pop(expert, ()))

    def _break_circle(self, single: int) -> bool:
        """Give `single` a second copy. False: no slot can be spared for it."""
        (goes_to,) = (at for slots in self.waiting.values() for at in slots if self.after[at] == single)
        if self.settled is None:
            rows = enumerate(zip(self.now, self.after, strict=True))
            self.settled = [at for at, (now, new) in rows if now == new != EMPTY and self.live[now] > 1]
        spare = [at for at in self.settled if self.live[self.now[at]] > 1 and self.now[at] == self.after[at]]
        if not spare:
            return False
        rank = goes_to // self.slots
        beside = [at for at in spare if at // self.slots == rank and self.now[at] == self.before[at]]
        at = (beside or spare)[0]
        held = self.now[at]
        if beside:  # it goes to that rank in any case, so it can stay: the two slots change roles
            self.after[at], self.after[goes_to] = single, held
            self.settled.remove(at)
            self._load(at, single)
        else:
            self._load(at, single)
            self._run_ready()
            self._load(at, held)
        return True


class _Sources:
    """Where loads come from: the rank itself, else a peer (on the same host if there is one) that sent least so far."""

    def __init__(self, start: Placement, host_copies: HostCopies | None, hosts: Hosts | None) -> None:
        self.ranks = start.ranks
        self.host_copies = frozenset(host_copies or ())
        self.host = [(hosts or {}).get(rank, "") for rank in start.ranks]
        self.sent = [0] * len(start.ranks)
        self.slots = start.slots_per_rank
        self.layer = 0
        self.holders: Mapping[int, list[int]] = {}

    def enter(self, layer: int, row: list[int]) -> None:
        """Sources are from now on what `row` [N * S] holds."""
        self.layer = layer
        holders: dict[int, list[int]] = {}
        for at, expert in enumerate(row):
            holders.setdefault(expert, []).append(at // self.slots)
        self.holders = holders

    def load(self, index: int, slot: int, expert: int, evicts: int) -> SlotLoad:
        rank = self.ranks[index]
        if not (holders := self.holders.get(expert)):
            source = Source.HOST if (self.layer, expert) in self.host_copies else Source.CHECKPOINT
            return SlotLoad(rank, self.layer, slot, expert, evicts, source)
        host = self.host[index]
        peer = holders[0]
        if len(holders) > 1:
            peer = min(holders, key=lambda other: (other != index, self.host[other] != host, self.sent[other]))
        self.sent[peer] += 1
        return SlotLoad(rank, self.layer, slot, expert, evicts, Source.PEER, self.ranks[peer])
