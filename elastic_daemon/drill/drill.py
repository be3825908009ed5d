"""`elastic-daemon drill`: kill a rank under load and compare what clients saw with an undisturbed run.

`run_streams` and `compare` are for other programs too; what is measured is in `drill_report`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from elastic_daemon.commands.operator_commands import Target, make_console
from elastic_daemon.drill.daemon import (
    POLL_S,
    Daemon,
    Display,
    Fault,
    Moment,
    Victim,
    attached_or_started,
    own_daemon,
    victims_of,
)
from elastic_daemon.drill.load import OnToken, prompts_for, run_streams, scheduling_probe
from elastic_daemon.drill.report import GONE, Comparison, Delay, DrillResult, Run, StreamResult, compare, render
from elastic_daemon.errors import ConfigError, DaemonUnreachable, ElasticError
from elastic_daemon.routes.health import url_of

__all__ = [
    "Comparison",
    "Daemon",
    "Display",
    "Fault",
    "Moment",
    "OnToken",
    "Options",
    "StreamResult",
    "Victim",
    "attached_or_started",
    "choose_ranks",
    "compare",
    "drill",
    "own_daemon",
    "parse_ranks",
    "prompts_for",
    "run_drill",
    "run_streams",
    "scheduling_probe",
    "url_of",
    "victims_of",
]

SETTLE_TIMEOUT_S = 30.0
WARM_UP_TOKENS = 16
HALFWAY = Moment(share=0.5)


@dataclass(frozen=True)
class Options:
    """`kill`: the ranks, or empty for a random one. `ranks`: of a daemon that the drill starts itself."""

    target: Target
    streams: int = 16
    tokens: int = 200
    kill: tuple[int, ...] = ()
    at: Moment = HALFWAY
    ranks: int | None = None
    seed: int = 0

    @classmethod
    def parse(cls, arguments: argparse.Namespace) -> Options:
        """From the command line. Raises ConfigError."""
        for name in ("streams", "tokens", "ranks"):
            if (number := getattr(arguments, name)) is not None and number < 1:
                raise ConfigError(f"--{name}: expected at least 1, got {number}")
        if arguments.ranks is not None and arguments.url is not None:
            raise ConfigError("--ranks: is for a daemon that the drill starts, but --url names one that runs")
        return cls(
            target=Target.of(arguments),
            streams=arguments.streams,
            tokens=arguments.tokens,
            kill=parse_ranks(arguments.kill) if arguments.kill is not None else (),
            at=Moment.parse(arguments.at),
            ranks=arguments.ranks,
            seed=arguments.seed if arguments.seed is not None else random.randrange(10**6),
        )


def parse_ranks(text: str) -> tuple[int, ...]:
    """`2` or `0,3`. Raises ConfigError."""
    try:
        ranks = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--kill: expected ranks such as 2 or 0,3, got {text}") from error
    if len(set(ranks)) < len(ranks):
        raise ConfigError(f"--kill: names a rank twice: {text}")
    return ranks


def choose_ranks(health: dict[str, Any], wanted: tuple[int, ...], seed: int) -> tuple[int, ...]:
    """Who is to die. Raises ConfigError where that is nobody who serves, or more than the daemon can lose."""
    active = [row["rank"] for row in health["ranks"] if row["state"] == "active"]
    if missing := [rank for rank in wanted if rank not in active]:
        raise ConfigError(f"--kill: rank {missing[0]} is not active; active are {', '.join(map(str, active))}")
    chosen = wanted or (random.Random(seed).choice(active),)
    if len(chosen) > (most := health["survivable_losses"]):
        raise ConfigError(
            f"--kill: the daemon can lose {max(0, most)} more ranks and go on serving, not {len(chosen)}; "
            "serve with more ranks, or a larger --survive-losses"
        )
    return chosen


class Watch:
    """Follows one run: what the clients have so far, and what the daemon says meanwhile."""

    def __init__(self, daemon: Daemon, display: Display, name: str, options: Options, fault: Fault | None) -> None:
        self._daemon, self._display, self._name, self._fault = daemon, display, name, fault
        self._wanted = options.tokens
        self._tokens = [0] * options.streams
        self._latest = [0.0] * options.streams
        self._longest = 0.0
        self.reports: dict[int, dict[str, Any]] = {}

    def token(self, stream: int, count: int) -> None:
        now = time.monotonic()
        if self._tokens[stream]:
            self._longest = max(self._longest, now - self._latest[stream])
        self._tokens[stream] += count
        self._latest[stream] = now
        if self._fault is not None:
            self._fault.token(count)

    async def follow(self) -> None:
        while True:
            status = "does not answer"
            with contextlib.suppress(DaemonUnreachable):
                status = self.note(await self._daemon.health())["status"]
            self._display.show(self._line(status))
            await asyncio.sleep(POLL_S)

    def note(self, health: dict[str, Any]) -> dict[str, Any]:
        for report in (health.get("last_shrink"), health.get("last_recovery")):
            if report is not None:
                self.reports[report["epoch"]] = report
        return health

    def _line(self, status: str) -> str:
        now = time.monotonic()
        running = [n for n, tokens in enumerate(self._tokens) if tokens < self._wanted]
        silence = max((now - self._latest[n] for n in running if self._tokens[n]), default=0.0)
        return (
            f"{self._name}: {len(self._tokens) - len(running)}/{len(self._tokens)} streams, "
            f"{sum(self._tokens)}/{self._wanted * len(self._tokens)} tokens, "
            f"gap {silence:.2f} s, longest {self._longest:.2f} s, {status}"
        )


async def run_drill(options: Options, display: Display) -> DrillResult:
    """The whole drill. Raises ElasticError where it cannot be held at all."""
    async with attached_or_started(options.target, options.ranks, display) as daemon:
        before = await daemon.until_ready(display, SETTLE_TIMEOUT_S)
        ranks = choose_ranks(before, options.kill, options.seed)
        prompts = prompts_for(options.streams)
        with victims_of(before, ranks) as victims:
            await run_streams(daemon.url, prompts, min(WARM_UP_TOKENS, options.tokens), tls=daemon.control.tls)
            display.phase(f"undisturbed run: {options.streams} streams of {options.tokens} tokens")
            reference, reference_delays, _ = await _watched_run(daemon, display, "undisturbed", options, prompts, None)
            display.phase(f"disturbed run: SIGKILL of rank {', '.join(map(str, ranks))} on the way")
            fault = Fault(victims, options.at, options.streams * options.tokens)
            seen = max((event["id"] for event in await daemon.events()), default=0)
            streams, delays, watch = await _watched_run(daemon, display, "disturbed", options, prompts, fault)
        after = await _settle(daemon, display, watch, before["epoch"], fault)
        events: list[dict[str, Any]] = []
        with contextlib.suppress(DaemonUnreachable):
            events = await daemon.events(seen)
        result = DrillResult(
            daemon=daemon.url,
            model=before["model"],
            started_here=daemon.process is not None,
            seed=options.seed,
            before=_summary(before),
            after=_summary(after),
            comparison=compare(reference, streams),
            reference=Run.of(reference, reference_delays),
            disturbed=Run.of(streams, delays),
            strike=fault.report(streams, delays, events),
            recoveries=tuple(watch.reports[epoch] for epoch in sorted(watch.reports) if epoch > before["epoch"]),
            stream_errors={n: stream.error for n, stream in enumerate(streams) if stream.error is not None},
        )
        daemon.keep_log = not result.passed
        return result


async def _watched_run(
    daemon: Daemon, display: Display, name: str, options: Options, prompts: Sequence[str], fault: Fault | None
) -> tuple[list[StreamResult], list[Delay], Watch]:
    watch = Watch(daemon, display, name, options, fault)
    follower = asyncio.create_task(watch.follow())
    try:
        async with scheduling_probe() as delays:
            if fault is not None:
                fault.run_begins()
            streams = await run_streams(daemon.url, prompts, options.tokens, watch.token, tls=daemon.control.tls)
    finally:
        follower.cancel()
        if fault is not None:
            fault.run_ended()
    return streams, delays, watch


async def _settle(daemon: Daemon, display: Display, watch: Watch, epoch: int, fault: Fault) -> dict[str, Any]:
    """Wait for the end of the recovery, for a limited time. Returns the last `/health`, or that there is none."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        try:
            health = watch.note(await daemon.health())
        except DaemonUnreachable as error:
            health = {"status": GONE, "reason": str(error)}
            if daemon.process is not None and daemon.process.poll() is not None:
                return health
        recovered = fault.at is None or any(reported > epoch for reported in watch.reports)
        if (recovered and health["status"] in ("ok", "degraded")) or time.monotonic() > deadline:
            return health
        display.show(f"waiting for the end of the recovery: {health['status']}")
        await asyncio.sleep(POLL_S)


def _summary(health: dict[str, Any]) -> dict[str, Any]:
    names = ("status", "reason", "epoch", "data_parallel_size", "expert_safety", "survivable_losses")
    return {name: health.get(name) for name in names}


def drill(arguments: argparse.Namespace) -> int:
    """The command. Returns 0 if nothing was lost or changed, else 1."""
    options = Options.parse(arguments)
    if options.target.url is not None and not urlsplit(options.target.url).scheme.startswith("http"):
        raise ConfigError(f"--url: expected one such as http://127.0.0.1:8000, got {options.target.url}")
    try:
        result = asyncio.run(_until_told_to_stop(options))
    except asyncio.CancelledError:
        raise ElasticError("stopped before the end") from None
    if arguments.json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        make_console().print(render(result))
    return 0 if result.passed else 1


async def _until_told_to_stop(options: Options) -> DrillResult:
    """SIGTERM ends the drill as Ctrl-C does: its daemon is stopped first."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with Display(make_console(stderr=True)) as display:
        return await run_drill(options, display)
