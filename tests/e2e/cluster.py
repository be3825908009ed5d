"""A real daemon in a real process tree, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench.footprint import descendants
from elastic_daemon.drill.load import prompts_for
from tests import proc

START_TIMEOUT_S = 180.0


@dataclass
class Stream:
    """What one streaming client saw. `gap_s`: the longest silence between two tokens."""

    prompt: str
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    usage: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    gap_s: float = 0.0
    arrivals: list[float] = field(default_factory=list)

    @property
    def outcome(self) -> tuple[list[int], str, int | None, str | None, str | None]:
        """All that an undisturbed run must equal."""
        return self.token_ids, self.text, self.usage, self.finish_reason, self.error


class Cluster:
    """One daemon. `with Cluster(...) as cluster:` starts it and leaves nothing behind."""

    def __init__(
        self, runtime_dir: Path, *arguments: str, env: dict[str, str] | None = None, stdout: int | None = None
    ) -> None:
        """`stdout`: a descriptor that it logs to; None: to the file `log_path`."""
        self.runtime_dir = runtime_dir
        self.log_path = runtime_dir.with_suffix(".log")
        self._log = self.log_path.open("w")
        own = ("--port", "0", "--runtime-dir", str(runtime_dir))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "elastic_daemon.cli", "serve", *arguments, *own],
            stdout=self._log if stdout is None else stdout,
            stderr=subprocess.STDOUT,
            env={**os.environ, "ELASTIC_LOG_FORMAT": "json", "ELASTIC_RESTORE": "off", **(env or {})},
        )
        self.url = ""

    def __enter__(self) -> Cluster:
        try:
            self.wait_for(lambda: self.health()["status"] == "ok", START_TIMEOUT_S)
            self.url = f"http://127.0.0.1:{self.events('starting')[0]['port']}"
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.stop()
        if error is not None:
            loud = [line[:400] for line in self.log.splitlines() if re.search(r'"level": "(warning|error)"', line)]
            error.add_note("\n".join(["warnings of the daemon, the last ones:", *loud[-12:]]))

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def logged(self, name: str) -> list[dict[str, Any]]:
        """Events of the log. Processes share it, so that a line may have two of them."""
        return [json.loads(one) for one in re.findall(rf'\{{[^{{}}]*"event": "{name}"[^{{}}]*\}}', self.log)]

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 10.0) -> Any:
        """Poll until `condition()` holds; its errors of a daemon that does not answer yet count as no."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(httpx.TransportError, KeyError, IndexError):
                if result := condition():
                    return result
            if self.process.poll() is not None:
                raise AssertionError(f"daemon ended with {self.process.returncode}:\n{self.log[-4000:]}")
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout_s} s; log:\n{self.log[-4000:]}")
            time.sleep(0.02)

    def control(self, path: str, **params: Any) -> httpx.Response:
        """A request to the supervisor's own socket."""
        if not (self.runtime_dir / "http.sock").exists():
            raise httpx.ConnectError("the daemon has no socket yet")
        transport = httpx.HTTPTransport(uds=str(self.runtime_dir / "http.sock"))
        with httpx.Client(transport=transport, base_url="http://daemon", timeout=60) as client:
            return client.get(path, params=params)

    def health(self) -> dict[str, Any]:
        body: dict[str, Any] = self.control("/health").json()
        return body

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.control("/events").json() if event["event"] == name]

    def pid(self, rank: int) -> int:
        """The engine process of an active rank."""
        (row,) = [row for row in self.health()["ranks"] if row["rank"] == rank]
        pid: int = row["pids"][0]
        return pid

    def kill(self, *ranks: int) -> None:
        for pid in [self.pid(rank) for rank in ranks]:
            os.kill(pid, signal.SIGKILL)

    def active(self) -> list[int]:
        return [row["rank"] for row in self.health()["ranks"] if row["state"] == "active"]

    def verify_experts(self) -> None:
        """Every expert slot in use holds exactly the expert that it stands for."""
        body = self.control("/experts/verify").json()
        assert body["ok"], body

    def descendants(self) -> list[int]:
        return descendants(self.process.pid)[1:]

    def titled(self, title: str) -> list[int]:
        """Processes of the daemon that bear this title: `zygote`, `front end`."""
        wanted = f"elastic-daemon: {title}"
        return [pid for pid in self.descendants() if proc.read(pid, "cmdline").strip("\0") == wanted]


class Trigger:
    """Calls `action` in a thread as soon as clients have seen `at_tokens` tokens in all."""

    def __init__(self, action: Callable[[], Any] | None, at_tokens: int) -> None:
        self._action = action
        self._left = at_tokens
        self._task: asyncio.Task[Any] | None = None

    def token(self) -> None:
        self._left -= 1
        if self._left <= 0 and self._action is not None and self._task is None:
            self._task = asyncio.create_task(asyncio.to_thread(self._action))

    async def done(self) -> None:
        assert self._action is None or self._task is not None, "the streams ended before the disturbance"
        if self._task is not None:
            await self._task


async def stream(
    client: httpx.AsyncClient, prompt: str, max_tokens: int, trigger: Trigger | None = None, **extra: Any
) -> Stream:
    """One streaming completion, greedy unless `extra` says otherwise."""
    seen = Stream(prompt)
    body = {"model": "tiny-moe", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True, **extra}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            seen.error = f"{response.status_code}: {(await response.aread()).decode()}"
            return seen
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                _take(seen, json.loads(line.removeprefix("data: ")), trigger)
    return seen


def _take(seen: Stream, chunk: dict[str, Any], trigger: Trigger | None) -> None:
    if "error" in chunk:
        seen.error = json.dumps(chunk["error"])
        return
    if chunk.get("usage"):
        seen.usage = chunk["usage"]["completion_tokens"]
    for choice in chunk["choices"]:
        now = time.monotonic()
        if seen.arrivals:
            seen.gap_s = max(seen.gap_s, now - seen.arrivals[-1])
        seen.arrivals.append(now)
        seen.text += choice["text"]
        seen.token_ids += choice["token_ids"] or []
        seen.finish_reason = choice["finish_reason"] or seen.finish_reason
        if trigger is not None:
            trigger.token()


PROMPTS = tuple(prompts_for(16))
"""Tasks with long answers that the bundled model is sure of: a near-tie would say nothing about a recovery."""


def run_streams(
    cluster: Cluster,
    prompts: Sequence[str] = PROMPTS,
    max_tokens: int = 80,
    during: Callable[[], Any] | None = None,
    at_tokens: int = 200,
    bodies: Sequence[Mapping[str, Any]] | None = None,
    **extra: Any,
) -> list[Stream]:
    """Stream all prompts at once; call `during` once clients have seen `at_tokens` tokens in all.

    `bodies`: what the body of each request has beside `extra`.
    """
    own = bodies if bodies is not None else [{}] * len(prompts)

    async def run() -> list[Stream]:
        trigger = Trigger(during, at_tokens)
        limits = httpx.Limits(max_connections=len(prompts) + 4)
        async with httpx.AsyncClient(base_url=cluster.url, timeout=90, limits=limits) as client:
            pairs = zip(prompts, own, strict=True)
            results = await asyncio.gather(
                *(stream(client, p, max_tokens, trigger, **extra, **body) for p, body in pairs)
            )
        await trigger.done()
        return list(results)

    return asyncio.run(run())


def assert_same(disturbed: Sequence[Stream], reference: Sequence[Stream]) -> None:
    """Every client saw what it saw undisturbed: tokens, text, usage, finish reason, no error."""
    problems = []
    for got, want in zip(disturbed, reference, strict=True):
        if got.outcome != want.outcome:
            pairs = zip(got.token_ids, want.token_ids, strict=False)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(got.token_ids), len(want.token_ids)))
            problems.append(
                f"{got.prompt[:40]!r}: tokens {len(got.token_ids)}/{len(want.token_ids)}, first difference at {first}, "
                f"usage {got.usage}/{want.usage}, finish {got.finish_reason}/{want.finish_reason}, error {got.error}"
            )
    assert not problems, "\n".join(problems)
