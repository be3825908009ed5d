"""Which expert copies live where: coverage, safety, and the loads that restore both.

Pure: plain data in, plain data out, no I/O, no clock, no randomness. The daemon computes a plan once and sends it to
every rank; any process that computed it from the same input would get the same plan.

Terms. A *rank* is a logical id, stable for life, so the ids in use need not be dense (survivors may be 0, 2, 5). Every
rank has S *slots* per MoE layer; a slot holds one expert id or `EMPTY`. *Dense index* = position of a rank among the
ascending ids, which is its communicator rank; physical expert id = dense index * S + slot. *Copies* of an expert are
counted in distinct ranks: a second copy within one rank does not outlive that rank. E experts, N ranks.

`model` has the data and what can be read off it, `start` the first placement, `moves` the changes to one that runs.
They decide with `spread` (copies, ranks, hosts) and `balance` (load) on `tables`, and `order` makes that a plan.
"""

from elastic_daemon.placement.balance import balancedness
from elastic_daemon.placement.model import (
    EMPTY,
    HostCopies,
    Hosts,
    IntArray,
    Load,
    NotEnoughSlots,
    Placement,
    PlacementError,
    RepairPlan,
    SlotLoad,
    Source,
    copies,
    expert_safety,
    minimum_ranks,
    missing,
    slots_per_rank,
    survivable_losses,
)
from elastic_daemon.placement.moves import evacuate, rebalance, repair, respread
from elastic_daemon.placement.start import initial

__all__ = [
    "EMPTY",
    "HostCopies",
    "Hosts",
    "IntArray",
    "Load",
    "NotEnoughSlots",
    "Placement",
    "PlacementError",
    "RepairPlan",
    "SlotLoad",
    "Source",
    "balancedness",
    "copies",
    "evacuate",
    "expert_safety",
    "initial",
    "minimum_ranks",
    "missing",
    "rebalance",
    "repair",
    "respread",
    "slots_per_rank",
    "survivable_losses",
]
