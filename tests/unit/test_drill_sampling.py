"""How the streams of a drill are sampled: what is sent, and what is sent again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from bench.load import Load, Outcome
from elastic_daemon.drill.load import prompts_for, prompts_of, run_streams
from elastic_daemon.drill.sampling import GREEDY, PENALISED, constrained, samplings_for, seeded

CHUNK = {"choices": [{"text": "a", "token_ids": [7], "finish_reason": "length"}]}
USAGE = {"choices": [], "usage": {"completion_tokens": 1}}
ANSWER = f"data: {json.dumps(CHUNK)}\n\ndata: {json.dumps(USAGE)}\n\ndata: [DONE]\n\n"


@contextlib.asynccontextmanager
async def listening(bodies: list[dict[str, Any]]) -> AsyncIterator[str]:
    """The URL of a server that keeps the body of each request, and sends one token."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        found = re.search(r"content-length: (\d+)", head)
        assert found is not None
        bodies.append(json.loads(await reader.readexactly(int(found[1]))))
        writer.write(f"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{ANSWER}".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def test_kinds_of_streams() -> None:
    assert samplings_for("greedy", 2, 60) == [GREEDY] * 2
    assert samplings_for("seeded", 3, 60) == [seeded(0), seeded(1), seeded(2)]
    assert samplings_for("mixed", 6, 60) == [GREEDY, seeded(1), PENALISED, constrained(60), seeded(4), PENALISED]


def test_each_of_four_ranks_gets_streams_of_several_kinds() -> None:
    mixed = [sampling.kind for sampling in samplings_for("mixed", 16, 60)]
    assert all(len(set(mixed[rank::4])) == 4 for rank in range(4))


def test_each_seed_is_of_one_stream() -> None:
    seeds = [sampling.fields["seed"] for sampling in samplings_for("seeded", 8, 60)]
    assert len(set(seeds)) == 8


def test_expression_is_longer_than_the_stream_and_has_marks_to_count_to() -> None:
    expression = constrained(60).fields["structured_outputs"]["regex"]
    least = "0123456789012345;" * 16
    assert re.fullmatch(expression, least) and len(least) > 4 * 60
    assert not re.fullmatch(expression, least[1:] + "0")


def test_only_streams_that_draw_tokens_get_prompts_without_a_sure_answer() -> None:
    prompts = prompts_of(samplings_for("mixed", 8, 60))
    sure = prompts_for(8)
    assert [number for number in range(8) if prompts[number] != sure[number]] == [1, 4]
    assert len(set(prompts)) == 8
    assert prompts == prompts_of(samplings_for("mixed", 8, 60))


async def test_each_stream_is_sampled_in_its_own_way_and_again_so_by_a_load() -> None:
    bodies: list[dict[str, Any]] = []
    samplings = [GREEDY, seeded(5)]
    async with listening(bodies) as url:
        reference = await run_streams(url, ["p", "q"], 1, samplings=samplings)
        assert [stream.sampling for stream in reference] == samplings
        outcome = Outcome()
        async with Load(url, reference, outcome):
            while min(Counter(body["prompt"] for body in bodies).values()) < 2:
                await asyncio.sleep(0.01)
    assert not (outcome.lost or outcome.refused or outcome.changed)
    for prompt, expected in (("p", (0, None)), ("q", (0.8, 1005))):
        sent = [body for body in bodies if body["prompt"] == prompt]
        assert {(body["temperature"], body.get("seed")) for body in sent} == {expected}


async def test_streams_are_greedy_unless_told_otherwise() -> None:
    bodies: list[dict[str, Any]] = []
    async with listening(bodies) as url:
        (stream,) = await run_streams(url, ["p"], 1)
    assert stream.sampling == GREEDY
    assert bodies[0]["temperature"] == 0 and "seed" not in bodies[0]
