"""What a daemon's /metrics says."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


def samples_of(text: str, name: str) -> list[Sample]:
    """All samples of this name, with their labels."""
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return [sample for sample in samples if sample.name == name]
