"""Draws as vLLM's runner V2 makes them, and the rounding that decides narrow ones."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.gpu.draws import attention_with, draw, gumbel, murmur3, rounded
from elastic_daemon.drill.sampling import Sampling, seeded


@pytest.mark.parametrize(("text", "hashed"), [(b"", 0), (b"test", 0xBA6BD213)])
def test_hash_has_the_published_values(text: bytes, hashed: int) -> None:
    assert murmur3(struct.unpack(f"<{len(text) // 4}I", text)) == hashed


def test_noise_depends_on_seed_position_and_token() -> None:
    places = [(seed, position, token) for seed in (1000, 1001) for position in range(50) for token in range(50)]
    noise = [gumbel(*place) for place in places]
    assert len(set(noise)) == len(noise)
    assert sum(noise) / len(noise) == pytest.approx(0.5772, abs=0.05)  # the mean of a standard Gumbel distribution


def with_top_p(top_p: float) -> Sampling:
    return seeded(0, temperature=1.0, top_p=top_p)


def test_only_what_top_p_keeps_is_drawn() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert {draw(logits, with_top_p(0.5), position).token for position in range(200)} == {0}
    assert {draw(logits, with_top_p(0.51), position).token for position in range(200)} == {0, 1}
    assert {draw(logits, with_top_p(1.0), position).token for position in range(200)} == {0, 1, 2}


def test_a_draw_without_another_token_is_not_narrow() -> None:
    assert draw(torch.tensor([0.9, 0.1]).log(), with_top_p(0.5), 0).distance == math.inf


@given(st.integers(0, 1000))
def test_the_distance_is_what_it_takes_to_draw_the_other_token(position: int) -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    one = draw(logits, with_top_p(1.0), position)
    for change, token in ((one.distance * 0.99, one.token), (one.distance * 1.01, one.other)):
        raised = logits.clone()
        raised[one.other] += change
        assert draw(raised, with_top_p(1.0), position).token == token


@given(st.floats(-1e6, 1e6, width=32))
def test_rounding_leaves_eleven_significant_bits(value: float) -> None:
    near = float(rounded(torch.tensor([value]))[0])
    assert abs(near - value) <= abs(value) * 2**-11 + 1e-37
    assert float(rounded(torch.tensor([near]))[0]) == near


def test_attention_is_that_of_torch_but_for_the_rounding() -> None:
    class Module:
        num_key_value_groups = 2

    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 3, 32), torch.randn(1, 2, 7, 32), torch.randn(1, 2, 7, 32)
    found, _ = attention_with(torch.zeros)(Module, query, key, value, None, 32**-0.5)
    seen = torch.ones(3, 7).tril(4).bool()
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
    assert torch.allclose(found.transpose(1, 2), wanted, atol=1e-2)
    assert not torch.equal(found.transpose(1, 2), wanted)
