"""Nothing is compiled when a request first asks for logprobs."""

from __future__ import annotations

import dis
import inspect
from types import CodeType

import pytest
import torch
from torch._dynamo.utils import counters
from vllm.v1.sample import sampler

from elastic_daemon.engine.sampling import enable_sampling_without_compilation

pytestmark = pytest.mark.contract


def names(code: CodeType) -> set[str]:
    return {str(one.argval) for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL"}


def test_vllm_calls_it_by_its_global_name() -> None:
    assert "batched_count_greater_than" in names(inspect.unwrap(sampler.Sampler.gather_logprobs).__code__)


def test_it_gives_what_it_should_and_compiles_nothing() -> None:
    enable_sampling_without_compilation()
    enable_sampling_without_compilation()
    counters.clear()
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-3.0, -1.0, -2.0]])
    ranks = sampler.batched_count_greater_than(logprobs, torch.tensor([[-2.0], [-1.0]]))
    assert ranks.tolist() == [2, 1]
    assert not counters["frames"], "a frame was given to the compiler"
