"""Generators of requests with a `seed`, in model runner V1."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch


@contextlib.contextmanager
def untouched(generators: dict[int, torch.Generator], rows: Iterable[int]) -> Iterator[None]:
    """Take the generators of these rows away meanwhile: others are drawn from in their place."""
    kept = {row: generators.pop(row) for row in rows if row in generators}
    try:
        yield
    finally:
        generators.update(kept)
