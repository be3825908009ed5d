"""What the supervisor and the front end tell each other, over a real socket, as the controller sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_daemon import protocol as p
from elastic_daemon.config import Settings
from elastic_daemon.control_server import ControlServer
from elastic_daemon.health import HealthView
from elastic_daemon.membership import Status
from elastic_daemon.messages import Message, decode, encode
from elastic_daemon.supervisor import Supervisor

TIMEOUT_S = 10.0
SNAPSHOT = p.Snapshot(5, Status.OK, "", ((0, 11), (1, 12)), ())


class Heard(Supervisor):
    """A supervisor whose controller only listens."""

    def __init__(self) -> None:
        super().__init__(Settings())
        self.told: asyncio.Queue[p.Event] = asyncio.Queue()
        self._frontend.introduce(11, "response of 11")
        self._frontend.introduce(12, "response of 12")

    def tell(self, event: p.Event) -> None:
        self.told.put_nowait(event)

    def publish(self, snapshot: p.Snapshot) -> None:
        self._carry_out((p.Publish(snapshot),))

    async def listen(self, path: str) -> ControlServer:
        server = ControlServer(self._on_message, self._on_hello)
        await server.start(path)
        return server


class FrontEnd:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def say(self, type_: str, **fields: object) -> None:
        self._writer.write(encode({"type": type_, **fields}))

    async def hear(self) -> Message:
        return decode(await asyncio.wait_for(self._reader.readline(), TIMEOUT_S))

    def close(self) -> None:
        self._writer.close()


@pytest.fixture
async def pair(clean_environment: None, socket_dir: Path) -> AsyncIterator[tuple[Heard, FrontEnd]]:
    supervisor, path = Heard(), str(socket_dir / "control.sock")
    server = await supervisor.listen(path)
    front_end = FrontEnd(*await asyncio.open_unix_connection(path))
    front_end.say("hello", role="frontend")
    yield supervisor, front_end
    front_end.close()
    await server.close()


async def test_membership_says_who_drains(pair: tuple[Heard, FrontEnd]) -> None:
    supervisor, front_end = pair
    supervisor.publish(SNAPSHOT)
    first = await front_end.hear()
    supervisor.publish(replace(SNAPSHOT, draining=((1, 12),)))
    assert (first["type"], first["epoch"], first["draining"]) == ("membership", 5, [])
    assert await front_end.hear() == {**first, "draining": [12]}


async def test_moved_requests_are_reported_and_counted(pair: tuple[Heard, FrontEnd]) -> None:
    supervisor, front_end = pair
    requests = [{"rank": 1, "count": 3}, {"rank": 2, "count": 0}]
    front_end.say("moved", epoch=5, draining=[12, 13], requests=requests)
    assert await asyncio.wait_for(supervisor.told.get(), TIMEOUT_S) == p.FrontendMoved(5, (12, 13))
    moves = [event for event in supervisor.events.since(0) if event["event"] == "requests_moved"]
    assert [(event["rank"], event["count"]) for event in moves] == [(1, 3)]
    metrics = supervisor.metrics.render(HealthView(None, "m", 4, 0, {}, {}, 0.0)).decode()
    assert 'elastic_requests_preserved_total{how="moved"} 3.0' in metrics
