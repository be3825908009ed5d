"""What breaks every step that it is in, and nobody dies of it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Set
from typing import Protocol

from elastic_daemon.protocol import Identity


class Member(Protocol):
    @property
    def identity(self) -> Identity: ...

    @property
    def requests(self) -> Set[int]: ...


class Poison:
    """In some worlds a request, in some a rank that cannot keep its connections."""

    def __init__(self, rng: random.Random) -> None:
        self.request = rng.randint(1, 40) if rng.random() < 0.05 else None
        self.rank: Identity | None = None
        self.has_acted = False

    def spoils(self, group: Iterable[Member]) -> bool:
        """Whether a step of this group fails."""
        group = list(group)
        by_rank = len(group) > 1 and any(process.identity == self.rank for process in group)
        spoilt = by_rank or any(self.request in process.requests for process in group)
        self.has_acted |= spoilt
        return spoilt
