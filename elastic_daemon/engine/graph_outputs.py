"""What expert layers compute stays where CUDA graphs look for it.

Graphs are split at expert layers, which run eagerly between them. A graph reads its inputs at the addresses they had
when it was captured: right for what another graph computed, and for attention, which writes into memory that a graph
allocated; but an expert layer returns new memory in each step.
"""

from __future__ import annotations

from typing import Any

import torch

TURNS = 2
"""A layer does not overwrite what the one before it computed: a model may still read it."""


class GraphOutputs:
    """Memory for the outputs of all expert layers of a model, up to the largest step that is ever a graph."""

    def __init__(self, largest_step: int) -> None:
        """`largest_step`: tokens."""
        self._rows = largest_step
        self._memory: dict[tuple[Any, ...], torch.Tensor] = {}

    def keep_of(self, number: int, runner: Any) -> None:
        """Have the `number`-th expert layer leave its outputs here. `runner`: vLLM's of that layer."""
        compute = runner._forward_impl

        def forward(*arguments: Any, **rest: Any) -> Any:
            outputs = compute(*arguments, **rest)
            if isinstance(outputs, tuple):  # of shared experts, and of the routed ones
                return tuple(self._keep((number % TURNS, which), each) for which, each in enumerate(outputs))
            return self._keep((number % TURNS, 0), outputs)

        runner._forward_impl = forward

    def _keep(self, place: tuple[int, int], output: torch.Tensor) -> torch.Tensor:
        if output.shape[0] > self._rows:
            return output  # an eager step
        key = (*place, output.shape[1:], output.dtype)
        if (memory := self._memory.get(key)) is None:
            memory = self._memory[key] = output.new_empty((self._rows, *output.shape[1:]))
        return memory[: output.shape[0]].copy_(output)
