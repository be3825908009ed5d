"""The end of a rank is told once, by whatever speaks first."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Awaitable, Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from elastic_daemon.processes.children import Processes
from elastic_daemon.processes.lifeline import hold

IDENTITY = (2, 7)


def _live(path: str, held: Any, end: Any) -> None:
    if path:
        hold(Path(path))
    held.set()
    end.wait()


class FakeZygote:
    """Forks nothing: its child is there already, and ends when a test says so."""

    def __init__(self) -> None:
        self.end: Callable[[], None] = lambda: None
        self.reaped = asyncio.Event()

    async def fork(self, _role: str, _name: str, on_exit: Callable[[Any], None], **_: Any) -> Any:
        child = SimpleNamespace(pid=4711, kill=lambda: None)
        self.end = lambda: on_exit(child)
        return child

    async def reap(self, _child: Any) -> str:
        self.reaped.set()
        return "killed"


async def _with_rank(
    check: Callable[[Processes, FakeZygote, list[Any]], Awaitable[None]],
) -> None:
    ended: list[Any] = []
    zygote, running = FakeZygote(), set[asyncio.Task[None]]()
    tasks: Any = SimpleNamespace(spawn=lambda work: running.add(asyncio.create_task(work)))
    events: Any = SimpleNamespace(record=lambda *_: None)
    given: Any = zygote
    processes = Processes(given, tasks, events, ended.append, lambda: None, lambda _: None)
    await processes.fork_rank(IDENTITY)
    await check(processes, zygote, ended)


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)


def _holder(path: Path) -> BaseProcess:
    spawn = multiprocessing.get_context("spawn")
    held, end = spawn.Event(), spawn.Event()
    process = spawn.Process(target=_live, args=(str(path), held, end))
    process.start()
    assert held.wait(30)
    return process


def test_a_death_is_told_by_the_lifeline_and_not_again(tmp_path: Path) -> None:
    async def check(processes: Processes, zygote: FakeZygote, ended: list[Any]) -> None:
        processes.follow_rank(IDENTITY, str(tmp_path / "lifeline"))
        holder.kill()
        await _until(lambda: bool(ended))
        assert processes.rank_pids == {IDENTITY: 4711}, "it is dying, and not gone"
        zygote.end()
        await zygote.reaped.wait()
        assert ended == [IDENTITY]
        assert processes.rank_pids == {}

    holder = _holder(tmp_path / "lifeline")
    asyncio.run(_with_rank(check))


def test_without_a_lifeline_its_end_is_told(tmp_path: Path) -> None:
    async def check(processes: Processes, zygote: FakeZygote, ended: list[Any]) -> None:
        processes.follow_rank(IDENTITY, str(tmp_path / "there is none"))
        assert ended == []
        zygote.end()
        await zygote.reaped.wait()
        assert ended == [IDENTITY]

    asyncio.run(_with_rank(check))


def test_a_lifeline_that_comes_free_after_the_end_says_nothing(tmp_path: Path) -> None:
    async def check(processes: Processes, zygote: FakeZygote, ended: list[Any]) -> None:
        processes.follow_rank(IDENTITY, str(tmp_path / "lifeline"))
        zygote.end()
        await zygote.reaped.wait()
        holder.kill()
        holder.join()
        await asyncio.sleep(0.2)
        assert ended == [IDENTITY]

    holder = _holder(tmp_path / "lifeline")
    asyncio.run(_with_rank(check))
