"""The ledger of in-flight requests: who owns each, and which tokens its client already has.

Pure: no engine, no clock. A token enters the ledger before it goes to the client, so whatever a client has seen is
here, and a request can go on elsewhere from exactly that point. What arrives from a rank that does not own the request
any more is dropped: its tokens would be delivered twice.

Each time a request gets an owner is an attempt, with an id of its own that the engines know it by. A rank that is given
a request which it had before, and may not have dropped yet, could not tell the two apart otherwise, and neither could
we.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

R = TypeVar("R")
"""The engine's request type; the ledger only keeps it for a later attempt."""

MAX_DEATHS = 5
"""Owners in a row that may die on a request before it gets a token. Deaths that have nothing to do with a request do
not come so often between two of its tokens; a request that kills whoever computes it would end the deployment."""


@dataclass
class Entry(Generic[R]):
    """One request.

    `owner` is the incarnation that computes it, None while it waits for one. `attempt_id`: what the owner calls it.
    `deaths`: owners that have died since it last got a token.
    """

    request: R
    owner: int | None
    attempt_id: str
    output: list[int] = field(default_factory=list)
    attempts: int = 1
    deaths: int = 0


@dataclass(frozen=True)
class Handover:
    """What a change of membership did to the requests in flight. Those `given_up` have left the ledger."""

    kept: int
    replayed: tuple[str, ...]
    restarted: tuple[str, ...]
    given_up: tuple[str, ...] = ()

    @property
    def moved(self) -> tuple[str, ...]:
        return self.replayed + self.restarted


class Ledger(Generic[R]):
    """All requests between admission and their last token."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry[R]] = {}
        self._attempts: dict[str, str] = {}  # attempt id -> request id, of those under way
        self._load: Counter[int] = Counter()
        self.delivered = 0
        """Tokens of all requests so far."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def __iter__(self) -> Iterator[str]:
        """The ids of all requests, oldest first."""
        return iter(tuple(self._entries))

    def get(self, request_id: str) -> Entry[R] | None:
        return self._entries.get(request_id)

    def load(self, incarnation: int) -> int:
        """Requests that this incarnation owns."""
        return self._load[incarnation]

    def admit(self, request_id: str, request: R, owner: int) -> None:
        """Raises ValueError when a request of this id is in flight already."""
        if request_id in self._entries or request_id in self._attempts:
            raise ValueError(f"request {request_id} is in flight already")
        self._entries[request_id] = Entry(request, owner, request_id)
        self._attempts[request_id] = request_id
        self._load[owner] += 1

    def is_under_way(self, attempt_id: str) -> bool:
        """False once its request has ended, or was taken away from the owner of this attempt."""
        return attempt_id in self._attempts

    def deliver(self, attempt_id: str, incarnation: int, tokens: Sequence[int], finished: bool) -> str | None:
        """Record tokens of a step. Returns the id of the request. None: not from its owner, drop them."""
        request_id = self._attempts.get(attempt_id)
        if request_id is None or (entry := self._entries[request_id]).owner != incarnation:
            return None
        entry.output.extend(tokens)
        self.delivered += len(tokens)
        if tokens:
            entry.deaths = 0
        if finished:
            self.forget(request_id)
        return request_id

    def forget(self, request_id: str) -> Entry[R] | None:
        """The request ended: finished, aborted, or its client is gone. Returns its entry, None if there is none."""
        entry = self._entries.pop(request_id, None)
        if entry is not None and entry.owner is not None:
            self._load[entry.owner] -= 1
            del self._attempts[entry.attempt_id]
        return entry

    def void(self, incarnations: Iterable[int]) -> Handover:
        """These incarnations are dead: take all requests away from them.

        A request that none of its last `MAX_DEATHS` owners has survived is given up.
        """
        gone = set(incarnations)
        orphans = self._take_from(gone)
        for entry in orphans.values():
            entry.deaths += 1
        given_up = tuple(rid for rid, entry in orphans.items() if entry.deaths >= MAX_DEATHS)
        for request_id in given_up:
            self.forget(request_id)
            del orphans[request_id]
        for incarnation in gone:
            del self._load[incarnation]
        kept = sum(1 for entry in self._entries.values() if entry.owner is not None)
        replayed = tuple(rid for rid, entry in orphans.items() if entry.output)
        restarted = tuple(rid for rid, entry in orphans.items() if not entry.output)
        return Handover(kept, replayed, restarted, given_up)

    def withdraw(self, incarnation: int) -> tuple[str, ...]:
        """Take all requests away from an incarnation that lives. Returns the ids of the attempts that it is to drop."""
        return tuple(entry.attempt_id for entry in self._take_from({incarnation}).values())

    def _take_from(self, incarnations: set[int]) -> dict[str, Entry[R]]:
        """They own nothing afterwards, whatever they still send. Returns what they owned, oldest first."""
        orphans = {rid: entry for rid, entry in self._entries.items() if entry.owner in incarnations}
        for entry in orphans.values():
            assert entry.owner is not None
            self._load[entry.owner] -= 1
            del self._attempts[entry.attempt_id]
            entry.owner = None
        return orphans

    def orphans(self) -> list[str]:
        """Requests that wait for a new owner, oldest first."""
        return [rid for rid, entry in self._entries.items() if entry.owner is None]

    def adopt(self, request_id: str, owner: int) -> Entry[R]:
        """Give an orphan to `owner`, as a new attempt."""
        entry = self._entries[request_id]
        assert entry.owner is None, "only an orphan can be adopted"
        entry.owner = owner
        entry.attempts += 1
        entry.attempt_id = f"{request_id}~{entry.attempts}"
        self._attempts[entry.attempt_id] = request_id
        self._load[owner] += 1
        return entry

    def least_loaded(self, incarnations: Sequence[int]) -> int:
        """The incarnation with fewest requests; ties go to the one listed first."""
        return min(incarnations, key=lambda incarnation: self._load[incarnation])
