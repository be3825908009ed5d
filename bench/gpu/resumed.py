"""Streams that go on from their middle where nothing has happened: how often that alone changes a token.

A stream that a dead rank had goes on at another one. That computes keys and values of all its tokens at once, not one
after the other as before: sums come out different in their last bits, and of two tokens that are about as likely the
other one may come.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

import httpx

from bench.gpu.life import RUNNER_VARIABLE, Life
from bench.gpu.tokens import TokenChange, token_change
from elastic_daemon.drill.load import run_streams
from elastic_daemon.drill.report import StreamResult
from elastic_daemon.drill.sampling import Sampling

EVERY = 8
"""Tokens from one point where a stream is taken up to the next."""
ANSWER_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Resumed:
    """A stream that was taken up after so many of its tokens. `change`: from the undisturbed stream."""

    after: int
    change: TokenChange | None

    def __str__(self) -> str:
        return f"taken up after {self.after} tokens: {self.change or 'the same'}"


def changes_of(found: Sequence[Resumed]) -> list[Resumed]:
    return [one for one in found if one.change is not None]


def resumable(sampling: Sampling, device: str) -> bool:
    """Whether a client can take a stream up as a rank does, with its tokens as the end of a prompt.

    Not where tokens are counted or matched that a prompt does not have. What runner V2 draws follows from seed and
    position; what V1 draws, from how often it has drawn for this request.
    """
    if sampling.kind == "greedy":
        return True
    return sampling.kind == "seeded" and device == "cuda" and os.environ.get(RUNNER_VARIABLE, "1") != "0"


async def taken_up(life: Life, expected: StreamResult, until: int) -> list[Resumed]:
    """`expected`: of `life`, whose ranks are all well. Taken up after every few of `until` tokens, all at once; none if
    it is not resumable. Those that fail are left out. Each has a salt of its own: else it would find the keys and
    values of the undisturbed stream."""
    points = range(EVERY, until, EVERY)
    if not points or not resumable(expected.sampling, life.setting.device):
        return []
    prompt = await _prompt_tokens(life.daemon.url, expected.prompt)
    samplings = [
        replace(
            expected.sampling,
            fields={
                **expected.sampling.fields,
                "prompt": [*prompt, *expected.token_ids[:after]],
                "cache_salt": uuid.uuid4().hex,
            },
        )
        for after in points
    ]
    prompts, tokens = [expected.prompt] * len(points), len(expected.token_ids) - EVERY
    streams = await run_streams(life.daemon.url, prompts, tokens, samplings=samplings)
    ended = zip(points, streams, strict=True)
    return [resumed(expected, after, stream.token_ids) for after, stream in ended if stream.error is None]


def resumed(expected: StreamResult, after: int, tokens: Sequence[int]) -> Resumed:
    """What came of `expected`, taken up after so many tokens. `tokens`: those since then, and perhaps more."""
    whole = (*expected.token_ids[:after], *tokens)[: len(expected.token_ids)]
    return Resumed(after, token_change(expected, replace(expected, token_ids=whole, logprobs=())))


async def _prompt_tokens(url: str, prompt: str) -> list[int]:
    body = {"prompt": prompt, "max_tokens": 1, "return_token_ids": True}
    async with httpx.AsyncClient(timeout=ANSWER_TIMEOUT_S) as client:
        answer = await client.post(f"{url}/v1/completions", json=body)
    tokens: list[int] = answer.raise_for_status().json()["choices"][0]["prompt_token_ids"]
    return tokens
