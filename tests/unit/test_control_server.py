"""The supervisor's end of the control connections, over a real Unix socket."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from elastic_daemon.errors import ControlClosed
from elastic_daemon.processes import control_server
from elastic_daemon.processes.control_server import ControlServer, Peer
from elastic_daemon.processes.messages import MAX_LINE_BYTES, ControlClient, Message, decode, encode


class Child:
    """A child's end of the connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def say(self, type_: str, **fields: object) -> None:
        self.writer.write(encode({"type": type_, **fields}))

    async def hear(self) -> Message:
        return decode(await asyncio.wait_for(self.reader.readline(), 10))

    async def ended(self) -> bool:
        try:
            return await asyncio.wait_for(self.reader.read(), 10) == b""
        except ConnectionResetError:  # the server had not read all that was sent
            return True


class Server:
    """A control server that keeps what it hears."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.hellos: asyncio.Queue[Peer] = asyncio.Queue()
        self.heard: asyncio.Queue[tuple[Peer, Message]] = asyncio.Queue()
        self.control = ControlServer(lambda *said: self.heard.put_nowait(said), self.hellos.put_nowait)
        self.children: list[Child] = []

    async def child(self) -> Child:
        self.children.append(Child(*await asyncio.open_unix_connection(self.path, limit=MAX_LINE_BYTES)))
        return self.children[-1]

    async def rank(self, rank: int = 0, incarnation: int = 1) -> tuple[Child, Peer]:
        child = await self.child()
        child.say("hello", role="rank", rank=rank, incarnation=incarnation)
        return child, await asyncio.wait_for(self.hellos.get(), 10)

    async def message(self) -> tuple[Peer, Message]:
        return await asyncio.wait_for(self.heard.get(), 10)


@pytest.fixture
async def server(socket_dir: Path) -> AsyncIterator[Server]:
    server = Server(socket_dir / "control.sock")
    await server.control.start(server.path)
    yield server
    await asyncio.wait_for(server.control.close(), 10)
    for child in server.children:
        child.writer.close()


async def test_only_this_user_may_connect(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stat.S_IMODE(Path(server.path).stat().st_mode) == 0o600
    monkeypatch.setattr(control_server, "_peer_uid", lambda _: 12345)
    child = await server.child()
    child.say("hello", role="rank", rank=0, incarnation=1)
    assert await child.ended()
    assert server.hellos.empty()


async def test_hello_introduces_and_messages_follow(server: Server) -> None:
    child, peer = await server.rank(2, 7)
    assert (peer.role, peer.rank, peer.incarnation) == ("rank", 2, 7)
    child.say("ready", layers=4)
    child.say("fault", epoch=1)
    assert await server.message() == (peer, {"type": "ready", "layers": 4})
    assert await server.message() == (peer, {"type": "fault", "epoch": 1})
    peer.send("fence", epoch=2)
    assert await child.hear() == {"type": "fence", "epoch": 2}


async def test_front_end(server: Server) -> None:
    child = await server.child()
    child.say("hello", role="frontend")
    peer = await asyncio.wait_for(server.hellos.get(), 10)
    assert (peer.role, peer.rank, peer.incarnation) == ("frontend", -1, 0)


async def test_the_blocking_client_of_a_rank(server: Server) -> None:
    def be_rank() -> list[Message]:
        client = ControlClient(server.path)
        client.send("hello", role="rank", rank=1, incarnation=4)
        heard = next(client.messages())
        client.send("fenced", epoch=heard["epoch"])
        client.close()
        return [heard]

    rank = asyncio.create_task(asyncio.to_thread(be_rank))
    peer = await asyncio.wait_for(server.hellos.get(), 10)
    peer.send("fence", epoch=5)
    assert await server.message() == (peer, {"type": "fenced", "epoch": 5})
    assert await rank == [{"type": "fence", "epoch": 5}]


async def test_calls_get_their_own_answers(server: Server) -> None:
    child, peer = await server.rank()
    first = asyncio.create_task(peer.call("column"))
    second = asyncio.create_task(peer.call("wrong_slots"))
    asked = [await child.hear(), await child.hear()]
    assert [(m["type"], m["name"]) for m in asked] == [("call", "column"), ("call", "wrong_slots")]
    child.say("reply", id=asked[1]["id"], result=[[0, 1, 2]], error=None)
    child.say("reply", id=asked[0]["id"], result=[[3]], error=None)
    assert (await first, await second) == ([[3]], [[0, 1, 2]])
    assert server.heard.empty(), "a reply is no message"


async def test_a_call_that_fails_there(server: Server) -> None:
    child, peer = await server.rank(3)
    call = asyncio.create_task(peer.call("column"))
    child.say("reply", id=(await child.hear())["id"], result=None, error="ValueError: no")
    with pytest.raises(RuntimeError, match="rank 3: ValueError: no"):
        await call


async def test_a_call_to_a_rank_that_dies(server: Server) -> None:
    child, peer = await server.rank(3)
    call = asyncio.create_task(peer.call("column"))
    await child.hear()
    child.writer.close()
    with pytest.raises(ControlClosed, match="rank 3"):
        await asyncio.wait_for(call, 10)


async def test_a_call_to_a_rank_that_is_gone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "CALL_TIMEOUT_S", 10.0)
    child, peer = await server.rank()
    pending = asyncio.create_task(peer.call("column"))
    await child.hear()
    child.writer.close()
    with pytest.raises(ControlClosed):
        await pending
    with pytest.raises(ControlClosed):
        await peer.call("column")


async def test_a_call_without_answer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "CALL_TIMEOUT_S", 0.05)
    child, peer = await server.rank()
    with pytest.raises(TimeoutError):
        await peer.call("column")
    late = await child.hear()
    child.say("reply", id=late["id"], result=1, error=None)
    child.say("ready")
    assert (await server.message())[1] == {"type": "ready"}, "a late reply does no harm"


async def test_sending_to_a_rank_that_is_gone_does_nothing(server: Server) -> None:
    child, peer = await server.rank()
    call = asyncio.create_task(peer.call("column"))
    await child.hear()
    child.writer.close()
    with pytest.raises(ControlClosed):
        await call  # now the server has seen the end
    peer.send("fence", epoch=1)


@pytest.mark.parametrize("line", [b"nonsense\n", b"[]\n", b'{"type": "hello"}\n'])
async def test_a_bad_line_ends_that_connection_only(server: Server, line: bytes) -> None:
    good, peer = await server.rank()
    bad = await server.child()
    bad.writer.write(line)
    assert await bad.ended()
    good.say("ready")
    assert await server.message() == (peer, {"type": "ready"})
    assert server.hellos.empty()


async def test_lines_longer_than_the_default_of_asyncio(server: Server) -> None:
    child, peer = await server.rank()
    column = [list(range(256)) for _ in range(200)]
    child.say("fenced", epoch=1, column=column)
    assert (await server.message())[1]["column"] == column
    peer.send("regroup", placement=column)
    assert (await child.hear())["placement"] == column


async def test_closing_ends_all_connections(server: Server) -> None:
    child, _ = await server.rank()
    await asyncio.wait_for(server.control.close(), 10)
    assert await child.ended()
    with pytest.raises(OSError):
        await server.child()
