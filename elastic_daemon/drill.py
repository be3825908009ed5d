"""`elastic-daemon drill`: kill a rank under load and compare what clients saw with an undisturbed run.

`run_streams` and `compare` are for other programs too; what is measured is in `drill_report`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from rich.console import Console
from rich.live import Live
from rich.text import Text

from elastic_daemon.drill_report import (
    GONE,
    Comparison,
    Delay,
    DrillResult,
    Run,
    Spread,
    StreamResult,
    Strike,
    compare,
    render,
)
from elastic_daemon.engine.zygote import die_with_parent
from elastic_daemon.errors import ConfigError, DaemonUnreachable, ElasticError, StartError
from elastic_daemon.operator_commands import Target, make_console

__all__ = ["Comparison", "StreamResult", "compare", "drill", "prompts_for", "run_drill", "run_streams"]

OnToken = Callable[[int, int], None]
"""Called with the number of a stream and how many tokens it has just received."""

READY_TIMEOUT_S = 300.0
SETTLE_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
SILENCE_TIMEOUT_S = 120.0
"""A stream that has been silent for this long counts as lost."""

POLL_S = 0.25
PROBE_INTERVAL_S = 0.002
WARM_UP_TOKENS = 16
LOG_TAIL = 3000


# --- streams ----------------------------------------------------------------------------------------------------------


def prompts_for(streams: int) -> list[str]:
    """Tasks of the bundled model with long answers; to any other model they are just prompts."""
    prompts = []
    for number in range(streams):
        step, first = number % 5 + 1, 2 + 7 * number % 90
        prompts.append(f"count {first} to {min(999, first + step * 174)} by {step} =")
    return prompts


async def run_streams(
    url: str, prompts: Sequence[str], tokens: int, on_token: OnToken | None = None
) -> list[StreamResult]:
    """Stream a greedy completion of exactly `tokens` tokens for each prompt, all at once, from the daemon at `url`.

    Never raises for a stream that fails: its result has the error.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    timeout = httpx.Timeout(SILENCE_TIMEOUT_S, connect=10)
    async with httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits, trust_env=False) as client:
        streams = [_Stream(number, prompt, on_token) for number, prompt in enumerate(prompts)]
        return await asyncio.gather(*(stream.run(client, tokens) for stream in streams))


class _Stream:
    """One client, while its completion arrives."""

    def __init__(self, number: int, prompt: str, on_token: OnToken | None) -> None:
        self._number, self._prompt, self._on_token = number, prompt, on_token
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._arrivals: list[float] = []
        self._usage: int | None = None
        self._finish_reason: str | None = None
        self._error: str | None = None

    async def run(self, client: httpx.AsyncClient, tokens: int) -> StreamResult:
        body = {"prompt": self._prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        body |= {"stream_options": {"include_usage": True}, "return_token_ids": True}
        started = time.monotonic()
        try:
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code == 200:
                    await self._read(answer)
                else:
                    self._error = f"{answer.status_code}: {(await answer.aread()).decode(errors='replace')[:500]}"
        except httpx.HTTPError as error:
            self._error = f"{type(error).__name__}: {error}"
        except ValueError as error:
            self._error = f"not a completion stream: {error}"
        return StreamResult(
            prompt=self._prompt,
            token_ids=tuple(self._token_ids),
            text="".join(self._texts),
            finish_reason=self._finish_reason,
            completion_tokens=self._usage,
            error=self._error,
            started=started,
            ended=time.monotonic(),
            arrivals=tuple(self._arrivals),
        )

    async def _read(self, answer: httpx.Response) -> None:
        done = False
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                self._take(json.loads(line.removeprefix("data: ")))
        if not done and self._error is None:
            self._error = "the stream ended without [DONE]"

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self._error = json.dumps(chunk["error"])
            return
        if chunk.get("usage"):
            self._usage = chunk["usage"]["completion_tokens"]
        for choice in chunk["choices"]:
            token_ids = choice.get("token_ids") or []
            self._finish_reason = choice["finish_reason"] or self._finish_reason
            if token_ids or choice["text"]:
                self._arrivals.append(time.monotonic())
                self._token_ids += token_ids
                self._texts.append(choice["text"])
                if self._on_token is not None:
                    self._on_token(self._number, len(token_ids) or 1)


@contextlib.asynccontextmanager
async def scheduling_probe() -> AsyncIterator[list[Delay]]:
    """Meanwhile, collect how late this event loop wakes from short sleeps: what the machine, not the daemon, delays."""
    delays: list[Delay] = []

    async def measure() -> None:
        while True:
            due = time.monotonic() + PROBE_INTERVAL_S
            await asyncio.sleep(PROBE_INTERVAL_S)
            woken = time.monotonic()
            delays.append(Delay(woken, woken - due))

    task = asyncio.create_task(measure())
    try:
        yield delays
    finally:
        task.cancel()


# --- what to do -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """When to strike: so many seconds into the run, or once so large a share of all tokens has arrived."""

    seconds: float | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> Moment:
        """`2.5` or `2.5s` are seconds, `0.4` (below 1) and `40%` a share. Raises ConfigError."""
        try:
            if text.endswith("s"):
                moment = cls(seconds=float(text.removesuffix("s")))
            elif text.endswith("%"):
                moment = cls(share=float(text.removesuffix("%")) / 100)
            else:
                moment = cls(share=float(text)) if float(text) < 1 else cls(seconds=float(text))
        except ValueError as error:
            raise ConfigError(f"--at: expected seconds or a share of the run (2s, 0.4, 40%), got {text}") from error
        if not (0 <= (moment.seconds or 0) < float("inf") and 0 <= (moment.share or 0) < 1):
            raise ConfigError(f"--at: {text} does not lie in the run")
        return moment


@dataclass(frozen=True)
class Options:
    """`kill`: the ranks, or empty for a random one. `ranks`: of a daemon that the drill starts itself."""

    target: Target
    streams: int = 16
    tokens: int = 200
    kill: tuple[int, ...] = ()
    at: Moment = Moment(share=0.5)
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


# --- the fault --------------------------------------------------------------------------------------------------------


class Victim:
    """The processes of one rank, held by pidfd so that no other process can be hit by mistake."""

    def __init__(self, rank: int, pids: Sequence[int]) -> None:
        """Raises ConfigError unless all `pids` are processes of that rank, on this machine, and may be killed."""
        self.rank, self.pids = rank, tuple(pids)
        self._fds: list[int] = []
        try:
            for pid in pids:
                self._fds.append(os.pidfd_open(pid))
                title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if not re.match(rf"elastic-daemon: rank {rank}\b", title):
                    raise ConfigError(f"pid {pid} is not rank {rank} on this machine; run the drill beside the daemon")
                signal.pidfd_send_signal(self._fds[-1], 0)
        except OSError as error:
            self.close()
            raise ConfigError(f"rank {rank}: its process {pid} cannot be killed from here: {error.strerror}") from error
        except ConfigError:
            self.close()
            raise
        if not pids:
            raise ConfigError(f"rank {rank} has no process to kill")

    def kill(self) -> None:
        for fd in self._fds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


@contextlib.contextmanager
def victims_of(health: dict[str, Any], ranks: Sequence[int]) -> Iterator[list[Victim]]:
    with contextlib.ExitStack() as stack:
        victims = []
        for row in health["ranks"]:
            if row["rank"] in ranks:
                victims.append(Victim(row["rank"], row["pids"]))
                stack.callback(victims[-1].close)
        yield victims


class Fault:
    """Kills once, when its moment in the run has come."""

    def __init__(self, victims: Sequence[Victim], moment: Moment, all_tokens: int) -> None:
        self.victims = victims
        self.seen = 0
        self.at: float | None = None
        self.wall_time = 0.0
        self._moment = moment
        self._threshold = None if moment.share is None else max(1, round(moment.share * all_tokens))
        self._timer: asyncio.TimerHandle | None = None

    def run_begins(self) -> None:
        if self._moment.seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(self._moment.seconds, self._strike)

    def run_ended(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def token(self, count: int) -> None:
        if self.at is None:
            self.seen += count
            if self._threshold is not None and self.seen >= self._threshold:
                self._strike()

    def _strike(self) -> None:
        self.wall_time, self.at = time.time(), time.monotonic()
        for victim in self.victims:
            victim.kill()

    def report(
        self, streams: Sequence[StreamResult], delays: Sequence[Delay], events: Sequence[dict[str, Any]]
    ) -> Strike | None:
        """What came of it. `events`: those of the daemon since before the run."""
        if self.at is None:
            return None
        at = self.at
        hit = [stream for stream in streams if stream.ended > at]
        excluded = {event["rank"]: event["time"] for event in events if event["event"] == "rank_excluded"}
        noticed = [excluded[victim.rank] for victim in self.victims if victim.rank in excluded]
        return Strike(
            ranks=tuple(victim.rank for victim in self.victims),
            pids=tuple(victim.pids[0] for victim in self.victims),
            at_s=at - min(stream.started for stream in streams),
            tokens=self.seen,
            streams=len(hit),
            detection_s=max(noticed) - self.wall_time if len(noticed) == len(self.victims) else None,
            gaps=Spread.of([stream.longest_gap(at) for stream in hit]),
            delays=Spread.of([delay.seconds for delay in delays if delay.at > at]),
        )


# --- the daemon -------------------------------------------------------------------------------------------------------


class Daemon:
    """The daemon under test: `control` is where it is asked, `url` where it serves."""

    def __init__(self, control: Target, url: str, process: subprocess.Popen[bytes] | None = None) -> None:
        self.control, self.url, self.process = control, url, process
        self.keep_log = False
        self._client = control.async_client()

    async def close(self) -> None:
        await self._client.aclose()

    async def get(self, path: str) -> Any:
        """The body of a control route. Raises DaemonUnreachable."""
        try:
            return (await self._client.get(self.control.base_url + path)).json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise self.control.unreachable(error) from error

    async def health(self) -> dict[str, Any]:
        return self.control.as_health(await self.get("/health"))

    async def events(self, since: int = 0) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = await self.get(f"/events?since={since}")
        return events

    async def until_ready(self, display: Display, timeout: float) -> dict[str, Any]:
        """Wait until it serves. Raises StartError when it does not in time, or ends."""
        deadline = time.monotonic() + timeout
        health: dict[str, Any] = {"status": "starting", "reason": ""}
        while True:
            if self.process is not None and (code := self.process.poll()) is not None:
                raise StartError(f"the daemon ended with exit status {code} before it was ready")
            try:
                health = await self.health()
            except DaemonUnreachable:
                if self.process is None:
                    raise
            if health["status"] in ("ok", "degraded"):
                return health
            if time.monotonic() > deadline:
                why = health.get("reason") or "no reason given"
                raise StartError(f"the daemon is not ready within {timeout:g} s: {health['status']}, {why}")
            display.show(f"{health['status']}: {health.get('doing') or health.get('reason') or 'starting'}")
            await asyncio.sleep(POLL_S)

    async def find_url(self) -> str:
        """Where it serves, from its own account. Raises ConfigError where it does not tell."""
        for event in await self.events():
            if event["event"] == "starting":
                return url_of(event["host"], event["port"])
        raise ConfigError(f"the daemon at {self.control.where} no longer tells its port; name it with --url")


def url_of(host: str, port: int) -> str:
    """How to reach, from the same machine, a server that listens on `host`."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:
            host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.asynccontextmanager
async def attached_or_started(options: Options, display: Display) -> AsyncIterator[Daemon]:
    """The daemon named by --url, the one that lives in the runtime directory, or else one of our own for this drill."""
    target = options.target
    daemon = Daemon(target, target.base_url)
    try:
        if target.url is None:
            try:
                await daemon.health()
            except DaemonUnreachable:
                async with own_daemon(options, display) as started:
                    yield started
                return
            daemon.url = await daemon.find_url()
        if options.ranks is not None:
            raise ConfigError(f"--ranks: is for a daemon that the drill starts, but one runs at {target.where}")
        display.phase(f"drilling the daemon at {target.where}")
        yield daemon
    finally:
        await daemon.close()


@contextlib.asynccontextmanager
async def own_daemon(options: Options, display: Display) -> AsyncIterator[Daemon]:
    """Start a daemon with the settings of the environment, and stop it whatever happens. Raises StartError."""
    # The paths of sockets are limited to 107 bytes, so the directory lies in the temporary one.
    home = Path(tempfile.mkdtemp(prefix="elastic-drill-"))
    runtime_dir, log = home / "run", home / "daemon.log"
    display.phase("starting a daemon for the drill")
    process = _start(runtime_dir, log, options.ranks)
    daemon = Daemon(Target(runtime_dir), "", process)
    try:
        await daemon.until_ready(display, READY_TIMEOUT_S)
        daemon.url = await daemon.find_url()
        yield daemon
    except (StartError, DaemonUnreachable) as error:
        tail = log.read_text(errors="replace")[-LOG_TAIL:]
        raise StartError(f"{error}; the end of its log:\n{tail}") from error
    finally:
        _stop(process)
        await daemon.close()
        if daemon.keep_log:
            display.phase(f"the log of the daemon is {log}")
        else:
            shutil.rmtree(home, ignore_errors=True)


def _start(runtime_dir: Path, log: Path, ranks: int | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "elastic_daemon.cli", "serve", "--host", "127.0.0.1", "--port", "0"]
    command += ["--runtime-dir", str(runtime_dir)]
    if ranks is not None:
        command += ["--data-parallel-size", str(ranks)]
    parent = os.getpid()
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the drill, which then stops the daemon
            preexec_fn=lambda: die_with_parent(parent),  # noqa: PLW1509 (one thread so far)
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# --- the drill --------------------------------------------------------------------------------------------------------


class Display:
    """Progress on standard error: one live line on a terminal, one line per phase elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def phase(self, text: str) -> None:
        self._console.print(Text(text))

    def show(self, text: str) -> None:
        if self._live is not None:
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)


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
    async with attached_or_started(options, display) as daemon:
        before = await daemon.until_ready(display, SETTLE_TIMEOUT_S)
        ranks = choose_ranks(before, options.kill, options.seed)
        prompts = prompts_for(options.streams)
        with victims_of(before, ranks) as victims:
            await run_streams(daemon.url, prompts, min(WARM_UP_TOKENS, options.tokens))
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
            streams = await run_streams(daemon.url, prompts, options.tokens, watch.token)
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
