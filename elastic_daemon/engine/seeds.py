"""Generators of requests with a `seed`, in model runner V1.

Each token takes one draw from the generator of its request, and nothing counts them; a request that comes with output
finds a fresh one. Model runner V2 makes each draw from seed and position, and needs none of this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch


def advance(generator: torch.Generator, tokens: int, vocabulary: int, fp64_noise: bool) -> None:
    """Bring a fresh generator to where it is after so many tokens. `fp64_noise`: of the model's configuration."""
    if not tokens:
        return
    if generator.device.type != "cpu":
        # Counter-based: each draw moves the offset by the same.
        _draw_noise(generator, vocabulary, fp64_noise)
        generator.set_offset(tokens * generator.get_offset())
    elif fp64_noise:
        for _ in range(tokens):
            _draw_noise(generator, vocabulary, fp64_noise)
    else:
        torch.randint(0, 2**31, (tokens,), generator=generator)


def _draw_noise(generator: torch.Generator, vocabulary: int, fp64_noise: bool) -> None:
    dtype = torch.float64 if fp64_noise else torch.float32
    torch.empty(vocabulary, dtype=dtype, device=generator.device).exponential_(generator=generator)


@contextlib.contextmanager
def untouched(generators: dict[int, torch.Generator], rows: Iterable[int]) -> Iterator[None]:
    """Take the generators of these rows away meanwhile: others are drawn from in their place."""
    kept = {row: generators.pop(row) for row in rows if row in generators}
    try:
        yield
    finally:
        generators.update(kept)
