"""Outputs of expert layers are where a graph behind them was told that they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.runner import moe_runner

from elastic_daemon.engine.graph_outputs import GraphOutputs

LARGEST, WIDTH = 8, 3


def layer(shared: bool = False) -> SimpleNamespace:
    """One whose experts add one; shared ones add two."""
    routed = lambda hidden, *_: hidden + 1  # noqa: E731
    both = lambda hidden, *_: (hidden + 2, hidden + 1)  # noqa: E731
    return SimpleNamespace(_forward_impl=both if shared else routed)


def step(layer: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tokens: int, value: float) -> Any:
    """As vLLM's operator does it."""
    monkeypatch.setattr(moe_runner, "get_layer_from_name", lambda name: layer)
    operator = moe_runner._moe_forward
    return operator(torch.full((tokens, WIDTH), value), torch.empty(0), None, None, "layer", 0)


def test_they_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, experts = GraphOutputs(LARGEST), layer()
    outputs.keep_of(0, experts)
    first = step(experts, monkeypatch, LARGEST, 1.0)
    kept = [torch.empty(LARGEST, WIDTH) for _ in range(50)]  # whatever else is allocated meanwhile
    again = step(experts, monkeypatch, 5, 4.0)
    assert isinstance(first, torch.Tensor) and isinstance(again, torch.Tensor) and len(kept) == 50
    assert first.data_ptr() == again.data_ptr()
    assert again.shape == (5, WIDTH) and bool((again == 5.0).all())


def test_a_layer_leaves_alone_what_the_one_before_it_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, layers = GraphOutputs(LARGEST), [layer() for _ in range(3)]
    for number, experts in enumerate(layers):
        outputs.keep_of(number, experts)
    found = [step(experts, monkeypatch, 4, float(number)) for number, experts in enumerate(layers[:2])]
    assert [float(output.mean()) for output in found if isinstance(output, torch.Tensor)] == [1.0, 2.0]


def test_shared_experts_have_a_place_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, experts = GraphOutputs(LARGEST), layer(shared=True)
    outputs.keep_of(0, experts)
    shared, routed = step(experts, monkeypatch, 4, 0.0)
    assert (float(shared.mean()), float(routed.mean())) == (2.0, 1.0)
    again, _ = step(experts, monkeypatch, 4, 0.0)
    assert again.data_ptr() == shared.data_ptr()


def test_a_step_too_large_for_graphs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, experts = GraphOutputs(LARGEST), layer()
    outputs.keep_of(0, experts)
    found = step(experts, monkeypatch, LARGEST + 1, 0.0)
    assert isinstance(found, torch.Tensor) and found.shape[0] == LARGEST + 1
    assert outputs._memory == {}
