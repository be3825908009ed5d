"""The text of a registry, as `prometheus_client.generate_latest` gives it, in less than half of its time.

vLLM has some two thousand samples, whose names and labels stay: `generate_latest` writes and escapes them each time,
and the event loop of the front end does nothing else for 20 ms.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

SIMPLE = frozenset({"counter", "gauge", "histogram", "summary"})


class Exposition:
    """What is asked for again and again of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._starts: dict[tuple[str, ...], str] = {}  # of lines, by name and labels

    def render(self) -> str:
        return "".join([self._family(family) for family in self._registry.collect()])

    def _family(self, family: Metric) -> str:
        if family.type not in SIMPLE or any(_is_special(sample.name, family) for sample in family.samples):
            return generate_latest(_Only(family)).decode()
        name = family.name + "_total" if family.type == "counter" else family.name
        help_ = family.documentation.replace("\\", r"\\").replace("\n", r"\n")
        lines = [f"# HELP {name} {help_}\n# TYPE {name} {family.type}\n"]
        starts = self._starts
        for sample in family.samples:
            key = (sample.name, *sample.labels, *sample.labels.values())
            start = starts.get(key)
            if start is None:
                start = starts[key] = _start(sample.name, sample.labels)
            lines.append(f"{start}{floatToGoString(sample.value)}\n")  # type: ignore[no-untyped-call]
        return "".join(lines)


def _is_special(name: str, family: Metric) -> bool:
    """A sample that goes under a heading of its own, or has a name that needs quotes."""
    return name.endswith(("_created", "_gsum", "_gcount")) or not name.replace(":", "_").isidentifier()


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
