"""WATCHDOG=1 proves that the loop turns: a process whose other threads run on while its loop is blocked sends none.

The end-to-end tests stop the whole process, which would silence a thread that pings, too.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest

from elastic_daemon import protocol as p
from elastic_daemon.config import Settings as DaemonSettings
from elastic_daemon.controller import Controller
from elastic_daemon.membership import Status
from elastic_daemon.supervisor import Supervisor
from watchdog.service import Service, Settings
from watchdog.signals import load_table

PERIOD_S = 0.4
"""Of the service manager. Pings are due four times in it."""

BLOCKED_S = 3 * PERIOD_S
IN_FLIGHT_S = 0.6
"""A ping that was sent just before the loop was blocked may be noted so much later."""


class Manager:
    """A service manager, and another thread that lives in the process under test: both note when."""

    def __init__(self, path: Path) -> None:
        self.pings: list[float] = []
        self.beats: list[float] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(0.05)
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._listen), threading.Thread(target=self._beat)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._socket.close()

    def _listen(self) -> None:
        while not self._over.is_set():
            with suppress(TimeoutError):
                if "WATCHDOG=1" in self._socket.recv(4096).decode().split("\n"):
                    self.pings.append(time.monotonic())

    def _beat(self) -> None:
        while not self._over.wait(0.01):
            self.beats.append(time.monotonic())

    async def hear(self, pings: int) -> None:
        """So many from now on."""
        wanted = len(self.pings) + pings
        async with asyncio.timeout(10):
            while len(self.pings) < wanted:
                await asyncio.sleep(0.01)


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", str(int(PERIOD_S * 1e6)))
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    found = Manager(tmp_path / "notify")
    yield found
    found.close()


class Turn:
    """What a turn of the loop calls. It blocks once, when it is told to."""

    def __init__(self) -> None:
        self.blocks = False
        self.blocked: tuple[float, float] | None = None

    def __call__(self, *_: Any) -> None:
        if self.blocks and self.blocked is None:
            self.block()

    def block(self) -> None:
        began = time.monotonic()
        time.sleep(BLOCKED_S)
        self.blocked = began, time.monotonic()


class Controlled:
    """A controller that serves, and has something due all the time."""

    status, reason, placement = Status.OK, "", None

    def describe(self) -> str:
        return "serving"

    def next_deadline(self) -> float:
        return time.monotonic() + 0.02


class Turning(Supervisor):
    def __init__(self, turn: Turn) -> None:
        super().__init__(DaemonSettings())
        self._controller = cast(Controller, Controlled())
        self._turned = turn

    def tell(self, event: p.Event, at: float | None = None) -> None:
        assert isinstance(event, p.Tick | p.Stalled)
        if isinstance(event, p.Tick):
            self._turned()


@asynccontextmanager
async def supervisor(turn: Turn, _: Path) -> AsyncIterator[None]:
    one = Turning(turn)
    one._exit = asyncio.get_running_loop().create_future()
    supervising = asyncio.create_task(one._turn())
    yield
    one._exit.set_result(p.Exit(0, "the test is over"))
    await asyncio.wait_for(supervising, 5)


@asynccontextmanager
async def watchdog(turn: Turn, tmp_path: Path) -> AsyncIterator[None]:
    service = Service(Settings(tmp_path / "run", tmp_path / "state", load_table(None)))
    cast(Any, service._prober).tick = turn  # and no children that ask a driver
    service._prober.listed = True
    watching = asyncio.create_task(service._watch())
    yield
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching


def in_the_turn(turn: Turn) -> None:
    turn.blocks = True


def in_a_callback(turn: Turn) -> None:
    """Of whatever else runs on the loop: the turn itself would be done at once."""
    asyncio.get_running_loop().call_soon(turn.block)


@pytest.mark.parametrize("program", [supervisor, watchdog])
@pytest.mark.parametrize("block", [in_the_turn, in_a_callback])
async def test_no_ping_while_the_loop_is_blocked_and_other_threads_run(
    program: Callable[..., Any], block: Callable[[Turn], None], manager: Manager, tmp_path: Path
) -> None:
    turn = Turn()
    async with program(turn, tmp_path):
        await manager.hear(3)
        block(turn)
        async with asyncio.timeout(10):
            while turn.blocked is None:
                await asyncio.sleep(0.01)
        await manager.hear(3)
    began, ended = turn.blocked
    assert sum(began < beat < ended for beat in manager.beats) > 10, "the process lived"
    assert not [ping for ping in manager.pings if began + IN_FLIGHT_S < ping < ended]
