"""Faults of one rank or its GPU, each done to a live daemon under load or at rest, and when the daemon saw what."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from bench.watched import until_watched
from elastic_daemon.drill.daemon import Daemon
from elastic_daemon.drill.load import prompts_for, run_streams, scheduling_probe
from elastic_daemon.drill.report import StreamResult, compare
from watchdog.simulator import Simulator

RANKS, SURVIVE = 6, 4
"""Four trials in one life of a daemon: lost capacity does not come back."""

OPTIONS = (
    *("--survive-losses", str(SURVIVE)),
    *("--restore", "off"),
    "--watchdog-flags=--max-exclusions 100 --repeat-restarts 0",
)
"""The breaker would stop after a few exclusions, as it should."""

STREAMS, TOKENS = 8, 80
STRIKE_SHARE = 0.3
"""Of all tokens, when the fault happens."""
TIMEOUT_S, RUN_TIMEOUT_S = 30.0, 120.0
POLL_S = 0.1
REST_S = 0.5


class Kind(StrEnum):
    DEATH = "process death"
    XID = "Xid 79"
    LOST = "lost GPU"
    WEDGED = "wedged driver"
    STOPPED_DECODE = "SIGSTOP in decode"
    STOPPED_IDLE = "SIGSTOP idle"

    @property
    def loaded(self) -> bool:
        return self is not Kind.STOPPED_IDLE

    @property
    def from_watchdog(self) -> bool:
        return self is not Kind.DEATH

    @property
    def of_rank(self) -> bool:
        """Done to the process, not to the GPU."""
        return self in (Kind.DEATH, Kind.STOPPED_DECODE, Kind.STOPPED_IDLE)


@dataclass(frozen=True)
class Trial:
    """Seconds from the fault. None: it never came. `named`: the rank that was excluded first."""

    kind: Kind
    rank: int
    verdict_s: float | None
    excluded_s: float | None
    token_s: float | None
    named: int | None
    cause: str
    lost: int
    changed: int
    lateness_s: float
    """How late this process's own timers were, at worst, meanwhile."""

    @property
    def seen_s(self) -> float | None:
        """When the daemon knew."""
        return self.verdict_s if self.kind.from_watchdog else self.excluded_s


@dataclass(frozen=True)
class Strike:
    wall: float
    at: float


class Bench:
    """One life of a daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._prompts = prompts_for(STREAMS)
        self._reference: list[StreamResult] = []

    async def prepare(self) -> None:
        """The undisturbed run, and a watchdog that sees everything."""
        async with asyncio.timeout(RUN_TIMEOUT_S):
            self._reference = await run_streams(self._daemon.url, self._prompts, TOKENS)
        await until_watched(self._daemon, RUN_TIMEOUT_S)

    async def suffer(self, kind: Kind) -> Trial:
        health = await until_watched(self._daemon, RUN_TIMEOUT_S)
        row = max((row for row in health["ranks"] if row["state"] == "active"), key=lambda row: int(row["rank"]))
        since = max(event["id"] for event in await self._daemon.events())
        await asyncio.sleep(REST_S)
        strike = self._striker(kind, row)
        async with scheduling_probe() as delays, asyncio.timeout(RUN_TIMEOUT_S):
            streams: list[StreamResult] = []
            if kind.loaded:
                streams = await run_streams(self._daemon.url, self._prompts, TOKENS, strike.token)
            else:
                strike()
            struck = strike.done
            if struck is None:
                raise RuntimeError("the streams ended before the fault was due")
            events = await self._settle(since)
        result = self._judge(kind, row, struck, events, streams, max(delay.seconds for delay in delays))
        if kind in (Kind.STOPPED_DECODE, Kind.STOPPED_IDLE) and result.excluded_s is None:
            os.kill(row["pids"][0], signal.SIGCONT)
        return result

    def _striker(self, kind: Kind, row: dict[str, Any]) -> _Striker:
        pid, gpu = row["pids"][0], row["gpu"]
        if kind.of_rank:
            number = signal.SIGKILL if kind is Kind.DEATH else signal.SIGSTOP
            return _Striker(lambda: os.kill(pid, number))
        simulator = Simulator.open(self._daemon.control.runtime_dir)
        faults = {
            Kind.XID: lambda: simulator.xid(gpu, 79),
            Kind.LOST: lambda: simulator.lose(gpu),
            Kind.WEDGED: lambda: simulator.hang(gpu),
        }
        return _Striker(faults[kind])

    async def _settle(self, since: int) -> list[dict[str, Any]]:
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            events = await self._daemon.events(since)
            if any(event["event"] == "recovery_done" for event in events) or time.monotonic() > deadline:
                return events
            await asyncio.sleep(POLL_S)

    def _judge(
        self,
        kind: Kind,
        row: dict[str, Any],
        struck: Strike,
        events: Sequence[dict[str, Any]],
        streams: Sequence[StreamResult],
        lateness_s: float,
    ) -> Trial:
        def first(name: str, **wanted: Any) -> dict[str, Any] | None:
            found = (event for event in events if event["event"] == name)
            return next((event for event in found if all(event.get(k) == v for k, v in wanted.items())), None)

        def after(event: dict[str, Any] | None) -> float | None:
            return None if event is None else event["time"] - struck.wall

        excluded, done = first("rank_excluded"), first("recovery_done")
        token = None
        if done is not None and streams:
            resumed = struck.at + done["time"] - done["seconds"]["resume"] - struck.wall
            arrivals = [arrival for stream in streams for arrival in stream.arrivals if arrival > resumed]
            token = min(arrivals) - struck.at if arrivals else None
        outcome = compare(self._reference, streams) if streams else None
        return Trial(
            kind,
            row["rank"],
            after(first("verdict", act=True)),
            after(excluded),
            token,
            None if excluded is None else excluded["rank"],
            "" if excluded is None else excluded["reason"],
            len(outcome.lost) if outcome else 0,
            len({difference.stream for difference in outcome.differences}) if outcome else 0,
            lateness_s,
        )


class _Striker:
    """Does it once: when called, or when so many tokens have come."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.done: Strike | None = None
        self._act = act
        self._left = round(STRIKE_SHARE * STREAMS * TOKENS)

    def __call__(self) -> None:
        self.done = Strike(time.time(), time.monotonic())
        self._act()

    def token(self, _stream: int, count: int) -> None:
        self._left -= count
        if self._left <= 0 and self.done is None:
            self()
