"""/events as a stream: old and new, for several readers, for slow ones, until the daemon stops."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from elastic_daemon.app import make_control_app
from elastic_daemon.routes.event_stream import MAX_STREAMS, Patience
from elastic_daemon.telemetry.events import KEPT
from tests.unit.supervised_plane import Plane, asking


@pytest.fixture
def plane() -> Plane:
    return Plane()


@pytest.fixture
async def client(plane: Plane) -> AsyncIterator[httpx.AsyncClient]:
    async with asking(plane) as client:
        yield client


class Stream:
    """A reader of `/events` as a stream; httpx's ASGI transport would wait for its end."""

    def __init__(
        self, plane: Plane, headers: dict[str, str], query: str = "", patience: Patience | None = None, app: Any = None
    ) -> None:
        self.status = 0
        self.taking = asyncio.Event()
        self.taking.set()
        self.headers: dict[str, str] = {}
        self._gone = asyncio.Event()
        self._received: asyncio.Queue[str] = asyncio.Queue()
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "path": "/events",
            "raw_path": b"/events",
            "root_path": "",
            "scheme": "http",
            "query_string": query.encode(),
            "headers": [(k.encode(), v.encode()) for k, v in {"accept": "text/event-stream", **headers}.items()],
        }
        self.task = asyncio.create_task((app or make_control_app(plane, patience))(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        elif message.get("body"):
            await self.taking.wait()
            await self._received.put(message["body"].decode())

    async def text(self) -> str:
        return await asyncio.wait_for(self._received.get(), 10)

    async def event(self) -> dict[str, str]:
        text = await self.text()
        assert text.endswith("\n\n")
        return dict(line.split(": ", 1) for line in text.strip().splitlines())

    @property
    def idle(self) -> bool:
        return self._received.empty()

    async def close(self) -> None:
        self._gone.set()
        await asyncio.wait_for(self.task, 10)


async def test_event_stream_gives_old_and_new_events(plane: Plane) -> None:
    plane.events.record("first", {"n": 1})
    plane.events.record("second", {"n": 2})
    stream = Stream(plane, {}, "since=1")
    second = await stream.event()
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert (second["id"], second["event"]) == ("2", "second")
    assert json.loads(second["data"])["n"] == 2
    assert stream.idle
    plane.events.record("third", {"text": "two\nlines"})
    plane.events.record("fourth", {})
    third, fourth = await stream.event(), await stream.event()
    assert (third["event"], fourth["event"]) == ("third", "fourth")
    assert json.loads(third["data"])["text"] == "two\nlines"
    await stream.close()


async def test_event_stream_goes_on_where_a_client_was_cut_off(plane: Plane) -> None:
    for name in ("first", "second", "third"):
        plane.events.record(name, {})
    stream = Stream(plane, {"last-event-id": "2"}, "since=0")
    assert (await stream.event())["event"] == "third"
    await stream.close()


async def test_two_streams_both_get_everything(plane: Plane) -> None:
    streams = [Stream(plane, {}), Stream(plane, {})]
    for number in range(20):
        plane.events.record(f"e{number}", {})
        if number % 5 == 0:
            await asyncio.sleep(0)
    for stream in streams:
        assert [(await stream.event())["event"] for _ in range(20)] == [f"e{number}" for number in range(20)]
        await stream.close()


async def test_id_of_an_earlier_daemon(plane: Plane, client: httpx.AsyncClient) -> None:
    """Ids start anew with the daemon: who asks for what followed event 500 would wait for 500 events otherwise."""
    plane.events.record("first", {})
    plane.events.record("second", {})
    assert [e["id"] for e in (await client.get("/events", params={"since": 500})).json()] == [1, 2]
    stream = Stream(plane, {"last-event-id": "500"})
    assert [(await stream.event())["event"] for _ in range(2)] == ["first", "second"]
    await stream.close()


async def test_a_stream_says_what_it_cannot_give(plane: Plane) -> None:
    for number in range(KEPT + 5):
        plane.events.record("counted", {"number": number})
    stream = Stream(plane, {"last-event-id": "2"})
    assert await stream.text() == ": events 3 to 5 are no longer kept\n\n"
    assert (await stream.event())["id"] == "6"
    await stream.close()


async def test_a_silent_stream_has_a_pulse(plane: Plane) -> None:
    stream = Stream(plane, {}, patience=Patience(heartbeat_s=0.05))
    assert [await stream.text() for _ in range(3)] == [": still here\n\n"] * 3
    plane.events.record("first", {})
    while (text := await stream.text()).startswith(":"):
        pass
    assert text.startswith("id: 1\nevent: first\n")
    await stream.close()


def _samples(plane: Plane) -> dict[str, float]:
    text = plane.metrics.render(plane.health())
    return {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}


async def test_who_takes_nothing_is_cut_off_and_holds_up_nobody(plane: Plane) -> None:
    patience = Patience(heartbeat_s=5.0, send_s=0.2)
    slow, other = Stream(plane, {}, patience=patience), Stream(plane, {}, patience=patience)
    slow.taking.clear()
    for number in range(100):
        plane.events.record(f"e{number}", {})
    assert [(await other.event())["event"] for _ in range(100)] == [f"e{number}" for number in range(100)]
    await asyncio.wait_for(slow.task, 5)
    assert slow.idle
    assert not other.task.done()
    samples = _samples(plane)
    assert samples["elastic_event_streams_dropped_total"] == 1
    await other.close()


async def test_who_is_overtaken_by_the_end_of_the_log_is_cut_off(plane: Plane) -> None:
    stream = Stream(plane, {})
    plane.events.record("first", {})
    assert (await stream.event())["event"] == "first"
    stream.taking.clear()
    plane.events.record("second", {})
    await asyncio.sleep(0.01)
    for number in range(KEPT + 5):
        plane.events.record("counted", {"number": number})
    stream.taking.set()
    assert (await stream.event())["event"] == "second"
    await asyncio.wait_for(stream.task, 5)
    assert stream.idle
    assert _samples(plane)["elastic_event_streams_dropped_total"] == 1


async def test_a_backlog_lets_others_have_their_turn(plane: Plane) -> None:
    for number in range(KEPT):
        plane.events.record("counted", {"number": number})
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    stream = Stream(plane, {})
    for _ in range(KEPT):
        await stream.event()
    assert turns > KEPT / 40
    counting.cancel()
    await stream.close()


async def test_readers_are_counted_and_limited(plane: Plane, client: httpx.AsyncClient) -> None:
    app = make_control_app(plane)
    streams = [Stream(plane, {}, app=app) for _ in range(MAX_STREAMS)]
    plane.events.record("first", {})
    for stream in streams:
        await stream.event()
    assert _samples(plane)["elastic_event_streams"] == MAX_STREAMS
    one_more = Stream(plane, {}, app=app)
    await asyncio.wait_for(one_more.task, 5)
    assert (one_more.status, one_more.headers["retry-after"]) == (503, "5")
    for stream in streams:
        await stream.close()
    assert _samples(plane)["elastic_event_streams"] == 0


async def test_streams_end_when_the_daemon_stops(plane: Plane) -> None:
    stream = Stream(plane, {})
    plane.events.record("first", {})
    assert (await stream.event())["event"] == "first"
    plane.events.record("last", {})
    plane.events.end()
    assert (await stream.event())["event"] == "last"
    await asyncio.wait_for(stream.task, 5)
    late = Stream(plane, {})
    assert [(await late.event())["event"] for _ in range(2)] == ["first", "last"]
    await asyncio.wait_for(late.task, 5)


async def test_event_stream_with_a_bad_last_event_id(client: httpx.AsyncClient) -> None:
    headers = {"accept": "text/event-stream", "last-event-id": "x"}
    answer = await client.get("/events", headers=headers)
    assert answer.status_code == 400
    assert "Last-Event-ID" in answer.json()["error"]["message"]
    assert (await client.get("/events", params={"since": "x"}, headers=headers)).status_code == 422
