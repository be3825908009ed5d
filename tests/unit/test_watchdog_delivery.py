"""What the daemon is told in which order, and again; and the small HTTP client under it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from watchdog.bindings import Bindings
from watchdog.daemon_client import DaemonClient
from watchdog.delivery import Delivery
from watchdog.docket import Ruling, Target
from watchdog.errors import DaemonUnreachable
from watchdog.fitness import Fitness
from watchdog.unix_http import parse, request
from watchdog.verdict import Verdict


def ruling(gpu: str, verdict: Verdict = Verdict.EXCLUDE, epoch: int = 1) -> Ruling:
    return Ruling(f"{gpu}-{verdict}-{epoch}", gpu, epoch, verdict, "xid:79", "", (), True, None, 0.0)


class Daemon:
    """Answers in turn with `statuses`, then with 204; a real server on a real socket."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.heard: list[tuple[str, str, bytes]] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.split(" ", 2)
        length = int(head.lower().partition("content-length:")[2].split()[0])
        content = await reader.readexactly(length)
        status = self.statuses.pop(0) if self.statuses else 204
        self.heard.append((method, path, content))
        body = b'{"epoch": 2, "ranks": []}' if method == "GET" else b""
        status = 200 if method == "GET" else status
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))
        await writer.drain()
        writer.close()

    @contextlib.asynccontextmanager
    async def at(self, socket: Path) -> AsyncIterator[Daemon]:
        server = await asyncio.start_unix_server(self.answer, socket)
        try:
            yield self
        finally:
            server.close()
            await server.wait_closed()


class Sender:
    def __init__(self) -> None:
        self.gpus: Sequence[Fitness] | None = (Fitness("GPU-a", 0, True, "", Verdict.OK, None),)
        self.lost: list[str] = []
        self.again: list[tuple[Target, int]] = []

    def fitness(self) -> Sequence[Fitness] | None:
        return self.gpus

    def lose_daemon(self, error: str) -> None:
        self.lost.append(error)

    def judge_again(self, target: Target, bindings: Bindings) -> None:
        self.again.append((target, bindings.epoch))


@contextlib.asynccontextmanager
async def delivering(directory: Path) -> AsyncIterator[tuple[Delivery, Sender]]:
    sender = Sender()
    delivery = Delivery(DaemonClient(directory), sender)
    task = asyncio.create_task(delivery.run())
    try:
        yield delivery, sender
    finally:
        task.cancel()


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_the_gravest_first_and_gpus_last(tmp_path: Path) -> None:
    async with Daemon().at(tmp_path / "http.sock") as daemon, delivering(tmp_path) as (delivery, _):
        delivery.put_gpus()
        delivery.put(ruling("GPU-a", Verdict.SUSPECT))
        delivery.put(ruling("GPU-b"))
        await until(lambda: len(daemon.heard) == 3)
        assert [path for _, path, _ in daemon.heard] == [
            "/watchdog/verdicts/GPU-b-exclude-1", "/watchdog/verdicts/GPU-a-suspect-1", "/watchdog/gpus",
        ]  # fmt: skip
        assert delivery.pending == 0


async def test_gpus_are_what_they_are_when_they_are_sent(tmp_path: Path) -> None:
    """The daemon is not there at first; what was due then is out of date when it is."""
    async with delivering(tmp_path) as (delivery, sender):
        delivery.put_gpus()
        await until(lambda: sender.lost)
        sender.gpus = (Fitness("GPU-a", 0, False, "gone", Verdict.EXCLUDE, "xid:79"),)
        async with Daemon().at(tmp_path / "http.sock") as daemon:
            await until(lambda: daemon.heard)
            assert b'"fit": false' in daemon.heard[0][2]


async def test_not_ready_is_tried_again_and_a_refusal_is_not(tmp_path: Path) -> None:
    async with Daemon().at(tmp_path / "http.sock") as daemon, delivering(tmp_path) as (delivery, sender):
        daemon.statuses = [503, 500]
        delivery.put_gpus()
        await until(lambda: len(daemon.heard) == 3)
        assert not sender.lost, "it is there"
        daemon.statuses = [422, 422]
        delivery.put(ruling("GPU-a"))
        delivery.put_gpus()
        await until(lambda: len(daemon.heard) == 5)
        delivery.put(ruling("GPU-b"))
        await until(lambda: len(daemon.heard) == 6)
        assert daemon.heard[5][1] == "/watchdog/verdicts/GPU-b-exclude-1"


async def test_a_stale_epoch_is_judged_again(tmp_path: Path) -> None:
    async with Daemon().at(tmp_path / "http.sock") as daemon, delivering(tmp_path) as (delivery, sender):
        daemon.statuses = [409]
        delivery.put(ruling("GPU-a"))
        await until(lambda: sender.again)
        assert sender.again == [("GPU-a", 2)]
        assert delivery.pending == 0


async def test_nothing_is_said_of_gpus_that_are_not_known(tmp_path: Path) -> None:
    async with Daemon().at(tmp_path / "http.sock") as daemon, delivering(tmp_path) as (delivery, sender):
        sender.gpus = None
        delivery.put_gpus()
        delivery.put(ruling("GPU-a"))
        await until(lambda: daemon.heard)
        assert [path for _, path, _ in daemon.heard] == ["/watchdog/verdicts/GPU-a-exclude-1"]


async def test_a_server_that_does_not_answer_is_unreachable(tmp_path: Path) -> None:
    over = asyncio.Event()

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.close()
        await writer.wait_closed()
        over.clear()

    server = await asyncio.start_unix_server(silent, tmp_path / "http.sock")
    with pytest.raises(TimeoutError):
        await request(tmp_path / "http.sock", "GET", "/", timeout_s=0.1)
    over.set()
    async with asyncio.timeout(5):
        while over.is_set():
            await asyncio.sleep(0.01)
    server.close()
    with pytest.raises(DaemonUnreachable):
        await DaemonClient(tmp_path / "elsewhere").bindings()


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 200 OK\r\n", b"SSH-2.0\r\n\r\n", b"HTTP/1.1 OK\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n{}"],
)  # fmt: skip
def test_what_is_no_answer(answer: bytes) -> None:
    with pytest.raises(ValueError):
        parse(answer)


def test_an_answer() -> None:
    answer = parse(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nServer: x\r\n\r\n{}")
    assert (answer.status, answer.body, answer.text) == (200, b"{}", "{}")
    assert parse(b"HTTP/1.0 204 No Content\r\n\r\n").status == 204
