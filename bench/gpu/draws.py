"""How near to another token the seeded streams of the drill are drawn, without a GPU.

    python -m bench.gpu.draws [--streams 8] [--tokens 120] [--otherwise 40]

The bundled model is run in float64 (exact), and in float32 with the rounding of vLLM's Triton kernels on a GPU: what
goes into the products of experts and attention has the 11 significant bits of TF32. Tokens are drawn as by vLLM's
runner V2: the highest logit, divided by the temperature and with Gumbel noise that follows from seed, position and
token, of those that top_p keeps. `distance` is by how much it is the highest.

Kernels also round attention in another order: by tiles of keys, of a size that depends on the batch. So the narrowest
draw is repeated with weights of attention that are rounded relative to other powers: how often is it another token?
"""

from __future__ import annotations

import argparse
import math
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.moe import ExpertsInterface

from bench.command import positive, say
from bench.tables import figures_table
from elastic_daemon.config import BUNDLED_MODEL
from elastic_daemon.drill.load import prompts_of
from elastic_daemon.drill.sampling import Sampling, samplings_for

NAME = "tf32"
SHOWN = 5
POWERS = 3.0
"""Nats between maxima of tiles of keys, at most, that weights of attention are rounded relative to."""
DROPPED_BITS = 13
WORD = 0xFFFFFFFF


class Draw(NamedTuple):
    """`token` was drawn, `distance` nats before `other`."""

    token: int
    other: int
    distance: float


class Placed(NamedTuple):
    """The draw of token number `at` of a stream, after `before`, the tokens of its prompt and its own."""

    stream: int
    at: int
    before: tuple[int, ...]
    draw: Draw


def murmur3(words: Sequence[int]) -> int:
    """MurmurHash3 for x86, 32 bits, seed 0, of words of 32 bits."""
    state = 0
    for word in words:
        key = _rotated(word * 0xCC9E2D51 & WORD, 15) * 0x1B873593 & WORD
        state = (_rotated(state ^ key, 13) * 5 + 0xE6546B64) & WORD
    state ^= 4 * len(words)
    state = (state ^ state >> 16) * 0x85EBCA6B & WORD
    state = (state ^ state >> 13) * 0xC2B2AE35 & WORD
    return state ^ state >> 16


def _rotated(word: int, bits: int) -> int:
    return (word << bits | word >> (32 - bits)) & WORD


def gumbel(seed: int, position: int, token: int) -> float:
    """The noise of vLLM's `gumbel_noised_argmax` (vllm/v1/worker/gpu/sample/gumbel.py)."""
    low, high = struct.unpack("<II", struct.pack("<q", seed))
    uniform = (murmur3((low, high, position, token)) + 0.5) / 2**32
    return -math.log(-math.log1p(-uniform))


def draw(logits: torch.Tensor, sampling: Sampling, position: int) -> Draw:
    """`logits`: of all tokens. `position`: of the last token before this one, from the begin of the prompt."""
    scaled = logits.double() / sampling.fields["temperature"]
    ordered, tokens = torch.sort(scaled.softmax(-1), descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = tokens[before < sampling.fields["top_p"]].tolist()
    noised = sorted((float(scaled[one]) + gumbel(sampling.fields["seed"], position, one), one) for one in kept)
    best, second = noised[-1], noised[-2] if len(noised) > 1 else (-math.inf, -1)
    return Draw(best[1], second[1], best[0] - second[0])


def rounded(values: torch.Tensor) -> torch.Tensor:
    """float32, to the nearest value that TF32 has."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + (1 << DROPPED_BITS - 1)) & -(1 << DROPPED_BITS)).view(torch.float32)


def _experts(module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(hidden)
    for expert in chosen.unique().tolist():
        rows, column = torch.where(chosen == expert)
        gate, up = functional.linear(rounded(hidden[rows]), rounded(module.gate_up_proj[expert])).chunk(2, dim=-1)
        inner = rounded(module.act_fn(gate) * up)
        out.index_add_(
            0, rows, functional.linear(inner, rounded(module.down_proj[expert])) * weights[rows, column, None]
        )
    return out


def attention_with(powers: Callable[[int], torch.Tensor]) -> Callable[..., tuple[torch.Tensor, None]]:
    """`powers`: for so many keys, what each weight is rounded relative to, in nats."""

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[torch.Tensor, None]:
        key, value = (one.repeat_interleave(module.num_key_value_groups, dim=1) for one in (key, value))
        scores = rounded(query) @ rounded(key).transpose(2, 3) * scaling
        new, keys = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(new, keys).tril(keys - new) == 0, -math.inf)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        relative = powers(keys).exp()
        summed = rounded(weights / relative) * relative @ rounded(value)
        return (summed / weights.sum(-1, keepdim=True)).transpose(1, 2).contiguous(), None

    return attention


def powers_of(seed: int) -> Callable[[int], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda keys: torch.rand(keys, generator=generator) * POWERS


def load(exact: bool) -> Any:
    choice = {"dtype": torch.float64, "experts_implementation": "eager", "attn_implementation": "eager"}
    if not exact:
        ExpertsInterface.register(NAME, _experts)
        AttentionInterface.register(NAME, attention_with(torch.zeros))
        choice = {"dtype": torch.float32, "experts_implementation": NAME, "attn_implementation": NAME}
    return AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, **choice).eval()


@torch.no_grad()
def continued(model: Any, stream: int, prompt: Sequence[int], sampling: Sampling, tokens: int) -> list[Placed]:
    """The draws of a stream, one token after the other."""
    found: list[Placed] = []
    before, fed, cache = tuple(prompt), torch.tensor([prompt]), None
    for at in range(tokens):
        answer = model(fed, past_key_values=cache, use_cache=True)
        one = draw(answer.logits[0, -1], sampling, len(before) - 1)
        found.append(Placed(stream, at, before, one))
        before, fed, cache = (*before, one.token), torch.tensor([[one.token]]), answer.past_key_values
    return found


@torch.no_grad()
def drawn_otherwise(model: Any, placed: Placed, sampling: Sampling, times: int) -> list[Draw]:
    """All at once instead of one token after the other, each time with another rounding of attention."""
    found = []
    for seed in range(times):
        AttentionInterface.register(NAME, attention_with(powers_of(seed)))
        logits = model(torch.tensor([placed.before])).logits[0, -1]
        found.append(draw(logits, sampling, len(placed.before) - 1))
    return found


def table_of(rounding: str, draws: Sequence[Placed]) -> Table:
    """`draws`: the narrowest first."""
    table = figures_table(f"{rounding}: the narrowest of {len(draws)} draws", "token", "drawn", "next", "distance")
    for stream, at, _, one in draws[:SHOWN]:
        table.add_row(f"stream {stream}", str(at), str(one.token), str(one.other), f"{one.distance:.1e}")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.draws", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=positive, default=8, help="of the drill (default: 8)")
    parser.add_argument("--tokens", type=positive, default=120, help="of each (default: 120)")
    parser.add_argument("--otherwise", type=positive, default=40, help="roundings of the narrowest draw (default: 40)")
    options = parser.parse_args()
    samplings = samplings_for("seeded", options.streams, options.tokens)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in prompts_of(samplings)]
    for rounding in ("exact", NAME):
        model, draws = load(rounding == "exact"), []
        for stream, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            draws += continued(model, stream, prompt, sampling, options.tokens)
            say(f"{rounding}: stream {stream}")
        draws.sort(key=lambda one: one.draw.distance)
        Console().print(table_of(rounding, draws))
    narrowest = draws[0]
    again = drawn_otherwise(model, narrowest, samplings[narrowest.stream], options.otherwise)
    others = [one.token for one in again if one.token != narrowest.draw.token]
    said = f" ({', '.join(map(str, sorted(set(others))))})" if others else ""
    print(f"the first of these, rounded otherwise: another token in {len(others)} of {len(again)}{said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
