"""What vLLM's sampler (model runner V1) takes from the generator of a seeded request on a GPU."""

from __future__ import annotations

import pytest
import torch

from elastic_daemon.engine import seeds

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def generator() -> torch.Generator:
    return torch.Generator(device="cuda").manual_seed(5)


@pytest.mark.parametrize("fp64_noise", [False, True])
@pytest.mark.parametrize("vocabulary", [71, 151_936, 5_000_000])
def test_as_many_draws_as_tokens(vocabulary: int, fp64_noise: bool) -> None:
    from vllm.v1.sample.ops.topk_topp_sampler import random_sample

    drawn, advanced = generator(), generator()
    for _ in range(7):
        random_sample(torch.rand(3, vocabulary, device="cuda"), {1: drawn}, fp64_noise)
    seeds.advance(advanced, 7, vocabulary, fp64_noise)
    assert torch.equal(drawn.get_state(), advanced.get_state())
