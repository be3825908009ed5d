"""The text of a registry, as `prometheus_client.generate_latest` gives it, in a tenth of its time.

vLLM has some two thousand samples, whose names and labels stay: the library makes an object of each sample, writes and
escapes it each time, and the event loop of the front end does nothing else for 20 ms. Counters, gauges and histograms
are read here without that; for it this module knows their private attributes, and its tests compare with the library.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

READ_HERE = (Counter, Gauge, Histogram)

_PLAIN_BELOW = 1e6
"""Go, and so the format, writes larger numbers with an exponent."""


class Exposition:
    """What is asked for again and again of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """From here on this process tells no times of creation: nobody looks at them, and they are not read here."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry
        self._metrics: dict[Any, _Read] = {}

    def render(self) -> str:
        return "".join([text for collector in self._collectors for text in self._texts(collector)])

    @property
    def _collectors(self) -> list[Any]:
        """In the order of the library."""
        with self._registry._lock:
            return list(self._registry._collector_to_names)

    def _texts(self, collector: Any) -> Iterable[str]:
        lines = None
        if type(collector) in READ_HERE:
            read = self._metrics.get(collector)
            if read is None:
                read = self._metrics[collector] = _Read(collector)
            lines = read.lines()
        return lines or [generate_latest(_Only(family)).decode() for family in collector.collect()]


class _Read:
    """A counter, gauge or histogram of the library, with the beginnings of its lines by the values of its labels."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        self._heading = _heading(metric._get_metric())
        self._starts: dict[tuple[str, ...], list[str]] = {}

    def lines(self) -> list[str] | None:
        """None where the library has other samples than those that are read here, such as times of creation."""
        metric = self._metric
        if not metric._name.replace(":", "_").isidentifier():  # it needs quotes
            return None
        if metric._labelnames:
            with metric._lock:
                children = list(metric._metrics.items())
        else:
            children = [((), metric)]
        lines = [self._heading]
        for labels, child in children:
            starts = self._starts.get(labels)
            if starts is None:
                starts = self._starts[labels] = self._starts_of(labels, child)
            values = _values(child)
            if len(values) != len(starts):
                return None
            lines += [f"{start}{_number(value)}\n" for start, value in zip(starts, values, strict=True)]
        return lines

    def _starts_of(self, labels: tuple[str, ...], child: Any) -> list[str]:
        name, own = self._metric._name, dict(zip(self._metric._labelnames, labels, strict=True))
        return [_start(name + sample.name, {**own, **sample.labels}) for sample in child._child_samples()]


def _values(child: Any) -> list[float]:
    """In the order of the library's samples."""
    if "_child_samples" in vars(child):  # a gauge that asks a function
        return [sample.value for sample in child._child_samples()]
    if not isinstance(child, Histogram):
        return [child._value.get()]
    values, so_far = [], 0.0
    for bucket in child._buckets:
        so_far += bucket.get()
        values.append(so_far)
    values.append(so_far)
    return [*values, child._sum.get()] if child._upper_bounds[0] >= 0 else values


def _heading(family: Metric) -> str:
    name = family.name + "_total" if family.type == "counter" else family.name
    help_ = family.documentation.replace("\\", r"\\").replace("\n", r"\n")
    return f"# HELP {name} {help_}\n# TYPE {name} {family.type}\n"


def _number(value: float) -> str:
    if -_PLAIN_BELOW < value < _PLAIN_BELOW:
        return repr(float(value))
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def _start(name: str, labels: dict[str, str]) -> str:
    escaped = (
        (label, value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\""))
        for label, value in sorted(labels.items())
    )
    told = ",".join(f'{label}="{value}"' for label, value in escaped)
    return f"{name}{{{told}}} " if told else f"{name} "


class _Only(CollectorRegistry):
    """A registry of one family as it is now."""

    def __init__(self, family: Metric) -> None:
        super().__init__()
        self._family = family

    def collect(self):  # type: ignore[no-untyped-def]
        yield self._family
