"""The daemon's sentence for `systemctl status`, and its wait before there is anything to control."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from elastic_daemon.config import Settings
from elastic_daemon.membership import Status
from elastic_daemon.processes.service_manager import ServiceManager, sentence


@dataclass(frozen=True)
class Told:
    status: Status
    doing: str
    reason: str = ""

    def describe(self) -> str:
        return self.doing


def test_the_sentence_says_what_is_wrong_although_it_serves() -> None:
    doing = "serving epoch 3 with 3 of 4 ranks"
    assert sentence(Told(Status.OK, doing)) == doing
    assert sentence(Told(Status.DEGRADED, doing, "rank 2: xid 79")) == f"{doing} (rank 2: xid 79)"


def test_a_reason_that_is_in_the_sentence_is_not_repeated() -> None:
    doing = "unavailable in epoch 5: 1 rank cannot hold 16 experts"
    assert sentence(Told(Status.UNAVAILABLE, doing, "1 rank cannot hold 16 experts")) == doing


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield receiver


@pytest.mark.parametrize(
    ("status", "ready"), [(Status.STARTING, False), (Status.DEGRADED, True), (Status.OK, True)], ids=str
)
def test_ready_is_said_only_when_requests_are_served(manager: socket.socket, status: Status, ready: bool) -> None:
    ServiceManager(Settings()).turn(Told(status, "doing"))
    assert ("READY=1" in manager.recv(4096).decode().split("\n")) is ready


async def test_preparing_asks_for_time_and_ends_with_the_first_result(manager: socket.socket) -> None:
    service = ServiceManager(Settings())
    first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    other: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(service.prepare({first, other}))
    await asyncio.sleep(0)
    assert "EXTEND_TIMEOUT_USEC=60000000" in manager.recv(4096).decode().split("\n")
    assert not waiting.done()
    first.set_result(None)
    await asyncio.wait_for(waiting, 5)
    assert service.is_turning
    other.cancel()


async def test_preparing_asks_for_no_more_than_a_rank_would_get(manager: socket.socket) -> None:
    service = ServiceManager(Settings(start_timeout=1e-9))
    first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.05, first.set_result, None)
    await asyncio.wait_for(service.prepare({first}), 5)
    with pytest.raises(BlockingIOError):
        manager.recv(4096)


def test_stopping_asks_for_the_drain_and_what_follows(manager: socket.socket) -> None:
    ServiceManager(Settings()).stopping(100.0)
    assert manager.recv(4096).decode().split("\n") == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=120000000"]
