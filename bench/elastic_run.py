"""Grows, shrinks and mends daemons under load, section by section, and keeps what it measures."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.changes import AFTER_S, BEFORE_S, QUIET_S, Change, Kind, Seen, seen, worst_delay
from bench.deployment import Deployment, Feed
from bench.footprint import Footprint
from bench.load import Load, Outcome, Window
from elastic_daemon.drill.daemon import Daemon, Display, own_daemon
from elastic_daemon.drill.load import prompts_for, run_streams, scheduling_probe
from elastic_daemon.drill.report import StreamResult
from elastic_daemon.errors import DaemonUnreachable, ElasticError
from watchdog.simulator import SimulatorError

RANKS, MOST, SPARES = 4, 6, 2

OPTIONS = (
    *("--max-ranks", str(MOST)),
    # One GPU after the other is lost here within minutes: the breaker would stop that, as it should.
    "--watchdog-flags=--max-exclusions 100",
)
WITH_SPARES = (*OPTIONS, "--spare-gpus", str(SPARES))

RUN_TIMEOUT_S = 120.0
REST_S = 3.0
"""Without load before a footprint is taken, so that what requests hold is gone."""

CALM_S, QUICK_CALM_S = 20.0, 8.0
CALM_WINDOW_S = BEFORE_S + AFTER_S + 0.05
"""As long as what is looked at around a regroup, which takes about 50 ms."""

WARM_UPS = 2
ERRORS = (ElasticError, DaemonUnreachable, SimulatorError, TimeoutError, ValueError)


@dataclass(frozen=True)
class Plan:
    """How often each change is made. `pairs`: of throughput windows, before and after all, beside
    another daemon; 0 for neither."""

    rejoins: int
    spares: int
    steps: int
    rounds: int
    pairs: int
    replacements: int
    calm_s: float

    @classmethod
    def of(cls, cycles: int, quick: bool, wear: bool = False) -> Plan:
        return cls(
            rejoins=cycles if quick else 2 * cycles,
            spares=1 if quick else SPARES,
            steps=cycles,
            rounds=cycles,
            pairs=(cycles if quick else cycles + 2) if wear else 0,
            replacements=max(1, cycles // 2),
            calm_s=QUICK_CALM_S if quick else CALM_S,
        )


@dataclass
class Windows:
    """Tokens per second of the daemon that is changed and of one that is left alone, window by window, in the order
    A B B A A B ...: the two in turn, and the same one twice in a row, which shows the noise."""

    worn: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [one / other for one, other in zip(self.worn, self.alone, strict=False) if other > 0]

    @property
    def neighbours(self) -> list[tuple[float, float]]:
        """Windows of one daemon with none of the other's between them."""
        sides = ((self.worn, 1), (self.alone, 0))
        return [(rates[n], rates[n + 1]) for rates, first in sides for n in range(first, len(rates) - 1, 2)]


@dataclass
class Results:
    """All raw results. `calm`: the longest wait in each undisturbed `CALM_WINDOW_S`, `calm_delays` beside them.

    `before`, `after`: throughput, of all changes with spare GPUs.
    """

    model: str = ""
    calm: list[float] = field(default_factory=list)
    calm_delays: list[float] = field(default_factory=list)
    changes: list[Seen] = field(default_factory=list)
    outcome: Outcome = field(default_factory=Outcome)
    footprints: dict[str, Footprint] = field(default_factory=dict)
    before: Windows = field(default_factory=Windows)
    after: Windows = field(default_factory=Windows)
    problems: list[str] = field(default_factory=list)

    def of(self, kind: Kind) -> list[Seen]:
        return [change for change in self.changes if change.kind is kind]


class Run:
    def __init__(self, plan: Plan, streams: int, tokens: int, say: Callable[[str], None], display: Display) -> None:
        self.results = Results()
        self._plan, self._tokens, self._say, self._display = plan, tokens, say, display
        self._prompts = prompts_for(streams)
        self._reference: list[StreamResult] = []

    async def everything(self) -> None:
        """A section that fails is a problem of the results, and ends the life of its daemon."""
        async with contextlib.AsyncExitStack() as lives:
            with self._noted("with spare GPUs"):
                worn = await lives.enter_async_context(self._daemon(WITH_SPARES))
                if not self._plan.pairs:
                    await self._changes(worn)
                else:
                    alone = await lives.enter_async_context(self._daemon(WITH_SPARES))
                    await self._undisturbed(worn)
                    await self._throughput(worn, alone, self.results.before)
                    await self._changes(worn)
                    await self._throughput(worn, alone, self.results.after)
        with self._noted("without spare GPUs"):
            async with self._daemon(OPTIONS) as daemon:
                await self._undisturbed(daemon)
                await self._replacements(daemon)

    @contextlib.contextmanager
    def _noted(self, section: str) -> Any:
        try:
            yield
        except ERRORS as error:
            self.results.problems.append(f"{section}: {type(error).__name__}: {error}")
            self._say(f"  {self.results.problems[-1]}")

    @contextlib.asynccontextmanager
    async def _daemon(self, options: Sequence[str]) -> AsyncIterator[Daemon]:
        async with own_daemon(RANKS, self._display, options) as daemon:
            daemon.keep_log = True
            yield daemon
            daemon.keep_log = self._is_bad

    @property
    def _is_bad(self) -> bool:
        outcome = self.results.outcome
        return bool(self.results.problems or outcome.lost or outcome.refused or outcome.changed)

    async def _changes(self, daemon: Daemon) -> None:
        self.results.model = (await daemon.health())["model"]
        await self._undisturbed(daemon)
        await self._calm(daemon)
        await self._footprint("at the start", daemon)
        async with self._deployment(daemon) as (deployment, done):
            for number in range(self._plan.rejoins):
                done(await deployment.rejoin(number % RANKS))
            for number in range(self._plan.spares):
                done(await deployment.lose_to_spare((number + 1) % RANKS))
        await self._footprint("after kills and rejoins", daemon)
        async with self._deployment(daemon) as (deployment, done):
            for _ in range(self._plan.steps):
                done(await deployment.scale(Kind.DOWN, RANKS - 1))
                done(await deployment.scale(Kind.UP, RANKS))
            for _ in range(self._plan.rounds):
                done(await deployment.scale(Kind.MANY, 2, MOST, RANKS))
        await self._footprint("after scaling by hand", daemon)

    async def _replacements(self, daemon: Daemon) -> None:
        async with self._deployment(daemon) as (deployment, done):
            for number in range(self._plan.replacements):
                done(await deployment.replace(number % RANKS))

    async def _undisturbed(self, daemon: Daemon) -> None:
        self._say("undisturbed run")
        for _ in range(WARM_UPS):
            self._reference = await self._streams(daemon)
        if errors := [stream.error for stream in self._reference if stream.error is not None]:
            raise ElasticError(f"{len(errors)} streams failed in the undisturbed run already: {errors[0]}")

    async def _calm(self, daemon: Daemon) -> None:
        self._say(f"{self._plan.calm_s:g} s without a change")
        async with Load(daemon.url, self._reference) as load, scheduling_probe() as delays:
            await asyncio.sleep(QUIET_S + len(self._prompts) * 0.2)
            since = time.monotonic()
            await asyncio.sleep(self._plan.calm_s)
            window = Window(since, time.monotonic())
        self.results.outcome.add(load.outcome)
        self.results.calm = load.traffic.windows(window, CALM_WINDOW_S)
        starts = [window.since + number * CALM_WINDOW_S for number in range(len(self.results.calm))]
        self.results.calm_delays = [worst_delay(delays, Window(at, at + CALM_WINDOW_S)) for at in starts]

    async def _throughput(self, worn: Daemon, alone: Daemon, found: Windows) -> None:
        self._say(f"throughput beside that of a daemon left alone: {self._plan.pairs} pairs of windows")
        for _ in range(WARM_UPS):
            await self._compared(worn)
            await self._compared(alone)
        for number in range(self._plan.pairs):
            order = ((worn, found.worn), (alone, found.alone))
            for daemon, rates in order if number % 2 == 0 else reversed(order):
                rates.append(await self._compared(daemon))

    @contextlib.asynccontextmanager
    async def _deployment(self, daemon: Daemon) -> AsyncIterator[tuple[Deployment, Callable[[Change], None]]]:
        """Under load. The second takes each change that is done; what clients saw of it is judged after the load."""
        changes: list[Change] = []
        feed = Feed(daemon)
        load = Load(daemon.url, self._reference)

        def done(change: Change) -> None:
            changes.append(change)
            self._say(f"  {change.kind}: {change.seconds:.2f} s, {len(change.regroups)} regroups")

        try:
            async with feed.followed(), load:
                yield Deployment(daemon, feed, RANKS), done
        finally:
            self.results.changes += [seen(change, load.traffic) for change in changes]
            self.results.outcome.add(load.outcome)

    async def _footprint(self, name: str, daemon: Daemon) -> None:
        await asyncio.sleep(REST_S)
        assert daemon.process is not None and daemon.log is not None
        log = daemon.log.read_text(encoding="utf-8", errors="replace")
        self.results.footprints[name] = Footprint.of(daemon.process.pid, log)

    async def _compared(self, daemon: Daemon) -> float:
        """One batch of streams. Returns tokens per second."""
        streams = await self._streams(daemon)
        for expected, actual in zip(self._reference, streams, strict=True):
            self.results.outcome.count(expected, actual)
        seconds = max(stream.ended for stream in streams) - min(stream.started for stream in streams)
        return sum(stream.tokens for stream in streams) / seconds

    async def _streams(self, daemon: Daemon) -> list[StreamResult]:
        async with asyncio.timeout(RUN_TIMEOUT_S):
            return await run_streams(daemon.url, self._prompts, self._tokens)
