"""Nothing is compiled when a request first asks for logprobs or samples without a seed."""

from __future__ import annotations

import dis
import inspect
from types import CodeType

import pytest
import torch
from torch._dynamo.utils import counters
from vllm.v1.sample import sampler
from vllm.v1.sample.ops import topk_topp_sampler

from elastic_daemon.engine.sampling import enable_sampling_without_compilation

pytestmark = pytest.mark.contract


def names(code: CodeType) -> set[str]:
    return {str(one.argval) for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL"}


def test_vllm_calls_both_by_their_global_names() -> None:
    assert "batched_count_greater_than" in names(inspect.unwrap(sampler.Sampler.gather_logprobs).__code__)
    assert "compiled_random_sample" in names(topk_topp_sampler.TopKTopPSampler.forward_cpu.__code__)


def test_both_give_what_they_should_and_compile_nothing() -> None:
    enable_sampling_without_compilation()
    enable_sampling_without_compilation()
    counters.clear()
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-3.0, -1.0, -2.0]])
    ranks = sampler.batched_count_greater_than(logprobs, torch.tensor([[-2.0], [-1.0]]))
    assert ranks.tolist() == [2, 1]
    certain = torch.tensor([[0.0, 1e9], [1e9, 0.0]])
    assert topk_topp_sampler.compiled_random_sample(certain).tolist() == [1, 0]
    assert not counters["frames"], "a frame was given to the compiler"
