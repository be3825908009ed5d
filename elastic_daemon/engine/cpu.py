"""What vLLM's CPU backend lacks for expert parallelism with load balancing.

Two named functions of vLLM are replaced, both without effect on other devices; `tests/contract` fails when vLLM changes
them:

- `base_router.eplb_map_to_physical_and_record` is the identity where Triton is missing: logical ids would be taken for
  physical ones.
- `CPUUnquantizedExperts.apply` ignores `expert_map`: ids of experts on other ranks would index past the local weights.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.router import base_router

_KNUTH_MULTIPLIER = 2654435769
"""floor(2^32 / golden ratio): spreads consecutive tokens over replicas, as vLLM's Triton kernel does."""

_stock_apply = CPUUnquantizedExperts.apply


def map_to_physical_and_record(
    topk_ids: torch.Tensor,
    expert_load_view: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    record_enabled: torch.Tensor,
    num_unpadded_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose a replica for each token and expert, and count the load.

    Shapes: topk_ids [tokens, k]; expert_load_view [physical]; logical_to_physical_map [logical, max copies];
    logical_replica_count [logical]. Returns physical ids, [tokens, k] of the dtype of `topk_ids`. An id of no expert,
    such as -1 where a token has none, becomes -1 and is not counted.
    """
    logical = topk_ids.long()
    valid = (logical >= 0) & (logical < logical_replica_count.shape[0])
    logical = logical.where(valid, 0)
    tokens = torch.arange(logical.shape[0]).unsqueeze(1)
    replica = (tokens * _KNUTH_MULTIPLIER & 0xFFFFFFFF) % logical_replica_count[logical].clamp(min=1)
    physical = logical_to_physical_map[logical, replica].where(valid, -1)
    if record_enabled:
        counted = physical if num_unpadded_tokens is None else physical[: int(num_unpadded_tokens)]
        expert_load_view += torch.bincount(counted[counted >= 0], minlength=expert_load_view.shape[0]).int()
    return physical.to(topk_ids.dtype)


def apply_local_experts(self: CPUUnquantizedExperts, *args: Any, **kwargs: Any) -> None:
    """`CPUUnquantizedExperts.apply` for a rank that holds some of the experts: others contribute zero."""
    expert_map = kwargs["expert_map"]
    if expert_map is not None:
        ids = kwargs["topk_ids"].long()
        local = expert_map[ids.clamp(min=0)]
        elsewhere = (ids < 0) | (local < 0)  # an id of -1 would be taken for the last expert
        kwargs["topk_ids"] = local.masked_fill(elsewhere, 0).to(kwargs["topk_ids"].dtype)
        kwargs["topk_weights"] = kwargs["topk_weights"].masked_fill(elsewhere, 0.0)
    _stock_apply(self, *args, **kwargs)


def enable_expert_parallelism() -> None:
    """Install both replacements in this process. Idempotent."""
    base_router.eplb_map_to_physical_and_record = map_to_physical_and_record
    CPUUnquantizedExperts.apply = apply_local_experts
