"""The clients of a drill: streams of completions, and how late their own timers are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import ssl
import string
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import httpx

from elastic_daemon.config import key_header
from elastic_daemon.drill.report import Delay, StreamResult
from elastic_daemon.drill.sampling import GREEDY, Sampling

OnToken = Callable[[int, int], None]
"""Called with the number of a stream and how many tokens it has just received."""

SILENCE_TIMEOUT_S = 120.0
"""A stream that has been silent for this long counts as lost."""

PROBE_INTERVAL_S = 0.002

UNSURE_LETTERS = 48
"""Several times as many as in the words that the bundled model has learnt to reverse."""


def prompts_for(streams: int) -> list[str]:
    """Tasks of the bundled model with long answers; to any other model they are just prompts."""
    return [_count(number) for number in range(streams)]


def prompts_of(samplings: Sequence[Sampling]) -> list[str]:
    """As `prompts_for`, but where tokens are drawn, tasks that the bundled model is at a loss with.

    It is so sure of the others that it draws the same whatever the seed.
    """
    return [(_reverse if sampling.drawn else _count)(number) for number, sampling in enumerate(samplings)]


def _count(number: int) -> str:
    step, first = number % 5 + 1, 2 + 7 * number % 90
    return f"count {first} to {min(999, first + step * 174)} by {step} ="


def _reverse(number: int) -> str:
    return f"reverse {''.join(random.Random(number).choices(string.ascii_lowercase, k=UNSURE_LETTERS))} ="


async def run_streams(
    url: str,
    prompts: Sequence[str],
    tokens: int,
    on_token: OnToken | None = None,
    logprobs: int | None = None,
    tls: ssl.SSLContext | None = None,
    samplings: Sequence[Sampling] | None = None,
) -> list[StreamResult]:
    """Stream a completion of exactly `tokens` tokens for each prompt, all at once, from the daemon at `url`.

    Never raises for a stream that fails: its result has the error. `tls`: see `stream_client`. `samplings`: one of each
    prompt; None: all are greedy.
    """
    chosen = samplings if samplings is not None else [GREEDY] * len(prompts)
    async with stream_client(url, tls) as client:
        streams = [
            run_stream(client, prompt, tokens, number, on_token, logprobs, sampling)
            for number, (prompt, sampling) in enumerate(zip(prompts, chosen, strict=True))
        ]
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
    sampling: Sampling = GREEDY,
) -> StreamResult:
    """One of `run_streams`; `number` is what `on_token` hears. `logprobs`: how many to ask for at each position."""
    return await _Stream(number, prompt, on_token, sampling).run(client, tokens, logprobs)


class _Stream:
    """One client, while its completion arrives."""

    def __init__(self, number: int, prompt: str, on_token: OnToken | None, sampling: Sampling) -> None:
        self._number, self._prompt, self._on_token = number, prompt, on_token
        self._sampling = sampling
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
        body |= self._sampling.fields
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
            sampling=self._sampling,
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
