"""SIGKILL under streams that depend on more than their tokens: seeds, penalties and grammars go on, too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_daemon.drill.load import prompts_for, prompts_of
from elastic_daemon.drill.sampling import GREEDY, PENALISED, Sampling, constrained, seeded
from tests.e2e.cluster import Cluster, Stream, assert_same, run_streams

pytestmark = pytest.mark.chaos

TOKENS = 90
PART = 64
"""Tokens of a step at most: prompts, and what is computed again, are prefilled in parts."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "integer", "maximum": 99}, "minItems": 50}},
    "required": ["a"],
    "additionalProperties": False,
}
UNSURE = prompts_of([seeded(0)])[0]
LONG = f"{UNSURE} " + "1 2 3 4 5 6 7 8 9 " * 8


def kinds(number: int) -> list[tuple[Sampling, str]]:
    """One stream of each kind, with its prompt."""
    sure, drawn = prompts_for(number + 1)[-1], seeded(number, top_p=0.9)
    bound = constrained(TOKENS)
    return [
        (GREEDY, sure),
        (drawn, UNSURE),
        (Sampling("long", drawn.fields), LONG),
        (PENALISED, sure),
        (bound, sure),
        (Sampling("schema", {"structured_outputs": {"json": SCHEMA}}), sure),
        (Sampling("all", {**drawn.fields, **PENALISED.fields, **bound.fields}), UNSURE),
    ]


RANKS = 4
STREAMS = [one for number in range(RANKS) for one in kinds(number)]
"""As many kinds as have no divisor in common with the number of ranks: each rank gets one stream of each."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    arguments = ("--data-parallel-size", str(RANKS), "--max-num-batched-tokens", str(PART), "--max-num-seqs", "16")
    with Cluster(tmp_path / "run", *arguments) as running:
        yield running


def run(cluster: Cluster, **disturbance: Any) -> list[Stream]:
    bodies = [{**sampling.fields, "request_id": f"{sampling.kind}-{n}"} for n, (sampling, _) in enumerate(STREAMS)]
    return run_streams(cluster, [prompt for _, prompt in STREAMS], TOKENS, bodies=bodies, **disturbance)


def test_all_go_on_where_they_were(cluster: Cluster) -> None:
    reference = run(cluster)
    by_kind: dict[str, set[str]] = {}
    for (sampling, _), seen in zip(STREAMS, reference, strict=True):
        assert seen.error is None and len(seen.token_ids) == TOKENS
        by_kind.setdefault(sampling.kind, set()).add(seen.text)
    assert {kind for kind, texts in by_kind.items() if len(texts) == RANKS} >= {"seeded", "long", "all"}, "seeds matter"
    disturbed = run(cluster, during=lambda: cluster.kill(1), at_tokens=len(STREAMS) * TOKENS // 2)
    assert_same(disturbed, reference)
    report = cluster.health()["last_shrink"]["requests"]
    assert report["lost"] == 0 and report["kept"] > 0
    moved = Counter(
        event["request"].split("-")[1] for event in cluster.logged("request_readmitted") if event["tokens"] > 0
    )
    assert set(moved) == {sampling.kind for sampling, _ in kinds(0)}, "a stream of each kind has moved"
    cluster.verify_experts()
