"""The daemon's hand on a real watchdog: started, seen to live, hung, dead, and gone with its parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from elastic_daemon.telemetry.events import EventLog
from elastic_daemon.watch.driver import simulate
from elastic_daemon.watch.process import WatchdogProcess
from elastic_daemon.watch.upkeep import WatchMode, WatchState
from tests import proc
from watchdog.status import read_status

pytestmark = pytest.mark.contract

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 30.0

PARENT = """
import asyncio, sys
from pathlib import Path
from elastic_daemon.telemetry.events import EventLog
from elastic_daemon.watch.process import WatchdogProcess
from elastic_daemon.watch.upkeep import WatchMode

async def main():
    home = Path(sys.argv[1])
    options = ("--simulated", "--state-dir", str(home / "state"))
    await WatchdogProcess(WatchMode.SPAWN, home, options, EventLog(), ()).run()

asyncio.run(main())
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    simulate(tmp_path, 2, 1, 0)
    return tmp_path


def options(home: Path) -> tuple[str, ...]:
    return ("--simulated", "--state-dir", str(home / "state"))


@contextlib.asynccontextmanager
async def tended(mode: WatchMode, home: Path) -> AsyncIterator[tuple[WatchdogProcess, EventLog]]:
    events = EventLog()
    process = WatchdogProcess(mode, home, options(home), events, ())
    task = asyncio.create_task(process.run())
    try:
        yield process, events
    finally:
        await process.close()
        await asyncio.wait_for(task, TIMEOUT_S)


async def until(condition: Callable[[], object], what: str) -> None:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail(f"{TIMEOUT_S:g} s without {what}")


def start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)


async def test_killed_and_stopped_it_is_replaced_and_ends_in_order(home: Path) -> None:
    async with tended(WatchMode.SPAWN, home) as (process, events):
        pids = []
        for number in (signal.SIGKILL, signal.SIGSTOP):
            await until(lambda: process.state is WatchState.ALIVE, "a sign of life")
            assert process.trouble is None
            assert process.pid is not None
            pids.append(process.pid)
            os.kill(process.pid, number)
            await until(lambda: process.state is WatchState.DOWN, f"notice of {number.name}")
            assert process.trouble
        await until(lambda: process.state is WatchState.ALIVE, "a sign of life")
        assert process.pid is not None
        assert process.pid not in pids
        assert not proc.alive(pids)
        last = process.pid
    assert not proc.alive([last])
    assert not (home / "watchdog.json").exists(), "it had the time to clean up"
    names = [event["event"] for event in events.since(0)]
    assert names == [*["watchdog_spawned", "watchdog_alive", "watchdog_down"] * 2, "watchdog_spawned", "watchdog_alive"]


async def test_external_is_only_watched(home: Path) -> None:
    async with tended(WatchMode.EXTERNAL, home) as (process, _):
        command = [sys.executable, "-m", "watchdog.cli", "run", "--runtime-dir", str(home), *options(home)]
        other = start(command)
        try:
            await until(lambda: process.state is WatchState.ALIVE, "a sign of life of another's watchdog")
            assert process.pid is None
            other.send_signal(signal.SIGSTOP)
            await until(lambda: process.state is WatchState.DOWN, "notice that it hangs")
            other.send_signal(signal.SIGCONT)
            await until(lambda: process.state is WatchState.ALIVE, "notice that it goes on")
        finally:
            other.send_signal(signal.SIGCONT)
            other.terminate()
            assert other.wait(TIMEOUT_S) == 0


async def test_it_dies_with_a_supervisor_that_is_killed(home: Path) -> None:
    parent = start([sys.executable, "-c", PARENT, str(home)])
    try:
        await until((home / "watchdog.json").exists, "a watchdog")
        status = read_status(home)
        pids = [status["pid"], *status["driver"]["children"].values()]
        assert proc.alive(pids) == pids
    finally:
        parent.kill()
        parent.wait()
    await until(lambda: not proc.alive(pids), "the end of the watchdog and its children")
