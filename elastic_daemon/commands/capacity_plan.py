"""What redundancy buys: slots, memory, safety and expected availability for each number of losses to survive. Pure.

GPUs fail and come back independently of each other, at constant rates, whatever the others do: the number of failed
ones is a birth-death Markov chain. Service is down while fewer ranks are left than hold every expert, and for the
pause of each shrink and each rejoin in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from elastic_daemon.placement import PlacementError, minimum_ranks, slots_per_rank, survivable_losses

GIB: Final = 2**30
HOURS_PER_YEAR: Final = 8766.0

MTBF_HOURS: Final = 50_000.0
"""Of one GPU with its share of host and network: 419 unexpected interruptions in 54 days of 16,384 H100 ("The Llama 3
Herd of Models", arXiv 2407.21783, section 3.3.4) are one in 50,700 hours of a GPU. Faults of the GPUs themselves were
six in ten of them."""

REPAIR_HOURS: Final = 24.0
"""Until a lost GPU, or another in its place, serves again. An assumption: a reset takes minutes, a new part days."""

RECOVERY_S: Final = 1.0
"""Pause of a shrink or a rejoin. An assumption on the safe side: `elastic-daemon drill` measures yours."""

MEMORY_UTILIZATION: Final = 0.92
"""Share of a GPU's memory that vLLM uses unless told otherwise (`--gpu-memory-utilization`)."""

KV_SHARE: Final = 0.1
"""A recommended plan leaves at least this share of a GPU's memory for KV cache and activations."""

MOST_OPTIONS: Final = 16


@dataclass(frozen=True)
class ModelSize:
    """`layers`: those with experts. `expert_bytes`: one expert in one layer. `other_bytes`: all the rest, on each GPU.

    Raises PlacementError for sizes that are not positive.
    """

    experts: int
    layers: int
    expert_bytes: float
    other_bytes: float

    def __post_init__(self) -> None:
        if not (self.experts > 0 and self.layers > 0 and self.expert_bytes > 0 and self.other_bytes >= 0):
            raise PlacementError(f"a model has positive sizes, not {self}")


@dataclass(frozen=True)
class Failures:
    """Means of exponential times, in hours, of one GPU; and the pause of one shrink or rejoin.

    Raises PlacementError unless the first is positive, and none negative.
    """

    mtbf_hours: float = MTBF_HOURS
    repair_hours: float = REPAIR_HOURS
    recovery_s: float = RECOVERY_S

    def __post_init__(self) -> None:
        if not self.mtbf_hours > 0 or not self.repair_hours >= 0 or not self.recovery_s >= 0:
            raise PlacementError(f"failure rates need positive hours and seconds, got {self}")


@dataclass(frozen=True)
class Option:
    """One amount of redundancy. `survive_losses`: the largest K that has these slots, so also `survivable_losses`.

    Bytes are per GPU. `no_capacity` and `pauses`: expected share of time in which too few ranks are left, and in which
    the ranks recover.
    """

    survive_losses: int
    slots_per_rank: int
    redundant_experts: int
    expert_safety: int
    survivable_losses: int
    weight_bytes: float
    kv_bytes: float
    no_capacity: float
    pauses: float

    @property
    def fits(self) -> bool:
        return self.kv_bytes > 0

    @property
    def unavailability(self) -> float:
        """To be kept as it is: 1 minus it rounds to 1."""
        return self.no_capacity + self.pauses

    @property
    def availability(self) -> float:
        return 1 - self.unavailability

    @property
    def downtime_s_per_year(self) -> float:
        return self.unavailability * HOURS_PER_YEAR * 3600


def options(model: ModelSize, ranks: int, gpu_bytes: float, failures: Failures) -> list[Option]:
    """One option for each number of slots, from no redundancy on to the first that no longer fits a GPU.

    Raises PlacementError for a number of ranks or an amount of memory that is not positive.
    """
    if ranks < 1 or not gpu_bytes > 0:
        raise PlacementError(f"{ranks} GPUs with {gpu_bytes / GIB:g} GiB each can serve nothing")
    found: list[Option] = []
    for losses in range(ranks):
        slots = slots_per_rank(model.experts, ranks, losses)
        if found and found[-1].slots_per_rank == slots:
            continue
        found.append(_option(model, ranks, slots, gpu_bytes, failures))
        if not found[-1].fits or len(found) == MOST_OPTIONS:
            break
    return found


def recommended(found: Sequence[Option], gpu_bytes: float) -> Option | None:
    """The least redundancy with which running out of ranks costs less time than the recoveries do, as it then hardly
    gets better with more; the most that leaves `KV_SHARE` of the memory if none does. None if nothing leaves that.
    """
    roomy = [option for option in found if option.kv_bytes >= KV_SHARE * gpu_bytes]
    enough = [option for option in roomy if option.no_capacity <= option.pauses]
    return next(iter(enough or roomy[-1:]), None)


def _option(model: ModelSize, ranks: int, slots: int, gpu_bytes: float, failures: Failures) -> Option:
    weights = model.other_bytes + model.layers * slots * model.expert_bytes
    losses = survivable_losses(model.experts, ranks, slots)
    no_capacity, pauses = downtime(ranks, minimum_ranks(model.experts, slots), failures)
    return Option(
        survive_losses=losses,
        slots_per_rank=slots,
        redundant_experts=ranks * slots - model.experts,
        expert_safety=min(ranks, ranks * slots // model.experts) - 1,
        survivable_losses=losses,
        weight_bytes=weights,
        kv_bytes=MEMORY_UTILIZATION * gpu_bytes - weights,
        no_capacity=no_capacity,
        pauses=pauses,
    )


def downtime(gpus: int, needed: int, failures: Failures) -> tuple[float, float]:
    """Expected shares of time with fewer than `needed` of `gpus` up, and in pauses between states that serve."""
    states = failed_gpus(gpus, failures)
    spare = gpus - needed
    # The chain goes up from k to k + 1 failed as often as it comes back; a state that serves no more has no pause.
    crossings_per_hour = [probability * (gpus - k) / failures.mtbf_hours for k, probability in enumerate(states)]
    shrinks, rejoins = sum(crossings_per_hour[:spare]), sum(crossings_per_hour[: spare + 1])
    return sum(states[spare + 1 :]), (shrinks + rejoins) * failures.recovery_s / 3600


def failed_gpus(gpus: int, failures: Failures) -> list[float]:
    """Long-run probability of 0, 1, .. `gpus` failed ones.

    Each of the others fails at 1 / MTBF, each failed one comes back at 1 / repair time: neighbouring states hold
    each other in balance.
    """
    ratio = failures.repair_hours / failures.mtbf_hours
    weights = [1.0]
    for failed, more in pairwise(range(gpus + 1)):
        weights.append(weights[-1] * (gpus - failed) * ratio / more)
    total = sum(weights)
    return [weight / total for weight in weights]
