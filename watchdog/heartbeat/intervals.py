"""How long a rank may be silent before that says something, learnt from how long it was silent so far.

The phi accrual failure detector (Hayashibara, Défago, Yared, Katayama: "The φ Accrual Failure Detector", SRDS 2004):
intervals are taken as normally distributed, and phi is minus the decimal logarithm of the probability that a healthy
rank is silent for this long. To that a pause is added that is always tolerated, as in Akka's implementation
(`acceptable-heartbeat-pause`), because a machine that stalls for half a second is no fault of a rank, and a first
estimate stands for intervals not yet seen.

    limit = clamp(mean + z(phi) * max(deviation, least deviation) + tolerated stall, floor, ceiling)

Long work that is announced (loading, compiling, regrouping) has fixed, wide limits: its intervals say nothing about
the next one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

from watchdog.heartbeat.layout import Phase


@dataclass(frozen=True, slots=True)
class Estimate:
    """What intervals between signs of life are taken to be before any was seen."""

    mean_s: float
    deviation_s: float


@dataclass(frozen=True, slots=True)
class IntervalPolicy:
    """Bounds and constants of the thresholds. The defaults find a stopped rank in less than 3 s.

    `phi` 8: one wrong suspicion in 10^8 intervals, the default of Akka's and Cassandra's detectors. `floor_s` is twice
    the stall that must never convict. `confirm_s`: how much longer a silence without a second source must last.
    """

    phi: float = 8.0
    tolerated_stall_s: float = 0.5
    least_deviation_s: float = 0.1
    floor_s: float = 1.0
    ceiling_s: float = 10.0
    confirm_s: float = 0.5
    window: int = 400
    estimates: Mapping[Phase, Estimate] = field(
        default_factory=lambda: {
            Phase.IDLE: Estimate(0.25, 0.1),
            Phase.DECODE: Estimate(0.25, 0.1),
            Phase.PREFILL: Estimate(0.75, 0.4),  # a long prompt is computed in few, long collective-free stretches
        }
    )
    slow_limits_s: Mapping[Phase, float] = field(
        default_factory=lambda: {
            Phase.STARTING: 900.0,
            Phase.LOADING: 900.0,
            Phase.COMPILING: 900.0,
            Phase.REGROUPING: 60.0,
            Phase.PARKED: 60.0,
            Phase.STOPPED: math.inf,
        }
    )


class IntervalHistory:
    """The last intervals of one phase, and the limit that they give. `window` of them count."""

    ESTIMATED = 20
    """As how many intervals the first estimate counts, until the window has pushed it out."""

    def __init__(self, policy: IntervalPolicy, estimate: Estimate) -> None:
        self._policy = policy
        self._z = NormalDist().inv_cdf(1.0 - 10.0**-policy.phi)
        self._intervals: deque[float] = deque()
        self._sum = self._squares = 0.0
        for _ in range(self.ESTIMATED // 2):
            self._append(max(estimate.mean_s - estimate.deviation_s, 0.0))
            self._append(estimate.mean_s + estimate.deviation_s)

    def add(self, interval_s: float) -> None:
        """Learn from an interval that ended. One beyond the limit counts as the limit: a rank that has become slow
        widens it, step by step. Intervals that say nothing about ranks at work must not come here (`progress`)."""
        self._append(min(max(interval_s, 0.0), self.limit_s))

    @property
    def mean_s(self) -> float:
        return self._sum / len(self._intervals)

    @property
    def deviation_s(self) -> float:
        variance = self._squares / len(self._intervals) - self.mean_s**2
        return max(math.sqrt(max(variance, 0.0)), self._policy.least_deviation_s)

    @property
    def limit_s(self) -> float:
        """The silence from which a rank is suspect."""
        limit = self.mean_s + self._z * self.deviation_s + self._policy.tolerated_stall_s
        return min(max(limit, self._policy.floor_s), self._policy.ceiling_s)

    def phi(self, silent_s: float) -> float:
        """How suspicious a silence is; infinite where the probability is below what a float can say."""
        late = (silent_s - self._policy.tolerated_stall_s - self.mean_s) / self.deviation_s
        probability = 0.5 * math.erfc(late / math.sqrt(2.0))
        return -math.log10(probability) if probability > 0.0 else math.inf

    def _append(self, interval_s: float) -> None:
        self._intervals.append(interval_s)
        self._sum += interval_s
        self._squares += interval_s**2
        if len(self._intervals) > self._policy.window:
            oldest = self._intervals.popleft()
            self._sum -= oldest
            self._squares -= oldest**2


class SilenceLimits:
    """Limits of all phases. The ranks of a group share them: they run the same code on the same kind of machine."""

    def __init__(self, policy: IntervalPolicy) -> None:
        self._policy = policy
        self._histories = {phase: IntervalHistory(policy, estimate) for phase, estimate in policy.estimates.items()}

    def learn(self, phase: Phase, interval_s: float) -> None:
        if history := self._histories.get(phase):
            history.add(interval_s)

    def limit_s(self, phase: Phase) -> float:
        history = self._histories.get(phase)
        return history.limit_s if history else self._policy.slow_limits_s[phase]

    def phi(self, phase: Phase, silent_s: float) -> float | None:
        history = self._histories.get(phase)
        return history.phi(silent_s) if history else None
