"""How long a client waited for its next token while the group changed. Pure: no clock.

A gap begins with the last token before the change and ends with the first one after it. Who has no token yet, or does
not get another, has none.
"""

from __future__ import annotations

from collections.abc import Iterable


class ClientGaps:
    def __init__(self) -> None:
        self._last: dict[str, float] = {}  # when a request in flight last got tokens
        self._open: set[str] = set()  # requests that have got none since the group changed

    def delivered(self, request_id: str, now: float) -> float | None:
        """It has got tokens. Returns the gap that ends with them, if one was open."""
        before = self._last.get(request_id)
        self._last[request_id] = now
        if request_id not in self._open:
            return None
        self._open.discard(request_id)
        return now - before if before is not None else None

    def forget(self, request_id: str) -> None:
        """It has ended."""
        self._last.pop(request_id, None)
        self._open.discard(request_id)

    def interrupt(self, request_ids: Iterable[str]) -> None:
        """The group changes, or takes these requests elsewhere."""
        self._open.update(request_id for request_id in request_ids if request_id in self._last)
