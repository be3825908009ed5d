"""What events, actions and reports have in common."""

from __future__ import annotations

Column = tuple[tuple[int, ...], ...]  # expert ids by layer and slot: what a rank really holds
Identity = tuple[int, int]  # (rank, incarnation)
