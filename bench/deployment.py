"""One daemon under load, and all that a benchmark does to the size of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import httpx

from bench.changes import QUIET_S, SETTLED_S, Change, Kind, change_of
from bench.clocks import clock_offset_s
from elastic_daemon.commands.operator_commands import TIMEOUT_S
from elastic_daemon.drill.daemon import Daemon, victims_of
from elastic_daemon.drill.load import scheduling_probe
from elastic_daemon.errors import DaemonUnreachable, ElasticError
from watchdog.simulator import Simulator
from watchdog.status import read_status

CHANGE_TIMEOUT_S = 90.0
POLL_S = 0.1

Event = Mapping[str, Any]


class Feed:
    """The daemon's events as they happen, over one connection: to poll would take time from clients."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._events: list[Event] = []
        self._news = asyncio.Condition()
        self._error: BaseException | None = None

    @contextlib.asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def mark(self) -> int:
        """To be handed to `since` later."""
        return len(self._events)

    def since(self, mark: int) -> list[Event]:
        return self._events[mark:]

    async def until(self, what: str, mark: int, true: Callable[[list[Event]], bool]) -> None:
        """Wait until `true` of the events since `mark`. Raises ElasticError after `CHANGE_TIMEOUT_S`."""
        try:
            async with asyncio.timeout(CHANGE_TIMEOUT_S), self._news:
                await self._news.wait_for(lambda: self._error is not None or true(self.since(mark)))
        except TimeoutError as error:
            names = [event["event"] for event in self.since(mark)]
            raise ElasticError(f"{what}: not within {CHANGE_TIMEOUT_S:g} s; events since: {names}") from error
        if self._error is not None:
            raise ElasticError(f"{what}: no more events come: {self._error!r}") from self._error

    async def _follow(self) -> None:
        control = self._daemon.control
        try:
            async with control.async_client() as client:
                request = client.stream(
                    "GET",
                    f"{control.base_url}/events",
                    headers={"Accept": "text/event-stream"},
                    timeout=httpx.Timeout(TIMEOUT_S, read=None),
                )
                async with request as answer:
                    async for line in answer.aiter_lines():
                        if line.startswith("data: "):
                            await self._take(json.loads(line.removeprefix("data: ")))
            raise ConnectionError("the daemon has ended the connection")
        except (httpx.HTTPError, OSError, ValueError) as error:
            async with self._news:
                self._error = error
                self._news.notify_all()

    async def _take(self, event: Event) -> None:
        async with self._news:
            self._events.append(event)
            self._news.notify_all()


def excluded(rank: int) -> Callable[[list[Event]], bool]:
    """Whether the rank was lost, and the group has closed up around it."""

    def true(events: list[Event]) -> bool:
        at = [n for n, event in enumerate(events) if event["event"] == "rank_excluded" and event["rank"] == rank]
        return bool(at) and any(event["event"] == "recovery_done" for event in events[at[0] :])

    return true


def rejoined(rank: int) -> Callable[[list[Event]], bool]:
    """Whether a new process of the rank has been let into the group."""

    def true(events: list[Event]) -> bool:
        ready = [n for n, event in enumerate(events) if event["event"] == "rank_standby" and event["rank"] == rank]
        later = events[ready[0] :] if ready else []
        return any(event["event"] == "recovery_done" and event["kind"] == "grow" for event in later)

    return true


class Deployment:
    """`daemon`, with its watchdog on and automation as it comes. `ranks`: how many serve at rest."""

    def __init__(self, daemon: Daemon, feed: Feed, ranks: int) -> None:
        self.daemon, self.feed, self.ranks = daemon, feed, ranks

    async def rejoin(self, rank: int) -> Change:
        """Kill a rank and wait until it is back."""

        async def act() -> float:
            with victims_of(await self.daemon.health(), [rank]) as victims:
                at = time.monotonic()
                victims[0].kill()
            return at

        return await self._change(Kind.REJOIN, act, f"return of rank {rank}", rejoined(rank))

    async def lose_to_spare(self, rank: int) -> Change:
        """The rank's GPU falls off the bus; wait until the rank serves on a spare one. Then replace the lost one."""
        gpu = await self._gpu_of(rank)

        async def act() -> float:
            at = time.monotonic()
            with Simulator.open(self.daemon.control.runtime_dir) as simulator:
                simulator.lose(gpu)
            return at

        change = await self._change(Kind.SPARE, act, f"rank {rank} on a spare GPU", rejoined(rank))
        with Simulator.open(self.daemon.control.runtime_dir) as simulator:
            simulator.replace(gpu)
        return change

    async def replace(self, rank: int) -> Change:
        """The rank's GPU falls off the bus, there is no other, and after a while a new one appears."""
        gpu, mark = await self._gpu_of(rank), self.feed.mark()
        with Simulator.open(self.daemon.control.runtime_dir) as simulator:
            simulator.lose(gpu)
        await self.feed.until(f"exclusion of rank {rank}, whose GPU is lost", mark, excluded(rank))

        async def act() -> float:
            at = time.monotonic()
            with Simulator.open(self.daemon.control.runtime_dir) as simulator:
                simulator.replace(gpu)
            return at

        return await self._change(Kind.REPLACEMENT, act, f"rank {rank} on a new GPU", rejoined(rank), self.ranks - 1)

    async def scale(self, kind: Kind, *sizes: int) -> Change:
        """To each of `sizes` in turn, by order."""

        async def act() -> float:
            at = time.monotonic()
            for size in sizes:
                await self._order(size)
            return at

        return await self._change(kind, act, f"scale to {sizes}", lambda _: True)

    async def _order(self, size: int) -> None:
        body = {"new_data_parallel_size": size, "drain_timeout": CHANGE_TIMEOUT_S}
        answer = await self.daemon.post("/scale_elastic_ep", body, CHANGE_TIMEOUT_S + TIMEOUT_S)
        if answer.status_code != 200:
            raise ElasticError(f"scale to {size}: {answer.status_code}: {answer.text}")
        self.ranks = size

    async def _change(
        self,
        kind: Kind,
        act: Callable[[], Awaitable[float]],
        what: str,
        over: Callable[[list[Event]], bool],
        serving: int | None = None,
    ) -> Change:
        """`act` does it and says when it began; `over` of the events since tells the end of it."""
        await self._until_serving(serving or self.ranks)
        await asyncio.sleep(QUIET_S)
        mark, clock_s = self.feed.mark(), clock_offset_s()
        async with scheduling_probe() as delays:
            at = await act()
            await self.feed.until(what, mark, over)
            await self._until_serving(self.ranks)
            await asyncio.sleep(SETTLED_S)
        return change_of(kind, at, self.feed.since(mark), clock_s, delays)

    async def _gpu_of(self, rank: int) -> str:
        """Once the watchdog knows all ranks. Raises ElasticError."""
        deadline = time.monotonic() + CHANGE_TIMEOUT_S
        while True:
            health = await self.daemon.health()
            if health["watchdog"]["state"] == "alive":
                status = read_status(self.daemon.control.runtime_dir)
                gpus = {row["rank"]: row["gpu"] for row in health["ranks"] if row["state"] == "active"}
                if status["epoch"] == health["epoch"] and set(gpus.values()) <= set(status["driver"]["listening"]):
                    return str(gpus[rank])
            if time.monotonic() > deadline:
                raise ElasticError(f"the watchdog does not know rank {rank}: {health['watchdog']}, {health['reason']}")
            await asyncio.sleep(POLL_S)

    async def _until_serving(self, ranks: int) -> None:
        deadline = time.monotonic() + CHANGE_TIMEOUT_S
        while True:
            try:
                health = await self.daemon.health()
                why = f"{health['status']}, {health['reason']}, {health['doing']}"
                if health["status"] in ("ok", "degraded") and health["data_parallel_size"]["active"] == ranks:
                    return
            except DaemonUnreachable as error:
                why = str(error)
            if time.monotonic() > deadline:
                raise ElasticError(f"{ranks} ranks do not serve after {CHANGE_TIMEOUT_S:g} s: {why}")
            await asyncio.sleep(POLL_S)
