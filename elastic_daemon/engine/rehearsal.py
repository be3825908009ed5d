"""Which steps a rank rehearses while it starts, so that no kernel is compiled for the first time after a death.

Kernels of the expert layers are chosen and compiled by how many tokens a group brings together, by how many expert
slots it has, and by whether such numbers are multiples of 16. A group that has lost a rank differs in all of them, and
its first step is the one that clients wait for.
"""

from __future__ import annotations

LOSSES = 2
"""A rank rehearses its group, and the ones with up to so many members fewer."""

TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
"""Numbers of tokens of a group at which vLLM's tuned tables and defaults choose another kernel; the largest holds for
all above it."""

ALIGNED = 16
"""Triton compiles a kernel twice: for arguments that this divides, and for others."""


def group_sizes(members: int, fewest: int) -> tuple[int, ...]:
    """Sizes to rehearse, `members` first. `fewest`: members whose slots hold all experts."""
    return tuple(range(members, max(members - LOSSES, fewest, 1) - 1, -1))


def tokens_per_rank(members: int, most: int) -> tuple[int, ...]:
    """Tokens of each of `members` ranks, `most` at most, so that their sums fall on both sides of each of TOKENS."""
    counts = set()
    for total in TOKENS:
        below = total // members
        counts |= {below, below + 1, below - below % ALIGNED}
    return tuple(sorted(count for count in counts if 1 <= count <= most))
