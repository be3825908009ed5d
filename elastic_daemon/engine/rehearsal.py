"""Which steps a rank rehearses while it starts, so that no kernel is compiled for the first time after a death.

Kernels of the expert layers are chosen and compiled by how many tokens a group brings together, by how many expert
slots it has, and by whether numbers that follow from these are multiples of 16. A group that has lost a rank differs in
all of them, and its first step is the one that clients wait for.
"""

from __future__ import annotations

LOSSES = 2
"""A rank rehearses its group, and the ones with up to so many members fewer."""

TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
"""Numbers of tokens of a group at which vLLM's tuned tables and defaults choose another kernel; the largest holds for
all above it."""

ALIGNED = 16
"""Triton compiles a kernel anew for an argument that this divides."""

GRAPH_TOKENS = 8
"""A rank whose step is a CUDA graph has a multiple of so many tokens, as all others have then, or one of FEW."""
FEW = (1, 2, 4)


def group_sizes(members: int, fewest: int) -> tuple[int, ...]:
    """Sizes to rehearse, `members` first. `fewest`: members whose slots hold all experts."""
    return tuple(range(members, max(members - LOSSES, fewest, 1) - 1, -1))


def step_tokens(members: int, most: int, experts: int, chosen: int) -> tuple[int, ...]:
    """Tokens of all `members` ranks together, `most` of each at most, on both sides of each of TOKENS, and between two
    of these with each alignment, of any steps and of those that are graphs. `experts`: slots of the group; `chosen`:
    experts of a token."""
    found, last = {members * each for each in FEW}, 0
    for total in TOKENS:
        steps = range(last + 1, total + 1)
        graphs = [tokens for tokens in steps if tokens % (members * GRAPH_TOKENS) == 0]
        for some in (steps, graphs):
            found.update({_alignment(tokens, experts, chosen): tokens for tokens in some}.values())
        found.add(total + 1)
        last = total
    return tuple(sorted(tokens for tokens in found if members <= tokens <= members * most))


def _alignment(tokens: int, experts: int, chosen: int) -> tuple[bool, bool]:
    """Of the two numbers that a kernel gets: rows, and rows with room for a part of a block for each expert, as
    `moe_align_block_size` of vLLM has it; of a whole block for each row, if there are fewer. All blocks are multiples
    of ALIGNED."""
    rows = tokens * chosen
    return rows % ALIGNED == 0, rows < experts or (rows - experts) % ALIGNED == 0
