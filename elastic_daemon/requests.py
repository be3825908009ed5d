"""The ledger of in-flight requests: who owns each, and which tokens its client already has.

Pure: no engine, no clock. A token enters the ledger before it goes to the client, so whatever a client has seen is
here, and a request can go on elsewhere from exactly that point. What arrives from a rank that does not own the request
any more is dropped: its tokens would be delivered twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

R = TypeVar("R")
"""The engine's request type; the ledger only keeps it for a later attempt."""


@dataclass
class Entry(Generic[R]):
    """One request. `owner` is the incarnation that computes it, None while it waits for one."""

    request: R
    owner: int | None
    output: list[int] = field(default_factory=list)
    attempts: int = 1


@dataclass(frozen=True)
class Handover:
    """What a change of membership did to the requests in flight."""

    kept: int
    replayed: tuple[str, ...]
    restarted: tuple[str, ...]

    @property
    def moved(self) -> tuple[str, ...]:
        return self.replayed + self.restarted


class Ledger(Generic[R]):
    """All requests between admission and their last token."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry[R]] = {}
        self._load: Counter[int] = Counter()
        self.delivered = 0
        """Tokens of all requests so far."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def get(self, request_id: str) -> Entry[R] | None:
        return self._entries.get(request_id)

    def load(self, incarnation: int) -> int:
        """Requests that this incarnation owns."""
        return self._load[incarnation]

    def admit(self, request_id: str, request: R, owner: int) -> None:
        """Raises ValueError when a request of this id is in flight already."""
        if request_id in self._entries:
            raise ValueError(f"request {request_id} is in flight already")
        self._entries[request_id] = Entry(request, owner)
        self._load[owner] += 1

    def owner(self, request_id: str) -> int | None:
        entry = self._entries.get(request_id)
        return entry.owner if entry is not None else None

    def deliver(self, request_id: str, incarnation: int, tokens: Sequence[int], finished: bool) -> bool:
        """Record tokens of a step. False: not from the owner, drop them."""
        entry = self._entries.get(request_id)
        if entry is None or entry.owner != incarnation:
            return False
        entry.output.extend(tokens)
        self.delivered += len(tokens)
        if finished:
            self.forget(request_id)
        return True

    def forget(self, request_id: str) -> None:
        """The request ended: finished, aborted, or its client is gone. Unknown ids are fine."""
        entry = self._entries.pop(request_id, None)
        if entry is not None and entry.owner is not None:
            self._load[entry.owner] -= 1

    def void(self, incarnations: Iterable[int]) -> Handover:
        """Take all requests away from these incarnations. They own nothing afterwards, whatever they still send."""
        gone = set(incarnations)
        orphans = [(rid, entry) for rid, entry in self._entries.items() if entry.owner in gone]
        for _, entry in orphans:
            entry.owner = None
        for incarnation in gone:
            del self._load[incarnation]
        kept = sum(1 for entry in self._entries.values() if entry.owner is not None)
        replayed = tuple(rid for rid, entry in orphans if entry.output)
        restarted = tuple(rid for rid, entry in orphans if not entry.output)
        return Handover(kept, replayed, restarted)

    def orphans(self) -> list[str]:
        """Requests that wait for a new owner, oldest first."""
        return [rid for rid, entry in self._entries.items() if entry.owner is None]

    def adopt(self, request_id: str, owner: int) -> Entry[R]:
        """Give an orphan to `owner`."""
        entry = self._entries[request_id]
        assert entry.owner is None, "only an orphan can be adopted"
        entry.owner = owner
        entry.attempts += 1
        self._load[owner] += 1
        return entry

    def least_loaded(self, incarnations: Sequence[int]) -> int:
        """The incarnation with fewest requests; ties go to the one listed first."""
        return min(incarnations, key=lambda incarnation: self._load[incarnation])
