"""Stock vLLM, data-parallel 2 with expert parallelism on CPU: what one SIGKILL costs, and how long a restart takes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from bench import stock_shim
from bench.footprint import descendants
from elastic_daemon.config import BUNDLED_FLAGS, BUNDLED_MODEL, BUNDLED_NAME
from elastic_daemon.drill.load import prompts_for, run_streams
from elastic_daemon.drill.report import StreamResult
from elastic_daemon.engine.zygote import die_with_parent
from elastic_daemon.errors import ElasticError, StartError
from elastic_daemon.processes.launcher import child_environment

REPOSITORY = Path(__file__).parents[1]

START_TIMEOUT_S = 420.0
RUN_TIMEOUT_S = 120.0
AFTERMATH_TIMEOUT_S = 60.0
"""How long stock vLLM may take to fail its requests and to end; then they count as hanging."""

STOP_TIMEOUT_S = 10.0
POLL_S = 0.02
KILL_SHARE = 0.2
"""Early: on a busy machine clients lag behind what has been computed, which the kill does not undo."""

COLD, PREIMPORTED = "cold", "pre-imported"


@dataclass(frozen=True)
class Failure:
    """One SIGKILL. `running`: streams then; `lost`: those without their whole answer; `errors`: how many got which.

    `failed_s`: until the last client knew, None if some hang. `ended_s`: until the server's main process had ended by
    itself, None if it had not.
    """

    victim: str
    streams: int
    running: int
    lost: int
    hanging: int
    errors: dict[str, int]
    failed_s: float | None
    ended_s: float | None


@dataclass(frozen=True)
class Start:
    """From the start of the process, or of the pre-imported one's work, to what clients get.

    `serving_s`: until each of the streams, sent again at once, has its first token.
    """

    kind: str
    healthy_s: float
    serving_s: float


@dataclass
class Stock:
    """`first`: the first start, measured as the others. `starts`: the restarts after the failures.

    `undisturbed`: what clients got before the first failure.
    """

    command: str = ""
    first: Start | None = None
    failures: list[Failure] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    undisturbed: list[StreamResult] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def restart_s(self, kind: str) -> float | None:
        return next((start.serving_s for start in self.starts if start.kind == kind), None)

    def to_json(self) -> dict[str, Any]:
        """Without the streams themselves."""
        return asdict(replace(self, undisturbed=[]))


class Server:
    """One stock server with all its processes, in a process group of its own."""

    def __init__(self, home: Path, kind: str) -> None:
        self.kind = kind
        self.port = _free_port()
        self.log = home / f"{kind}-{self.port}.log"
        module = "bench.stock_shim" if kind == PREIMPORTED else "vllm.entrypoints.openai.api_server"
        self.command = [sys.executable, "-m", module, *arguments(self.port)]
        paths = [str(REPOSITORY), str(home / "plugin"), *filter(None, [os.environ.get("PYTHONPATH")])]
        parent = os.getpid()
        self.started = time.monotonic()
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if kind == PREIMPORTED else output,
                stderr=output,
                env={**child_environment(), "PYTHONPATH": os.pathsep.join(paths)},
                cwd=REPOSITORY,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(parent),  # noqa: PLW1509 (no other thread takes locks here)
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def until_imported(self) -> None:
        """For a pre-imported one: wait until it only waits for `go`. Raises StartError."""
        output = self.process.stdout
        assert output is not None
        os.set_blocking(output.fileno(), False)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (line := output.readline()):
            self._check(deadline)
            await asyncio.sleep(POLL_S)
        if line.strip() != stock_shim.READY.encode():
            raise StartError(f"stock vLLM: expected {stock_shim.READY!r}, got {line!r}")

    def go(self) -> None:
        """Let a pre-imported one start. Its clock starts now."""
        assert self.process.stdin is not None
        self.started = time.monotonic()
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()

    async def until_serving(self, streams: int) -> Start:
        """Wait until it is healthy and each stream, sent at once then, has its first token. Raises StartError."""
        deadline = time.monotonic() + START_TIMEOUT_S
        async with httpx.AsyncClient(base_url=self.url, timeout=5, trust_env=False) as client:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get("/health")).status_code == 200:
                        break
                self._check(deadline)
                await asyncio.sleep(POLL_S)
        healthy = time.monotonic()
        results = await _undisturbed(self, streams, 1)
        if failed := [result.error for result in results if result.error is not None]:
            raise StartError(f"stock vLLM: {len(failed)} of {streams} streams failed after its start: {failed[0]}")
        serving = max(result.arrivals[0] for result in results)
        return Start(self.kind, healthy - self.started, serving - self.started)

    def _check(self, deadline: float) -> None:
        code = self.process.poll()
        if code is None and time.monotonic() < deadline:
            return
        what = f"not ready within {START_TIMEOUT_S:g} s" if code is None else f"ended with exit status {code}"
        raise StartError(f"stock vLLM: {what}; the end of its log:\n{self.tail()}")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def find(self, title: str) -> int:
        """The pid of the first of its processes whose title has `title` in it. Raises ElasticError."""
        for pid in sorted(descendants(self.process.pid)[1:]):
            with contextlib.suppress(OSError):
                if title in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace"):
                    return pid
        raise ElasticError(f"stock vLLM has no process {title}")

    def end(self) -> None:
        """Kill whatever is left of it, and wait until that is gone."""
        handles = []
        for pid in descendants(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                handles.append(os.pidfd_open(pid))
        for handle in handles:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: orphans of its engines
        self.process.wait(STOP_TIMEOUT_S)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while _group_lives(self.process.pid) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def arguments(port: int) -> list[str]:
    """Of the server. What is set beyond the deployment itself makes it start sooner."""
    deployment = ["--data-parallel-size", "2", "--enable-expert-parallel"]
    model = ["--model", str(BUNDLED_MODEL), "--served-model-name", BUNDLED_NAME, *BUNDLED_FLAGS, "--enforce-eager"]
    return [*model, *deployment, "--host", "127.0.0.1", "--port", str(port)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


async def run_stock(streams: int, tokens: int, say: Callable[[str], None]) -> Stock:
    """Two failures, each with its kind of restart. What goes wrong on the way is recorded as a problem."""
    stock = Stock()
    home = Path(tempfile.mkdtemp(prefix="elastic-bench-stock-"))
    stock_shim.plugin_directory(home / "plugin")
    try:
        async with _servers() as servers:
            say("stock vLLM: starting")
            server = Server(home, COLD)
            servers.append(server)
            stock.command = " ".join(["python", *server.command[1:]])
            stock.first = await server.until_serving(streams)
            say(f"  serving after {stock.first.serving_s:.1f} s; killing one worker under load")
            stock.undisturbed = await _undisturbed(server, streams, tokens)
            stock.failures.append(await _break(server, "Worker", stock.undisturbed, tokens))
            server.end()
            say(f"  {_describe(stock.failures[-1])}; restarting it cold")
            server = Server(home, COLD)
            servers.append(server)
            stock.starts.append(await server.until_serving(streams))
            say(f"  serving again after {stock.starts[-1].serving_s:.1f} s; preparing a process that has imported vLLM")
            standby = Server(home, PREIMPORTED)
            servers.append(standby)
            await standby.until_imported()
            again = await _undisturbed(server, streams, tokens)
            stock.failures.append(await _break(server, "EngineCore", again, tokens))
            server.end()
            say(f"  {_describe(stock.failures[-1])}; starting in the process that has imported vLLM")
            standby.go()
            stock.starts.append(await standby.until_serving(streams))
            say(f"  serving again after {stock.starts[-1].serving_s:.1f} s")
        shutil.rmtree(home, ignore_errors=True)
    except (ElasticError, TimeoutError, subprocess.TimeoutExpired) as error:
        stock.problems.append(f"{type(error).__name__}: {error} (logs: {home})")
        say(f"  {stock.problems[-1]}")
    return stock


@contextlib.asynccontextmanager
async def _servers() -> AsyncIterator[list[Server]]:
    servers: list[Server] = []
    try:
        yield servers
    finally:
        for server in servers:
            server.end()


async def _undisturbed(server: Server, streams: int, tokens: int) -> list[StreamResult]:
    return await asyncio.wait_for(run_streams(server.url, prompts_for(streams), tokens), RUN_TIMEOUT_S)


async def _break(server: Server, title: str, reference: Sequence[StreamResult], tokens: int) -> Failure:
    """SIGKILL one of its processes under load, and look at what it does by itself then."""
    streams = len(reference)
    victim = os.pidfd_open(server.find(title))
    left, killed_at = max(1, round(KILL_SHARE * streams * tokens)), None
    latest: dict[int, int] = {}

    def on_token(stream: int, count: int) -> None:
        nonlocal left, killed_at
        left -= count
        latest[stream] = latest.get(stream, 0) + count
        if left <= 0 and killed_at is None:
            killed_at = time.monotonic()
            signal.pidfd_send_signal(victim, signal.SIGKILL)

    try:
        run = asyncio.create_task(run_streams(server.url, prompts_for(streams), tokens, on_token))
        ended_at: float | None = None
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while time.monotonic() < deadline and not (run.done() and (ended_at or killed_at is None)):
            if killed_at is not None:
                deadline = min(deadline, killed_at + AFTERMATH_TIMEOUT_S)
            if ended_at is None and server.process.poll() is not None:
                ended_at = time.monotonic()
            await asyncio.sleep(POLL_S)
    finally:
        os.close(victim)
    results = run.result() if run.done() else None
    if results is None:
        run.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await run
    if killed_at is None:
        raise ElasticError("stock vLLM: the streams ended before the signal was due")
    return judge_failure(title, reference, killed_at, ended_at, results, latest)


def judge_failure(
    title: str,
    reference: Sequence[StreamResult],
    killed_at: float,
    ended_at: float | None,
    results: Sequence[StreamResult] | None,
    received: Mapping[int, int],
) -> Failure:
    """What one SIGKILL cost. `results`: None where streams hang; `received`: how many tokens each has got then."""
    ended_s = None if ended_at is None else ended_at - killed_at
    if results is None:
        unfinished = sum(received.get(number, 0) < stream.tokens for number, stream in enumerate(reference))
        return Failure(title, len(reference), unfinished, unfinished, unfinished, {}, None, ended_s)
    errors: Counter[str] = Counter()
    failed_s = 0.0
    for expected, actual in zip(reference, results, strict=True):
        if actual.error is not None:
            errors[actual.error.split("\n", 1)[0][:120]] += 1
        elif actual.token_ids != expected.token_ids:
            errors[f"incomplete, without an error; finish reason {actual.finish_reason!r}"] += 1
        else:
            continue
        failed_s = max(failed_s, actual.ended - killed_at)
    running = sum(result.ended > killed_at for result in results)
    return Failure(title, len(reference), running, errors.total(), 0, dict(errors), failed_s, ended_s)


def _describe(failure: Failure) -> str:
    return f"SIGKILL of {failure.victim}: {failure.lost} of {failure.running} running requests lost"
