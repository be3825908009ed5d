"""Whom to kill, and when. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

RANKS = 4
LOSSES_PER_LIFE = 2
"""The bundled model on four ranks can lose two, and lost capacity does not come back: then a fresh daemon."""


class Phase(StrEnum):
    """What the daemon is doing when the first victim dies."""

    EARLY = "decode, early"
    LATE = "decode, late"
    PREFILL = "prefill"
    IDLE = "idle, requests arrive"
    BOTH = "two at once"
    DURING = "one more in the recovery"


@dataclass(frozen=True)
class Fault:
    """One or two SIGKILLs in one run of all streams.

    `delay_s`: with IDLE from the signal to the first request, with DURING from the start of the first recovery to the
    second signal.
    """

    phase: Phase
    ranks: tuple[int, ...]
    delay_s: float = 0.0


LIVES: tuple[tuple[Phase, ...], ...] = (
    (Phase.EARLY, Phase.PREFILL),
    (Phase.DURING,),
    (Phase.LATE, Phase.IDLE),
    (Phase.BOTH,),
    (Phase.IDLE, Phase.LATE),
)
"""What the lives of the daemon go through, in turn: five kinds and four ranks, so that in time each meets each."""

DELAYS_S = {Phase.IDLE: (0.0, 0.02, 0.01, 0.04), Phase.DURING: (0.0, 0.005, 0.002, 0.01)}
"""In turn. A whole recovery takes about 30 ms on a quiet machine."""


def plan(kills: int) -> list[list[Fault]]:
    """The faults of each life of the daemon, `kills` signals in all."""
    lives: list[list[Fault]] = []
    while kills > 0:
        number = len(lives)
        first = number % RANKS
        second = (first + 1 + number // RANKS % (RANKS - 1)) % RANKS
        victims = (first, second)[:kills]
        phases = LIVES[number % len(LIVES)]
        if len(phases) == 1 and len(victims) == 1:  # one signal left, where two would be due
            phases = (Phase.EARLY,)
        groups = [victims] if len(phases) == 1 else [(victim,) for victim in victims]
        lives.append([Fault(*fault, _delay_s(fault[0], number)) for fault in zip(phases, groups, strict=False)])
        kills -= LOSSES_PER_LIFE
    return lives


def _delay_s(phase: Phase, life: int) -> float:
    delays = DELAYS_S.get(phase, (0.0,))
    return delays[life % len(delays)]
