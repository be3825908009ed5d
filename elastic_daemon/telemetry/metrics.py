"""Prometheus metrics of the supervisor, prefix `elastic_`."""

from __future__ import annotations

import math
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from elastic_daemon.membership import RankState, Status
from elastic_daemon.placement import Source
from elastic_daemon.protocol import RankEvent, RankRegrouped, RankRespread, RecoveryKind, RecoveryReport
from elastic_daemon.routes.health import HealthView
from elastic_daemon.telemetry.exposition import Exposition

METRICS_TYPE = "text/plain; version=0.0.4"

PHASE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

GAP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""The bar for the gap of a client is 0.2 s; requests may be held for a minute."""

LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 5.0)
"""The bar is 0.05 s."""

PRESERVED = ("kept", "replayed", "restarted", "moved")
"""How a request was carried through a recovery; `moved`: off a draining rank."""


class Metrics:
    """One registry per supervisor, so that tests can have several."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._text = Exposition(registry)
        self._epoch = Gauge("elastic_epoch", "Current membership epoch", registry=registry)
        self._ranks = Gauge("elastic_ranks", "Ranks by state", ["state"], registry=registry)
        self._safety = Gauge(
            "elastic_expert_safety", "Rank losses that need no disk read (NaN before a placement)", registry=registry
        )
        self._status = Gauge(
            "elastic_status", "1 for the status that /health shows, else 0", ["status"], registry=registry
        )
        self._wanted = Gauge("elastic_ranks_wanted", "Ranks that are to serve", registry=registry)
        self._survivable = Gauge(
            "elastic_survivable_losses",
            "Rank losses that leave every expert a slot (-1: an expert has none)",
            registry=registry,
        )
        self._watched = Gauge(
            "elastic_watchdog_up", "0 while nobody watches the GPUs although somebody is to", registry=registry
        )
        self._in_flight = Gauge("elastic_in_flight", "Requests in flight", registry=registry)
        self._gap = Histogram(
            "elastic_client_gap_seconds",
            "Silence between two tokens of a request with a change of the group in between",
            registry=registry,
            buckets=GAP_BUCKETS,
        )
        self._lag = Histogram(
            "elastic_control_loop_lag_seconds",
            "How late the supervisor's loop turns, sampled ten times a second",
            registry=registry,
            buckets=LAG_BUCKETS,
        )
        self._streams = Gauge("elastic_event_streams", "Readers of /events as a stream", registry=registry)
        self._dropped = Counter(
            "elastic_event_streams_dropped_total", "Readers that were cut off: too slow", registry=registry
        )
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
        self._lost = Counter(
            "elastic_requests_lost_total", "Requests lost: by a recovery, or with the front end", registry=registry
        )

        self._from_zero()

    def _from_zero(self) -> None:
        """Make samples whose labels are known beforehand: an increase is seen only of what was 0 before."""
        for kind in RecoveryKind:
            self._seconds.labels(kind.value, "total")
        for how in PRESERVED:
            self._preserved.labels(how)
        for source in Source:
            for counter in self._loaded.values():
                counter.labels(source)

    def refused(self, requests: int) -> None:
        self._refused.inc(requests)

    def verdict(self, signal: str, verdict: str) -> None:
        self._verdicts.labels(signal, verdict).inc()

    def count_loads(self, event: RankEvent) -> None:
        """The experts that a rank has taken in, if `event` tells of any."""
        if isinstance(event, RankRegrouped):
            for source, (size, seconds) in event.loaded.items():
                self.loaded(source, size, seconds)
        elif isinstance(event, RankRespread):
            self.loaded(Source.PEER, event.bytes, event.seconds)

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
            self.lost(counts.lost)

    def lost(self, requests: int) -> None:
        self._lost.inc(requests)

    def client_gap(self, seconds: float) -> None:
        self._gap.observe(seconds)

    def loop_lag(self, seconds: float) -> None:
        self._lag.observe(seconds)

    def event_streams(self, number: int) -> None:
        self._streams.set(number)

    def event_stream_dropped(self) -> None:
        self._dropped.inc()

    def moved(self, requests: int) -> None:
        """Off a draining rank, while the group served."""
        self._preserved.labels("moved").inc(requests)

    def totals(self) -> dict[str, Any]:
        """For `/totals`: of the counters that `render` shows, those that the dashboard needs."""
        counters = {how: self._preserved.labels(how) for how in PRESERVED}
        counters |= {"lost": self._lost, "refused": self._refused}
        (gap,) = self._gap.collect()
        *buckets, count, total = gap.samples
        return {
            "requests": {name: _value(counter) for name, counter in counters.items()},
            "client_gap": {
                "count": int(count.value),
                "sum": total.value,
                "buckets": {bucket.labels["le"]: int(bucket.value) for bucket in buckets},
            },
        }

    def render(self, view: HealthView) -> str:
        """The text exposition, with gauges as of `view`."""
        self._in_flight.set(view.in_flight)
        self._watched.set(view.watchdog.trouble is None)
        for status in Status:
            self._status.labels(status.value).set(view.status is status)
        snapshot = view.snapshot
        self._wanted.set(snapshot.target if snapshot is not None else view.target)
        safety = snapshot.expert_safety if snapshot is not None else None
        # Not 0 before the first placement: that would say that the next loss costs a disk read.
        self._safety.set(safety if safety is not None else math.nan)
        self._survivable.set(snapshot.survivable_losses if snapshot is not None else math.nan)
        if snapshot is not None:
            self._epoch.set(snapshot.epoch)
            for state in RankState:
                self._ranks.labels(state.value).set(sum(rank.state is state for rank in snapshot.ranks))
        return self._text.render()


def _value(counter: Counter) -> int:
    """Of one without labels, or with all of them given."""
    (family,) = counter.collect()
    return int(family.samples[0].value)
