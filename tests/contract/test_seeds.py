"""What vLLM's sampler (model runner V1) takes from the generator of a seeded request, and what it does with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
from vllm.v1.worker.gpu_input_batch import InputBatch

from elastic_daemon.engine import seeds
from elastic_daemon.engine.resume import ResumableRequestState, resuming_params
from elastic_daemon.engine.runner_v1 import ElasticRunnerV1

pytestmark = pytest.mark.contract

VOCABULARY = 71


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("fp64_noise", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_as_many_draws_as_tokens(tokens: int, fp64_noise: bool) -> None:
    sampler, drawn, advanced = TopKTopPSampler(use_fp64_gumbel=fp64_noise), generator(), generator()
    for number in range(tokens):
        logits = torch.randn(3, VOCABULARY)
        top_p = torch.tensor([1.0, 0.9, 0.5]) if number % 2 else None
        sampler(logits, {1: drawn, 2: generator(7)}, None, top_p)
    seeds.advance(advanced, tokens, VOCABULARY, fp64_noise)
    assert torch.equal(drawn.get_state(), advanced.get_state())


def test_generators_on_cpu_cannot_be_turned_back() -> None:
    """vLLM turns them back after each part of a long prefill: hence ElasticRunnerV1.sample_tokens."""
    with pytest.raises(RuntimeError):
        generator().set_offset(generator().get_offset() - 4)


def test_the_sampler_draws_from_those_of_the_batch() -> None:
    """So that one which is taken out of the batch is not drawn from."""
    batch = InputBatch(2, 64, 64, torch.device("cpu"), VOCABULARY, [16], [4])
    assert batch.sampling_metadata.generators is batch.generators
    batch.refresh_metadata()
    assert batch.sampling_metadata.generators is batch.generators


class Stock:
    """What of vLLM's runner matters here."""

    def _update_states(self, scheduled: Any) -> str:
        for new in scheduled.scheduled_new_reqs:
            fields = {"prompt_token_ids": [1], "mm_features": [], "block_ids": ([0],), "num_computed_tokens": 0}
            own = generator(new.params.seed) if new.params.seed is not None else None
            state = ResumableRequestState(
                req_id=new.req_id, sampling_params=new.params, generator=own, output_token_ids=[], **fields
            )
            self.requests[new.req_id] = state  # type: ignore[attr-defined]
        return "corrections"

    def sample_tokens(self, grammar_output: Any) -> list[int]:
        if grammar_output is not None:
            raise RuntimeError(grammar_output)
        return sorted(self.input_batch.generators)  # type: ignore[attr-defined]


class Runner(ElasticRunnerV1, Stock):
    def __init__(self) -> None:
        self.requests = {}
        self.model_config = SimpleNamespace(get_vocab_size=lambda: VOCABULARY, use_fp64_gumbel=False)
        self.input_batch = SimpleNamespace(generators={0: generator(0), 2: generator(2), 3: generator(3)}, num_reqs=4)
        self.discard_request_mask = SimpleNamespace(np=np.array([False, True, True, False, True, True]))

    def admit(self, name: str, params: SamplingParams) -> Any:
        scheduled = SimpleNamespace(scheduled_new_reqs=[SimpleNamespace(req_id=name, params=params)])
        assert self._update_states(scheduled) == "corrections"
        return self.requests[name]


def test_a_request_that_comes_with_output_finds_its_generator_behind_it() -> None:
    runner = Runner()
    state = runner.admit("resumed", resuming_params(SamplingParams(seed=5), [7, 8, 9]))
    behind = generator()
    torch.randint(0, 2**31, (3,), generator=behind)
    assert torch.equal(state.generator.get_state(), behind.get_state())
    fresh = runner.admit("fresh", SamplingParams(seed=5))
    assert torch.equal(fresh.generator.get_state(), generator().get_state())
    assert runner.admit("unseeded", resuming_params(SamplingParams(), [7])).generator is None


def test_nothing_is_drawn_for_a_token_that_is_thrown_away() -> None:
    runner = Runner()
    assert runner.sample_tokens(None) == [0, 3]
    assert sorted(runner.input_batch.generators) == [0, 2, 3]
    with pytest.raises(RuntimeError, match="broken"):
        runner.sample_tokens("broken")
    assert sorted(runner.input_batch.generators) == [0, 2, 3]
