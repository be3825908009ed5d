"""The two functions of vLLM's CPU backend that are replaced for expert parallelism, against slow references."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.router import base_router

from elastic_daemon.engine.cpu import apply_local_experts, enable_expert_parallelism, map_to_physical_and_record

pytestmark = pytest.mark.contract


@st.composite
def routings(draw: st.DrawFn) -> dict[str, Any]:
    """A placement in which every expert has a copy, and tokens that choose among the experts."""
    experts = draw(st.integers(1, 6))
    extra = draw(st.lists(st.integers(0, experts - 1), max_size=8))
    physical_to_logical = draw(st.permutations([*range(experts), *extra]))
    k = draw(st.integers(1, experts))
    token = st.lists(st.integers(0, experts - 1), min_size=k, max_size=k, unique=True)
    tokens = draw(st.lists(token, min_size=1, max_size=12))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    copies = [[p for p, e in enumerate(physical_to_logical) if e == expert] for expert in range(experts)]
    width = max(map(len, copies)) + 2
    slots = len(physical_to_logical)
    return {
        "physical_to_logical": physical_to_logical,
        "ids": torch.tensor(tokens, dtype=dtype),
        "table": torch.tensor([row + [-1] * (width - len(row)) for row in copies]),
        "count": torch.tensor([len(row) for row in copies]),
        "load": torch.tensor(draw(st.lists(st.integers(0, 5), min_size=slots, max_size=slots)), dtype=torch.int32),
        "unpadded": draw(st.none() | st.integers(0, len(tokens))),
    }


@settings(max_examples=50)
@given(case=routings(), record=st.booleans())
def test_each_id_becomes_a_copy_of_the_same_expert_and_is_counted_once(case: dict[str, Any], record: bool) -> None:
    ids, load = case["ids"], case["load"].clone()
    unpadded = None if case["unpadded"] is None else torch.tensor(case["unpadded"], dtype=torch.int32)
    physical = map_to_physical_and_record(ids, load, case["table"], case["count"], torch.tensor(record), unpadded)
    assert (physical.shape, physical.dtype) == (ids.shape, ids.dtype)
    assert torch.tensor(case["physical_to_logical"])[physical.long()].tolist() == ids.tolist()
    expected = case["load"].tolist()
    if record:
        for row in physical.tolist()[: case["unpadded"]]:
            for expert in row:
                expected[expert] += 1
    assert load.tolist() == expected


@settings(max_examples=20)
@given(case=routings())
def test_the_choice_depends_on_nothing_but_position_and_expert(case: dict[str, Any]) -> None:
    """All ranks must choose alike for a token, also when an earlier step left other counts."""
    off = torch.tensor(False)
    once, again = (
        map_to_physical_and_record(case["ids"], load, case["table"], case["count"], off)
        for load in (case["load"].clone(), torch.zeros_like(case["load"]))
    )
    assert torch.equal(once, again)


@pytest.mark.parametrize("copies", [2, 3, 4])
def test_consecutive_tokens_spread_over_copies(copies: int) -> None:
    tokens = 600
    load = torch.zeros(copies, dtype=torch.int32)
    table, count = torch.arange(copies).unsqueeze(0), torch.tensor([copies])
    ids = torch.zeros((tokens, 1), dtype=torch.int32)
    map_to_physical_and_record(ids, load, table, count, torch.tensor(True))
    assert load.sum() == tokens
    assert load.min() >= 0.8 * tokens / copies


def test_replica_choice_is_that_of_the_gpu_kernel() -> None:
    tokens, copies = 50, 7
    table, count = torch.arange(copies).unsqueeze(0), torch.tensor([copies])
    ids = torch.zeros((tokens, 1), dtype=torch.int64)
    chosen = map_to_physical_and_record(ids, torch.zeros(copies, dtype=torch.int32), table, count, torch.tensor(False))
    assert chosen.flatten().tolist() == [(token * 2654435769 % 2**32) % copies for token in range(tokens)]


@settings(max_examples=20)
@given(case=routings(), data=st.data())
def test_ids_of_no_expert_stay_none_and_are_not_counted(case: dict[str, Any], data: st.DataObject) -> None:
    count = case["ids"].numel()
    drawn = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    nowhere = torch.tensor(drawn).view(case["ids"].shape)
    ids = case["ids"].masked_fill(nowhere, data.draw(st.sampled_from([-1, len(case["count"])])))
    loads = case["load"].clone(), torch.zeros_like(case["load"])
    on, off = torch.tensor(True), torch.tensor(False)
    physical = map_to_physical_and_record(ids, loads[0], case["table"], case["count"], on)
    whole = map_to_physical_and_record(case["ids"], loads[1], case["table"], case["count"], off)
    assert torch.equal(physical, whole.masked_fill(nowhere, -1))
    counted = torch.bincount(physical[physical >= 0].long(), minlength=len(case["load"]))
    assert torch.equal(loads[0], case["load"] + counted)


HIDDEN, INTERMEDIATE = 64, 32


def moe_reference(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: Any, ids: Any) -> torch.Tensor:
    """A mixture of SwiGLU experts, one token and one expert at a time."""
    output = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            gate, up = (w13[expert] @ x[token]).chunk(2)
            output[token] += weight * (w2[expert] @ (silu(gate) * up))
    return output


def run_experts(w13: torch.Tensor, w2: torch.Tensor, **inputs: Any) -> torch.Tensor:
    kernel = SimpleNamespace(_use_zentorch=False, w1_bias=None, w2_bias=None, isa=CPUUnquantizedExperts.isa)
    output = torch.full_like(inputs["hidden_states"], float("nan"))
    apply_local_experts(
        kernel,
        output=output,
        w1=cpu_prepack_moe_weight(w13, kernel.isa),
        w2=cpu_prepack_moe_weight(w2, kernel.isa),
        activation=MoEActivation.SILU,
        a1q_scale=None,
        a2_scale=None,
        workspace13=torch.empty(0),
        workspace2=torch.empty(0),
        expert_tokens_meta=None,
        apply_router_weight_on_input=False,
        **inputs,
    )
    return output


@pytest.mark.parametrize("ranks", [1, 2, 4])
@settings(max_examples=15)
@given(tokens=st.integers(1, 9), k=st.integers(1, 3), seed=st.integers(0, 1000))
def test_partial_sums_of_ranks_make_the_whole(ranks: int, tokens: int, k: int, seed: int) -> None:
    experts = 8
    random = torch.Generator().manual_seed(seed)
    w13 = torch.randn((experts, 2 * INTERMEDIATE, HIDDEN), generator=random) / 8
    w2 = torch.randn((experts, HIDDEN, INTERMEDIATE), generator=random) / 8
    x = torch.randn((tokens, HIDDEN), generator=random)
    weights, ids = torch.rand((tokens, experts), generator=random).topk(k)
    ids = ids.int()
    before = (weights.clone(), ids.clone())
    total = torch.zeros_like(x)
    for rank in range(ranks):
        local, expert_map, _ = determine_expert_map(ranks, rank, experts)
        own = slice(rank * local, (rank + 1) * local)
        total += run_experts(
            w13[own].contiguous(),
            w2[own].contiguous(),
            hidden_states=x,
            topk_weights=weights,
            topk_ids=ids,
            global_num_experts=experts,
            expert_map=expert_map,
        )
    torch.testing.assert_close(total, moe_reference(x, w13, w2, weights, ids), rtol=1e-4, atol=1e-4)
    assert torch.equal(weights, before[0]) and torch.equal(ids, before[1]), "the routing of other layers is shared"


def test_a_rank_without_a_token_for_it_adds_zero() -> None:
    w13, w2 = torch.randn((2, 2 * INTERMEDIATE, HIDDEN)), torch.randn((2, HIDDEN, INTERMEDIATE))
    output = run_experts(
        w13,
        w2,
        hidden_states=torch.randn((3, HIDDEN)),
        topk_weights=torch.ones((3, 2)),
        topk_ids=torch.tensor([[0, 1]] * 3, dtype=torch.int32),
        global_num_experts=4,
        expert_map=torch.tensor([-1, -1, 0, 1], dtype=torch.int32),
    )
    assert torch.equal(output, torch.zeros_like(output))


def test_a_token_without_expert_adds_zero() -> None:
    """Its id is -1; the last expert of the map, which -1 would index, is local here."""
    w13, w2 = torch.randn((2, 2 * INTERMEDIATE, HIDDEN)), torch.randn((2, HIDDEN, INTERMEDIATE))
    output = run_experts(
        w13,
        w2,
        hidden_states=torch.randn((3, HIDDEN)),
        topk_weights=torch.ones((3, 2)),
        topk_ids=torch.full((3, 2), -1, dtype=torch.int32),
        global_num_experts=4,
        expert_map=torch.tensor([-1, -1, 0, 1], dtype=torch.int32),
    )
    assert torch.equal(output, torch.zeros_like(output))


def test_installing_twice_is_installing_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_router, "eplb_map_to_physical_and_record", None)
    monkeypatch.setattr(CPUUnquantizedExperts, "apply", CPUUnquantizedExperts.apply)
    enable_expert_parallelism()
    enable_expert_parallelism()
    assert base_router.eplb_map_to_physical_and_record is map_to_physical_and_record
    assert CPUUnquantizedExperts.apply is apply_local_experts
    test_a_rank_without_a_token_for_it_adds_zero()
