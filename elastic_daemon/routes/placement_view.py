"""`/placement`: which rank holds which experts, as counts: small however large the model is. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic_daemon.placement import EMPTY, IntArray, Placement


@dataclass(frozen=True)
class PlacementView:
    """What the controller knows. `ranks`: those of `placement` that are still in the group, ascending.

    `host_copies`: (layer, expert) pairs that also have a copy in host memory.
    """

    epoch: int
    placement: Placement
    ranks: tuple[int, ...]
    host_copies: Collection[tuple[int, int]] = frozenset()

    @property
    def layers(self) -> int:
        return self.placement.layers

    def is_same(self, other: PlacementView | None) -> bool:
        """Whether both tell the same. A placement never changes: another one is another object."""
        return (
            other is not None
            and self.placement is other.placement
            and (self.epoch, self.ranks, len(self.host_copies)) == (other.epoch, other.ranks, len(other.host_copies))
        )

    def to_json(self, layer: int | None = None) -> dict[str, Any]:
        """The body of section "placement" in docs/api.md: of all layers together, or of one."""
        held = self._held()
        held_somewhere = held if layer is None else held[layer : layer + 1]
        holders = held_somewhere.sum(axis=1)
        in_host = np.zeros(holders.shape, dtype=bool)
        for at, expert in self.host_copies:
            if layer is None or at == layer:
                in_host[at if layer is None else 0, expert] = True
        alone = (holders == 1) & ~in_host
        return {
            "epoch": self.epoch,
            "layers": self.layers,
            "layer": layer,
            "experts": self.placement.experts,
            "slots_per_rank": self.placement.slots_per_rank,
            "ranks": list(self.ranks),
            "held": held_somewhere.sum(axis=0, dtype=np.int64).tolist(),
            "fewest": holders.min(axis=0).tolist(),
            "copies": np.bincount(holders.ravel()).tolist(),
            "sole": (held_somewhere & alone[:, None, :]).sum(axis=(0, 2)).tolist(),
            "host_copies": int(in_host.sum()),
        }

    def _held(self) -> IntArray:
        """Whether each rank holds each expert, 0 or 1, [layers, ranks, experts]."""
        held = np.zeros((self.layers, len(self.ranks), self.placement.experts), dtype=np.int64)
        for position, rank in enumerate(self.ranks):
            column = self.placement.columns[rank]
            layer, slot = np.nonzero(column != EMPTY)
            held[layer, position, column[layer, slot]] = 1
        return held
