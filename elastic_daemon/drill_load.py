"""The clients of a drill: streams of completions, and how late their own timers are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import httpx

from elastic_daemon.config import key_header
from elastic_daemon.drill_report import Delay, StreamResult

OnToken = Callable[[int, int], None]
"""Called with the number of a stream and how many tokens it has just received."""

SILENCE_TIMEOUT_S = 120.0
"""A stream that has been silent for this long counts as lost."""

PROBE_INTERVAL_S = 0.002


def prompts_for(streams: int) -> list[str]:
    """Tasks of the bundled model with long answers; to any other model they are just prompts."""
    prompts = []
    for number in range(streams):
        step, first = number % 5 + 1, 2 + 7 * number % 90
        prompts.append(f"count {first} to {min(999, first + step * 174)} by {step} =")
    return prompts


async def run_streams(
    url: str,
    prompts: Sequence[str],
    tokens: int,
    on_token: OnToken | None = None,
    logprobs: int | None = None,
    tls: ssl.SSLContext | None = None,
) -> list[StreamResult]:
    """Stream a greedy completion of exactly `tokens` tokens for each prompt, all at once, from the daemon at `url`.

    Never raises for a stream that fails: its result has the error. `tls`: see `stream_client`.
    """
    async with stream_client(url, tls) as client:
        streams = [run_stream(client, prompt, tokens, n, on_token, logprobs) for n, prompt in enumerate(prompts)]
        return await asyncio.gather(*streams)


def stream_client(url: str, tls: ssl.SSLContext | None = None) -> httpx.AsyncClient:
    """For any number of streams at once from the daemon at `url`, each on a connection of its own.

    `tls`: what its certificate is checked with; None: with the usual authorities.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    timeout = httpx.Timeout(SILENCE_TIMEOUT_S, connect=10)
    return httpx.AsyncClient(
        base_url=url, verify=tls or True, timeout=timeout, limits=limits, trust_env=False, headers=key_header()
    )


async def run_stream(
    client: httpx.AsyncClient,
    prompt: str,
    tokens: int,
    number: int = 0,
    on_token: OnToken | None = None,
    logprobs: int | None = None,
) -> StreamResult:
    """One of `run_streams`; `number` is what `on_token` hears. `logprobs`: how many to ask for at each position."""
    return await _Stream(number, prompt, on_token).run(client, tokens, logprobs)


class _Stream:
    """One client, while its completion arrives."""

    def __init__(self, number: int, prompt: str, on_token: OnToken | None) -> None:
        self._number, self._prompt, self._on_token = number, prompt, on_token
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[Mapping[int, float]] = []
        self._arrivals: list[float] = []
        self._usage: int | None = None
        self._finish_reason: str | None = None
        self._error: str | None = None

    async def run(self, client: httpx.AsyncClient, tokens: int, logprobs: int | None = None) -> StreamResult:
        body = {"prompt": self._prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        body |= {"stream_options": {"include_usage": True}, "return_token_ids": True}
        if logprobs is not None:
            body |= {"logprobs": logprobs, "return_tokens_as_token_ids": True}
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
            logprobs=tuple(self._logprobs),
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
                for position in (choice.get("logprobs") or {}).get("top_logprobs") or []:
                    self._logprobs.append(
                        {int(key.removeprefix("token_id:")): value for key, value in position.items()}
                    )
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
