"""Tables under change, all layers in step: layers are independent, so one numpy operation does a move in each.

Ranks are dense indices in here. Index arrays that go together have one entry per layer that takes part, and name no
layer twice.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from elastic_daemon.placement.model import EMPTY, FloatArray, Hosts, IntArray, Placement, held_slots, stacked

BoolArray = npt.NDArray[np.bool_]


class Tables:
    """What is where, and what follows from it.

    `table` [layers, N, S]: the expert in each slot. `held` [layers, N, E]: slots of a rank that hold an expert.
    `present` [layers, N, E]: 1.0 where that is not 0; products are faster in float. `copies` [layers, E]: ranks that
    hold an expert, `slots` [layers, E]: slots that do. `on_host` [layers, H, E]: ranks of a host that do, `spans`
    [layers, E]: hosts that do; `host` [N]: the host of each rank. `received` [N]: how many
    slots of a rank were overwritten.
    """

    def __init__(self, start: Placement, hosts: Hosts | None = None) -> None:
        self.start = start
        self.table = stacked(start)
        self.held = held_slots(start)
        self.present = (self.held > 0).astype(np.float32)
        self.copies: IntArray = (self.held > 0).sum(axis=1)
        self.slots: IntArray = self.held.sum(axis=1)
        names = [(hosts or {}).get(rank, "") for rank in start.ranks]
        self.host: IntArray = np.unique(names, return_inverse=True)[1]
        self.hosts = int(self.host.max()) + 1
        same = (self.host == np.arange(self.hosts)[:, None]).astype(np.float32)  # [H, N]
        self.on_host: IntArray = (same @ self.present).astype(np.int64)
        self.spans: IntArray = (self.on_host > 0).sum(axis=1)
        self.received = np.zeros(len(start.ranks), dtype=np.int64)

    def put(self, layers: IntArray, ranks: IntArray, slots: IntArray, experts: IntArray) -> None:
        """Overwrite one slot in each of `layers`; EMPTY empties it."""
        before = self.table[layers, ranks, slots]
        self.table[layers, ranks, slots] = experts
        self._count(layers, ranks, before, -1)
        self._count(layers, ranks, experts, 1)
        np.add.at(self.received, ranks, 1)

    def _count(self, layers: IntArray, ranks: IntArray, experts: IntArray, by: int) -> None:
        real = experts != EMPTY
        if not real.all():
            layers, ranks, experts = layers[real], ranks[real], experts[real]
        self.slots[layers, experts] += by
        left = self.held[layers, ranks, experts] + by
        self.held[layers, ranks, experts] = left
        edge = left == max(by, 0)  # the first to come, or the last to go
        if not edge.all():
            layers, ranks, experts = layers[edge], ranks[edge], experts[edge]
        self.present[layers, ranks, experts] = max(by, 0)
        self.copies[layers, experts] += by
        left = self.on_host[layers, self.host[ranks], experts] + by
        self.on_host[layers, self.host[ranks], experts] = left
        self.spans[layers, experts] += np.where(left == max(by, 0), by, 0)

    def presence(self, layers: IntArray) -> npt.NDArray[np.float32]:
        """`present` of these layers; without copying when they are all."""
        return self.present if len(layers) == len(self.present) else self.present[layers]

    def spare(self, layers: IntArray, keep: int) -> IntArray:
        """How readily each slot [len(layers), N, S] may be overwritten; 0 where that would leave less than `keep`."""
        table = self.table[layers]
        _, ranks, experts = self.held.shape
        # Flat indices: several times as fast. Where the slot is empty they are of anything.
        number = self.copies.take(layers[:, None, None] * experts + table)
        held = self.held.take((layers[:, None, None] * ranks + np.arange(ranks)[:, None]) * experts + table)
        spare = np.where(number > keep, number, 0)
        spare[held > 1] = ranks + 1  # a duplicate within its rank
        spare[table == EMPTY] = ranks + 2
        return spare

    def shared(self, layers: IntArray, experts: IntArray) -> FloatArray:
        """How many experts each rank shares with those that hold the layer's one of `experts`, [len(layers), N]."""
        present = self.presence(layers)
        holders = self.present[layers, :, experts]
        together = np.matmul(holders[:, None, :], present)
        return np.matmul(present, together.transpose(0, 2, 1))[:, :, 0].astype(np.float64)

    def turns(self, layers: IntArray) -> IntArray:
        """Rank order of preference, [len(layers), N]: fewest overwritten first, then another first in each layer."""
        ranks = len(self.received)
        return self.received * ranks + (np.arange(ranks) - layers[:, None]) % ranks

    def confined(self) -> BoolArray:
        """Experts [layers, E] with several copies, all on one host."""
        return (self.copies > 1) & (self.spans == 1)

    def move_confines(self, layers: IntArray, experts: IntArray, here: IntArray, there: IntArray) -> BoolArray:
        """Whether a copy that goes from host `here` to host `there` leaves an expert of two hosts on one.

        Arguments broadcast; layers may repeat.
        """
        both, last_here = self.spans[layers, experts] == 2, self.on_host[layers, here, experts] == 1
        leaves: BoolArray = both & last_here & (self.on_host[layers, there, experts] > 0) & (here != there)
        return leaves

    def drop_confines(self, layers: IntArray, experts: IntArray, ranks: IntArray) -> BoolArray:
        """Whether several copies would be left on one host without the one on `ranks`. Arguments broadcast."""
        both, last_here = self.spans[layers, experts] == 2, self.on_host[layers, self.host[ranks], experts] == 1
        leaves: BoolArray = both & last_here & (self.copies[layers, experts] > 2)
        return leaves

    def placement(self) -> Placement:
        return Placement(self.start.experts, {rank: self.table[:, i] for i, rank in enumerate(self.start.ranks)})
