"""What the supervisor and the front end tell each other, over a real socket, as the controller sees it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog

from elastic_daemon import protocol as p
from elastic_daemon.config import Settings
from elastic_daemon.gates.answering import Answering
from elastic_daemon.membership import Status
from elastic_daemon.processes.control_server import ControlServer
from elastic_daemon.processes.fork_specs import rank_spec
from elastic_daemon.processes.messages import Message, decode, encode
from elastic_daemon.processes.runtime_dir import RuntimeDir
from elastic_daemon.routes.health import HealthView
from elastic_daemon.settings.sources import Sources
from elastic_daemon.supervisor import Supervisor
from elastic_daemon.tasks import Tasks

TIMEOUT_S = 10.0
SNAPSHOT = p.Snapshot(5, Status.OK, "", ((0, 11), (1, 12)), ())


class Heard(Supervisor):
    """A supervisor whose controller only listens."""

    def __init__(self, sources: Sources | None = None) -> None:
        super().__init__(sources.load().settings if sources is not None else Settings(), sources)
        self.told: asyncio.Queue[p.Event] = asyncio.Queue()
        self._frontend.introduce(11, "response of 11")
        self._frontend.introduce(12, "response of 12")

    def tell(self, event: p.Event, at: float | None = None) -> None:
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
    metrics = supervisor.metrics.render(HealthView(None, "m", 4, 0, {}, {}, 0.0))
    assert 'elastic_requests_preserved_total{how="moved"} 3.0' in metrics


@pytest.fixture
async def log_level() -> AsyncIterator[None]:
    """What a test changes is as before after it."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


async def test_a_reload_changes_the_log_level_of_all_ranks_those_to_come_too(
    clean_environment: pytest.MonkeyPatch, socket_dir: Path, log_level: None
) -> None:
    (file := socket_dir / "daemon.toml").write_text("")
    supervisor = Heard(Sources({"config": file}, {}))
    with socket.socket() as listener:
        supervisor._answering = Answering(nowhere, nowhere, listener, supervisor.settings, Tasks(pytest.fail))  # type: ignore[arg-type]
        server = await supervisor.listen(path := str(socket_dir / "control.sock"))
        ranks = [FrontEnd(*await asyncio.open_unix_connection(path)) for _ in range(2)]
        for number, rank in enumerate(ranks):
            rank.say("hello", role="rank", rank=number, incarnation=11 + number, lifeline=None)
            assert await rank.hear() == {"type": "log_level", "level": "info"}
        file.write_text("log_level = 'warning'\n")
        supervisor._hung_up(False)
        for rank in ranks:
            assert await rank.hear() == {"type": "log_level", "level": "warning"}
        late = FrontEnd(*await asyncio.open_unix_connection(path))
        late.say("hello", role="rank", rank=2, incarnation=13, lifeline=None)
        assert await late.hear() == {"type": "log_level", "level": "warning"}, "it was forked before the reload"
        store = SimpleNamespace(host="", port=0, prefix="")
        start = p.StartRank(0, 14, (0, 1), 2, None)
        runtime = RuntimeDir(socket_dir)
        assert rank_spec(start, supervisor.settings, runtime, store)["log_level"] == "warning"  # type: ignore[arg-type]
        runtime.close()
        for rank in (*ranks, late):
            rank.close()
        await server.close()


class Serves:
    """A controller, as far as the service manager is told of it."""

    status, reason = Status.OK, ""

    def describe(self) -> str:
        return "serving"


async def test_a_reload_is_over_for_systemd_when_the_front_end_goes_by_it(
    clean_environment: pytest.MonkeyPatch, socket_dir: Path
) -> None:
    (file := socket_dir / "daemon.toml").write_text("max_waiting = 6\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, socket.socket() as listener:
        manager.bind(str(socket_dir / "notify"))
        manager.setblocking(False)
        clean_environment.setenv("NOTIFY_SOCKET", str(socket_dir / "notify"))
        supervisor = Heard(Sources({"config": file}, {}))
        supervisor._answering = Answering(nowhere, nowhere, listener, supervisor.settings, Tasks(pytest.fail))  # type: ignore[arg-type]
        server = await supervisor.listen(path := str(socket_dir / "control.sock"))
        front_end = FrontEnd(*await asyncio.open_unix_connection(path))
        front_end.say("hello", role="frontend")
        supervisor.service.turn(Serves())
        assert "READY=1" in manager.recv(4096).decode().split("\n"), "of the start"
        supervisor.publish(SNAPSHOT)
        await front_end.hear()  # it is known

        for text, waiting in (("max_waiting = 7\n", 7), ("max_waiting = 8\n", 8)):
            file.write_text(text)
            supervisor._hung_up(False)
            assert manager.recv(4096).decode().startswith("RELOADING=1\nMONOTONIC_USEC=")
            told = await front_end.hear()
            assert (told["type"], told["max_waiting"]) == ("settings", waiting)
            front_end.say("moved", epoch=5, draining=[], requests=[])
            await asyncio.wait_for(supervisor.told.get(), TIMEOUT_S)
            with pytest.raises(BlockingIOError):
                manager.recv(4096)
            front_end.say("adopted")
            assert await asyncio.wait_for(read(manager), TIMEOUT_S) == "READY=1"
        assert [event["event"] for event in supervisor.events.since(0)] == ["reloaded"] * 2

        file.write_text("max_waiting = -1\n")
        supervisor._hung_up(False)
        assert manager.recv(4096).decode().startswith("RELOADING=1\n")
        assert manager.recv(4096).decode() == "READY=1", "nothing has changed: nobody is waited for"
        front_end.close()
        await server.close()


async def nowhere(*_: object) -> None:
    """An application that nobody asks."""


async def read(manager: socket.socket) -> str:
    return (await asyncio.get_running_loop().sock_recv(manager, 4096)).decode()
