"""The daemon of a drill: finding or starting it, and the fault that it has to survive."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.live import Live
from rich.text import Text

from elastic_daemon.commands.operator_commands import Target
from elastic_daemon.drill.load import stream_client
from elastic_daemon.drill.report import Delay, Spread, StreamResult, Strike
from elastic_daemon.engine.zygote import die_with_parent
from elastic_daemon.errors import ConfigError, DaemonUnreachable, StartError

READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.25
LOG_TAIL = 3000


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


class Daemon:
    """The daemon under test: `control` is where it is asked, `url` where it serves, `log` its log if it is ours."""

    def __init__(self, control: Target, url: str, process: subprocess.Popen[bytes] | None = None) -> None:
        self.control, self.url, self.process = control, url, process
        self.log: Path | None = None
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

    async def post(self, path: str, body: dict[str, Any], timeout_s: float) -> httpx.Response:
        """The answer to an order. Raises DaemonUnreachable."""
        try:
            return await self._client.post(self.control.base_url + path, json=body, timeout=timeout_s)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
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
        """Where it serves, from its own account: an address of this machine, which a certificate need not be for.

        Raises:
            ConfigError: it does not tell, or cannot be asked there.
        """
        url: str | None = (await self.health()).get("url")
        if url is None:
            raise ConfigError(f"the daemon at {self.control.where} does not tell where it serves; name it with --url")
        if url.startswith("https:"):
            try:
                async with stream_client(url, self.control.tls) as client:
                    await client.get("/livez")
            except httpx.HTTPError as error:
                raise ConfigError(
                    f"the daemon serves at {url}, and cannot be asked there: {error}; give a --url with a name that is "
                    "in its certificate, its authority with --cacert, and yours with --cert if it asks for one"
                ) from error
        return url


@contextlib.asynccontextmanager
async def attached_or_started(target: Target, ranks: int | None, display: Display) -> AsyncIterator[Daemon]:
    """The daemon named by --url, the one that lives in the runtime directory, or else one of our own for this drill.

    `ranks`: of one of our own; another must be left to its own number.
    """
    daemon = Daemon(target, target.base_url)
    try:
        if target.url is None:
            try:
                await daemon.health()
            except DaemonUnreachable:
                async with own_daemon(ranks, display, tls=target.tls) as started:
                    yield started
                return
            daemon.url = await daemon.find_url()
        if ranks is not None:
            raise ConfigError(f"--ranks: is for a daemon that the drill starts, but one runs at {target.where}")
        display.phase(f"drilling the daemon at {target.where}")
        yield daemon
    finally:
        await daemon.close()


@contextlib.asynccontextmanager
async def own_daemon(
    ranks: int | None,
    display: Display,
    options: Sequence[str] = (),
    log: Path | None = None,
    ready_timeout: float = READY_TIMEOUT_S,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Daemon]:
    """Start a daemon with the settings of the environment, and stop it whatever happens. Raises StartError.

    `options`: further arguments of `elastic-daemon serve`. `log`: where its log is to stay. `tls`: how it is
    connected to, where those settings have a certificate.
    """
    # The paths of sockets are limited to 107 bytes, so the directory lies in the temporary one.
    home = Path(tempfile.mkdtemp(prefix="elastic-drill-"))
    runtime_dir, log = home / "run", log or home / "daemon.log"
    display.phase("starting a daemon for the drill")
    process = _start(runtime_dir, log, ranks, options)
    daemon = Daemon(Target(runtime_dir, tls=tls), "", process)
    daemon.log = log
    try:
        await daemon.until_ready(display, ready_timeout)
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


def _start(runtime_dir: Path, log: Path, ranks: int | None, options: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "elastic_daemon.cli", "serve", "--host", "127.0.0.1", "--port", "0"]
    # It does not go on with what the host's own daemon remembers, nor is that one to remember a drill.
    command += ["--runtime-dir", str(runtime_dir), "--state-dir", str(runtime_dir / "state")]
    if ranks is not None:
        command += ["--data-parallel-size", str(ranks)]
    command += options
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
