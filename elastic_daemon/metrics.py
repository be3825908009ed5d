"""Prometheus metrics of the supervisor, prefix `elastic_`."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from elastic_daemon.health import HealthView
from elastic_daemon.membership import RankState
from elastic_daemon.protocol import RecoveryReport

PHASE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """One registry per supervisor, so that tests can have several."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._epoch = Gauge("elastic_epoch", "Current membership epoch", registry=registry)
        self._ranks = Gauge("elastic_ranks", "Ranks by state", ["state"], registry=registry)
        self._safety = Gauge(
            "elastic_expert_safety", "Rank losses that need no disk read (NaN before a placement)", registry=registry
        )
        self._in_flight = Gauge("elastic_in_flight", "Requests in flight", registry=registry)
        self._seconds = Histogram(
            "elastic_recovery_seconds",
            "Seconds of a recovery by phase",
            ["kind", "phase"],
            registry=registry,
            buckets=PHASE_BUCKETS,
        )
        self._preserved = Counter(
            "elastic_requests_preserved_total",
            "Requests carried through a recovery, or off a draining rank",
            ["how"],
            registry=registry,
        )
        self._verdicts = Counter(
            "elastic_watchdog_verdicts_total",
            "Verdicts of the watchdog, acted on or not",
            ["signal", "verdict"],
            registry=registry,
        )
        self._loaded = {
            unit: Counter(
                f"elastic_expert_load_{unit}_total",
                f"{unit.capitalize()} of experts that ranks have taken in, by where they came from",
                ["source"],
                registry=registry,
            )
            for unit in ("bytes", "seconds")
        }
        self._refused = Counter(
            "elastic_requests_refused_total", "Requests that would have waited too long (503)", registry=registry
        )
        self._lost = Counter("elastic_requests_lost_total", "Requests that a recovery lost", registry=registry)

    def refused(self, requests: int) -> None:
        self._refused.inc(requests)

    def verdict(self, signal: str, verdict: str) -> None:
        self._verdicts.labels(signal, verdict).inc()

    def loaded(self, source: str, size: int, seconds: float) -> None:
        """A rank has taken in `size` bytes of experts from `source`: peer, host or checkpoint."""
        self._loaded["bytes"].labels(source).inc(size)
        self._loaded["seconds"].labels(source).inc(seconds)

    def recovery(self, report: RecoveryReport) -> None:
        for phase, seconds in report.seconds.items():
            self._seconds.labels(report.kind.value, phase).observe(seconds)
        if (counts := report.requests) is not None:
            for how, number in (("kept", counts.kept), ("replayed", counts.replayed), ("restarted", counts.restarted)):
                self._preserved.labels(how).inc(number)
            self._lost.inc(counts.lost)

    def moved(self, requests: int) -> None:
        """Off a draining rank, while the group served."""
        self._preserved.labels("moved").inc(requests)

    def render(self, view: HealthView) -> bytes:
        """The text exposition, with gauges as of `view`."""
        self._in_flight.set(view.in_flight)
        snapshot = view.snapshot
        safety = snapshot.expert_safety if snapshot is not None else None
        # Not 0 before the first placement: that would say that the next loss costs a disk read.
        self._safety.set(safety if safety is not None else math.nan)
        if snapshot is not None:
            self._epoch.set(snapshot.epoch)
            for state in RankState:
                self._ranks.labels(state.value).set(sum(rank.state is state for rank in snapshot.ranks))
        return generate_latest(self._registry)
