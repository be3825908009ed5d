"""The data: a placement, a plan, and what can be read off them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Load = npt.ArrayLike  # tokens per expert, [layers, E]
Hosts = Mapping[int, str]  # rank -> name of the host it is on
HostCopies = Collection[tuple[int, int]]  # (layer, expert) pairs that also have a copy in host memory

EMPTY: Final = -1


class PlacementError(ValueError):
    """Input that describes no possible placement."""


class NotEnoughSlots(PlacementError):
    """The ranks cannot hold one copy of every expert: serving would mean wrong answers.

    `needed` and `available` count slots per layer over all ranks.
    """

    def __init__(self, needed: int, available: int, ranks: int) -> None:
        self.needed = needed
        self.available = available
        have = "1 rank has" if ranks == 1 else f"{ranks} ranks have"
        super().__init__(f"{needed} experts need {needed} slots per layer, but {have} only {available}")


@dataclass(frozen=True, eq=False)
class Placement:
    """What every slot of every rank holds. Immutable, compared by value.

    `experts` is E, the number of logical experts per layer; `columns` maps rank -> int array [layers, S].
    Raises PlacementError unless all columns have one shape and hold ids in 0..E-1 or EMPTY.
    """

    experts: int
    columns: Mapping[int, IntArray]

    def __post_init__(self) -> None:
        require_positive(experts=self.experts)
        columns = {int(rank): _column(rank, self.columns[rank]) for rank in sorted(self.columns)}
        shapes = {column.shape for column in columns.values()}
        if len(shapes) != 1:
            raise PlacementError(f"columns must share one shape [layers, slots], got {sorted(shapes) or 'no ranks'}")
        for rank, column in columns.items():
            if column.min() < EMPTY or column.max() >= self.experts:
                raise PlacementError(f"rank {rank} holds ids outside {EMPTY}..{self.experts - 1}")
        object.__setattr__(self, "columns", columns)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Logical ids, ascending: the communicator order."""
        return tuple(self.columns)

    @property
    def layers(self) -> int:
        return int(self._shape[0])

    @property
    def slots_per_rank(self) -> int:
        return int(self._shape[1])

    @property
    def _shape(self) -> tuple[int, ...]:
        return next(iter(self.columns.values())).shape

    def physical_to_logical(self) -> IntArray:
        """The table the engine wants: [layers, N * S], physical expert id -> logical expert id or EMPTY."""
        return np.concatenate(list(self.columns.values()), axis=1)

    def restricted(self, ranks: Iterable[int]) -> Placement:
        """Only these ranks' columns. Raises PlacementError for a rank that is not here, or when none is left."""
        kept = set(ranks)
        if unknown := sorted(kept - set(self.ranks)):
            raise PlacementError(f"ranks {unknown} hold nothing here; known are {list(self.ranks)}")
        return Placement(self.experts, {rank: self.columns[rank] for rank in kept})

    def without(self, ranks: Iterable[int]) -> Placement:
        """All columns but these; ranks that are not here are gone already. Raises PlacementError if none is left."""
        return self.restricted(set(self.ranks) - set(ranks))

    def with_columns(self, columns: Mapping[int, IntArray]) -> Placement:
        """These columns ([layers, S] each) added, or put in place of what their ranks held."""
        return Placement(self.experts, {**self.columns, **columns})

    def empty_column(self) -> IntArray:
        """The column of a rank that holds nothing yet, [layers, S]."""
        return np.full(self._shape, EMPTY, dtype=np.int64)

    def after(self, loads: Iterable[SlotLoad]) -> Placement:
        """What is where once these loads are done, in order; say, the part of a plan that a failure left done.

        Raises PlacementError when a slot does not hold what its load evicts: the plan was made for other tables.
        """
        columns = {rank: column.copy() for rank, column in self.columns.items()}
        for load in loads:
            found = columns[load.rank][load.layer, load.slot] if load.rank in columns else None
            if found != load.evicts:
                raise PlacementError(f"{load} finds {found} in its slot")
            columns[load.rank][load.layer, load.slot] = load.expert
        return Placement(self.experts, columns)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and string keys: unchanged by a trip through JSON."""
        return {"experts": self.experts, "columns": {str(rank): c.tolist() for rank, c in self.columns.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Placement:
        """Inverse of `to_json`. Raises PlacementError on contents that are no placement."""
        return cls(data["experts"], {int(rank): column for rank, column in data["columns"].items()})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        same_keys = self.experts == other.experts and self.ranks == other.ranks
        return same_keys and all(np.array_equal(column, other.columns[r]) for r, column in self.columns.items())

    def __hash__(self) -> int:
        return hash((self.experts, self.ranks, self.physical_to_logical().tobytes()))


class Source(StrEnum):
    """Where the bytes of a load come from, fastest first."""

    PEER = "peer"  # a live rank's GPU
    HOST = "host"  # host memory
    CHECKPOINT = "checkpoint"  # the expert's slices on disk


class SlotLoad(NamedTuple):
    """Put `expert` into one slot, over `evicts` (an expert id, or EMPTY). `peer` is the rank to copy from, for PEER."""

    rank: int
    layer: int
    slot: int
    expert: int
    evicts: int
    source: Source
    peer: int | None = None


@dataclass(frozen=True)
class RepairPlan:
    """Loads to execute in this order, and the placement they lead to."""

    placement: Placement
    loads: tuple[SlotLoad, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts: unchanged by a trip through JSON."""
        loads = [{**load._asdict(), "source": load.source.value} for load in self.loads]
        return {"placement": self.placement.to_json(), "loads": loads}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RepairPlan:
        """Inverse of `to_json`."""
        loads = tuple(SlotLoad(**{**load, "source": Source(load["source"])}) for load in data["loads"])
        return cls(Placement.from_json(data["placement"]), loads)


def slots_per_rank(experts: int, ranks: int, survive_losses: int) -> int:
    """Slots per layer so that any `ranks - survive_losses` ranks can hold every expert: ceil(E / (N - K))."""
    require_positive(experts=experts, ranks=ranks)
    if not 0 <= survive_losses < ranks:
        raise PlacementError(f"{ranks} ranks can survive 0 to {ranks - 1} losses, not {survive_losses}")
    return -(-experts // (ranks - survive_losses))


def minimum_ranks(experts: int, slots: int) -> int:
    """Fewest ranks with `slots` slots each that hold every expert: ceil(E / S)."""
    require_positive(experts=experts, slots=slots)
    return -(-experts // slots)


def survivable_losses(experts: int, ranks: int, slots: int) -> int:
    """How many more ranks may go while every expert still finds a slot; -1 when already too few are left."""
    return max(ranks - minimum_ranks(experts, slots), -1)


def copies(placement: Placement) -> IntArray:
    """Number of distinct ranks that hold each expert, [layers, E]."""
    return np.asarray((held_slots(placement) > 0).sum(axis=1), dtype=np.int64)


def missing(placement: Placement) -> tuple[tuple[int, int], ...]:
    """(layer, expert) pairs that no rank holds, ascending."""
    return tuple((int(layer), int(expert)) for layer, expert in np.argwhere(copies(placement) == 0))


def expert_safety(placement: Placement, host_copies: HostCopies | None = None) -> int:
    """How many further rank losses, whichever they are, need no disk read; -1 when some expert needs one already.

    An expert with a copy in host memory is safe against any number, so the answer is at most N - 1.
    """
    holders = copies(placement)
    for layer, expert in host_copies or ():
        holders[layer, expert] = len(placement.ranks)
    return int(holders.min()) - 1


def stacked(placement: Placement) -> IntArray:
    """A writable copy of all columns, [layers, N, S]."""
    return np.stack(list(placement.columns.values()), axis=1)


def held_slots(placement: Placement) -> IntArray:
    """How many slots of each rank hold each expert, [layers, N, E]."""
    table = stacked(placement)
    held = np.zeros((*table.shape[:2], placement.experts), dtype=np.int64)
    layer, rank, slot = np.nonzero(table != EMPTY)
    np.add.at(held, (layer, rank, table[layer, rank, slot]), 1)
    return held


def require_slots(experts: int, ranks: int, slots: int) -> None:
    if ranks * slots < experts:
        raise NotEnoughSlots(experts, ranks * slots, ranks)


def require_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise PlacementError(f"{name} must be at least 1, got {value}")


def _column(rank: int, column: npt.ArrayLike) -> IntArray:
    """A read-only copy of a rank's column; refuses what is not a non-empty [layers, slots] of integers."""
    try:
        array = np.array(column)
    except ValueError as error:  # rows of different lengths
        raise PlacementError(f"rank {rank}: {error}") from error
    if rank < 0 or array.ndim != 2 or array.size == 0 or array.dtype.kind not in "iu":
        raise PlacementError(f"rank {rank}: want integers [layers, slots], got {array.dtype} {list(array.shape)}")
    array = array.astype(np.int64)
    array.flags.writeable = False
    return array
