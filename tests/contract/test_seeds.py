"""What vLLM's sampler (model runner V1) takes from the generator of a seeded request, and what it does with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu_input_batch import InputBatch

from elastic_daemon.engine.runner_v1 import ElasticRunnerV1

pytestmark = pytest.mark.contract

VOCABULARY = 71


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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

    def sample_tokens(self, grammar_output: Any) -> list[int]:
        if grammar_output is not None:
            raise RuntimeError(grammar_output)
        return sorted(self.input_batch.generators)  # type: ignore[attr-defined]


class Runner(ElasticRunnerV1, Stock):
    def __init__(self) -> None:
        self.input_batch = SimpleNamespace(generators={0: generator(0), 2: generator(2), 3: generator(3)}, num_reqs=4)
        self.discard_request_mask = SimpleNamespace(np=np.array([False, True, True, False, True, True]))


def test_nothing_is_drawn_for_a_token_that_is_thrown_away() -> None:
    runner = Runner()
    assert runner.sample_tokens(None) == [0, 3]
    assert sorted(runner.input_batch.generators) == [0, 2, 3]
    with pytest.raises(RuntimeError, match="broken"):
        runner.sample_tokens("broken")  # type: ignore[arg-type]
    assert sorted(runner.input_batch.generators) == [0, 2, 3]
