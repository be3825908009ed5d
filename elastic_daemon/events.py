"""What happened, for `/events` and for the log."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any

import structlog

log = structlog.get_logger("elastic_daemon")

KEPT = 2000


class EventLog:
    """The latest events, numbered from 1. Readers can wait for more."""

    def __init__(self) -> None:
        self._events: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._next_id = 1
        self._news = asyncio.Event()

    def record(self, name: str, fields: Mapping[str, Any]) -> None:
        event = {"id": self._next_id, "time": time.time(), "event": name, **fields}
        self._next_id += 1
        self._events.append(event)
        log.info(name, **fields)
        self._news.set()
        self._news = asyncio.Event()

    def since(self, event_id: int) -> list[dict[str, Any]]:
        """Events after `event_id`, oldest first, as far as they are kept."""
        return [event for event in self._events if event["id"] > event_id]

    async def follow(self, event_id: int) -> AsyncIterator[dict[str, Any]]:
        """Events after `event_id`, and then each as it happens."""
        while True:
            news = self._news
            for event in self.since(event_id):
                event_id = event["id"]
                yield event
            await news.wait()
