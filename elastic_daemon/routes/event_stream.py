"""`/events` as server-sent events, to any number of readers of whom none can hold up the others.

A reader has a place in the log and nothing else: what it has not taken waits there, and is gone when the log has no
room for it any more. The transport buffers a few dozen kilobytes beside that. Who takes nothing for a while, or is
overtaken by the end of the log, is cut off, and may come back with its `Last-Event-ID`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from elastic_daemon.telemetry.events import Event, EventLog
from elastic_daemon.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)

MAX_STREAMS = 64

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]

BURST = 32
"""Events that are written before others get their turn."""


@dataclass(frozen=True)
class Patience:
    """`heartbeat_s`: the longest silence. `send_s`: how long a reader may take nothing."""

    heartbeat_s: float = 15.0
    send_s: float = 20.0


class TooSlow(Exception):
    """A reader that is cut off. The message says why."""


class Source(Protocol):
    """Where events are recorded, and readers counted."""

    events: EventLog
    metrics: Metrics


class EventStreams:
    """All readers of one log. It asks `source` for nothing before the first reader comes."""

    def __init__(self, source: Source, patience: Patience | None = None) -> None:
        self._source = source
        self._patience = patience or Patience()
        self._readers = 0

    @property
    def is_full(self) -> bool:
        return self._readers >= MAX_STREAMS

    def open(self, since: int) -> EventStream:
        """An ASGI response: events after `since`, and then each as it happens."""
        return EventStream(self, since)

    async def serve(self, since: int, receive: Receive, send: Send) -> None:
        self._count(+1)
        writing = asyncio.ensure_future(self._write(since, send))
        leaving = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        except TooSlow as error:
            self._source.metrics.event_stream_dropped()
            log.warning("event_stream_dropped", reason=str(error))
        finally:
            self._count(-1)
            for task in (writing, leaving):
                task.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)

    def _count(self, change: int) -> None:
        self._readers += change
        self._source.metrics.event_streams(self._readers)

    async def _write(self, since: int, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        events = self._source.events
        at = since if since <= events.newest else 0
        if at < events.oldest - 1:
            await self._send(send, f": events {at + 1} to {events.oldest - 1} are no longer kept\n\n")
            at = events.oldest - 1
        while True:
            for number, event in enumerate(events.after(at)):
                await self._send(send, _encode(event))
                at = event.id
                if number % BURST == BURST - 1:
                    await asyncio.sleep(0)
                if at < events.oldest - 1:
                    raise TooSlow(f"it has got event {at}, and the first one kept is {events.oldest}")
            if events.ended:
                return await send({"type": "http.response.body", "body": b""})
            try:
                async with asyncio.timeout(self._patience.heartbeat_s):
                    await events.news(at)
            except TimeoutError:
                await self._send(send, ": still here\n\n")

    async def _send(self, send: Send, text: str) -> None:
        try:
            async with asyncio.timeout(self._patience.send_s):
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        except TimeoutError as error:
            raise TooSlow(f"it has taken nothing for {self._patience.send_s:g} s") from error


class EventStream(Response):
    def __init__(self, streams: EventStreams, since: int) -> None:
        super().__init__()
        self._streams = streams
        self._since = since

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._streams.serve(self._since, receive, send)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _encode(event: Event) -> str:
    return f"id: {event.id}\nevent: {event.name}\ndata: {event.text}\n\n"
