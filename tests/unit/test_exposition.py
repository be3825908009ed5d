"""Our text of a registry is what the library makes of it."""

from __future__ import annotations

import math

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Summary, generate_latest
from prometheus_client.metrics_core import Metric

from elastic_daemon.telemetry.exposition import Exposition

ODD = str.maketrans("+-.", "___")


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    counter = Counter("vllm:tokens", 'back\\slash and\nline and "quotes"', ["model_name", "engine"], registry=registry)
    counter.labels('a"b\\c\nd', "0").inc(3)
    counter.labels("plain", "1").inc(1e9)
    for number, value in enumerate((0.0, -1.5, math.nan, math.inf, -math.inf, 12345678.9)):
        Gauge(f"gauge_{number}", "", registry=registry).set(value)
    labelled = Gauge("by_state", "states", ["z", "a"], registry=registry)
    labelled.labels("1", "2").set(7)
    histogram = Histogram("seconds", "of something", ["engine"], registry=registry)
    histogram.labels("0").observe(0.3)
    Histogram("never", "observed", ["engine"], registry=registry)
    Summary("size", "of something", registry=registry).observe(2)
    Histogram("below_zero", "has no sum", buckets=(-1.0, 1.0), registry=registry).observe(0.5)
    for value in (999999.0, 1e6, 1234567.0, 1e16, -1e6, 1e-7, 5):
        Gauge(f"number_{value:g}".translate(ODD), "", registry=registry).set(value)
    Gauge("asked", "a function", registry=registry).set_function(lambda: 7.5)
    asked = Gauge("asked_each", "a function", ["of"], registry=registry)
    asked.labels("one").set_function(lambda: 1.5)
    asked.labels("other").set(2)
    Gauge("no_child", "yet", ["of"], registry=registry)
    Info("build", "of this", registry=registry).info({"version": "1"})
    return registry


def test_same_text(registry: CollectorRegistry) -> None:
    exposition = Exposition(registry)
    for _ in range(2):
        assert exposition.render().splitlines() == generate_latest(registry).decode().splitlines()


def test_values_are_new_each_time(registry: CollectorRegistry) -> None:
    exposition = Exposition(registry)
    before = exposition.render()
    more = Counter("more", "of it", registry=registry)
    more.inc(5)
    assert "more_total 5.0" in exposition.render()
    assert "more" not in before
    more.inc()
    assert "more_total 6.0" in exposition.render()


def test_a_child_that_goes(registry: CollectorRegistry) -> None:
    exposition = Exposition(registry)
    some = Gauge("some", "of them", ["of"], registry=registry)
    some.labels("one").set(1)
    some.labels("other").set(2)
    assert 'some{of="one"} 1.0' in exposition.render()
    some.remove("one")
    assert exposition.render() == generate_latest(registry).decode()


def test_a_family_of_an_unusual_kind() -> None:
    class Odd:
        def collect(self) -> list[Metric]:
            family = Metric("odd", "things", "unknown")
            family.add_sample("odd", {"a": "b"}, 1.0)
            return [family]

    registry = CollectorRegistry()
    registry.register(Odd())  # type: ignore[arg-type]
    assert Exposition(registry).render() == generate_latest(registry).decode()
