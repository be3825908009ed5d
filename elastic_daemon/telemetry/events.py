"""What happened, for `/events` and for the log."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import structlog

from elastic_daemon.telemetry.event_levels import level_of

log = structlog.get_logger("elastic_daemon")

KEPT = 2000


class Event(NamedTuple):
    """`text`: the JSON of `fields`, made once for all who ask."""

    id: int
    name: str
    fields: dict[str, Any]
    text: str


class EventLog:
    """The latest events, numbered from 1. Readers can wait for more."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=KEPT)
        self._news = asyncio.Event()
        self.ended = False
        """Whether readers are to wait no longer: the daemon stops."""

    @property
    def newest(self) -> int:
        """The id of the last event; 0 if there is none."""
        return self._events[-1].id if self._events else 0

    @property
    def oldest(self) -> int:
        """The id of the first event that is kept; 1 if there is none."""
        return self._events[0].id if self._events else 1

    def record(self, name: str, fields: Mapping[str, Any]) -> None:
        id_ = self.newest + 1
        event = {"id": id_, "time": time.time(), "event": name, **fields}
        self._events.append(Event(id_, name, event, json.dumps(event, default=str)))
        log.log(level_of(name, fields), name, **fields)
        self._wake()

    def end(self) -> None:
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def after(self, event_id: int) -> Iterator[Event]:
        """Events after `event_id`, oldest first, as far as they are kept.

        All, for an id that there has not been yet: it is that of an earlier daemon.
        """
        if event_id > self.newest:
            event_id = 0
        return islice(tuple(self._events), max(0, event_id + 1 - self.oldest), None)

    def since(self, event_id: int) -> list[dict[str, Any]]:
        return [event.fields for event in self.after(event_id)]

    async def news(self, event_id: int) -> None:
        """Until there is an event after `event_id`, or the end."""
        while not self.ended and event_id == self.newest:
            await self._news.wait()
