"""The client of the engines over real sockets: what each rank is sent, and what of its answers gets through."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import zmq.asyncio
from vllm.config import VllmConfig

from elastic_daemon.engine.client import ElasticClient
from elastic_daemon.engine.group_view import Applied, Membership
from elastic_daemon.engine.resume import RESUME_KEY
from elastic_daemon.requests import MAX_DEATHS, Handover
from tests.contract.engine_ends import TIMEOUT_S, EngineEnd, input_address, output_address, request

A, B, C = 11, 12, 13
RANKS = {A: 0, B: 1}


@dataclass
class World:
    """A client, and the ends of ranks."""

    directory: Path
    client: ElasticClient
    context: zmq.asyncio.Context
    epoch: int = 1
    ends: dict[int, EngineEnd] = field(default_factory=dict)

    def connect(self, *incarnations: int) -> None:
        for incarnation in incarnations:
            self.ends[incarnation] = EngineEnd(self.context, self.directory, incarnation)

    async def serve(self, ranks: dict[int, int], draining: frozenset[int] = frozenset()) -> Applied:
        ready = dict.fromkeys(ranks, "")
        return await self.client.apply(Membership(self.epoch, True, True, "", ranks, ready, draining))

    async def begin(self, request_id: str, on: int, *tokens: int) -> None:
        """A new request, which goes to `on` and gets these tokens there."""
        await self.client.add_request_async(request(request_id))
        assert (await self.ends[on].added()).request_id == request_id
        if tokens:
            await self.ends[on].say(request_id, *tokens)
            assert await self.delivered() == (request_id, list(tokens), False)

    async def delivered(self) -> tuple[str, list[int], bool]:
        """The next output that gets through: request, tokens, whether it is the last."""
        outputs = await asyncio.wait_for(self.client.get_output_async(), TIMEOUT_S)
        (output,) = outputs.outputs
        return output.request_id, output.new_token_ids, output.finished


@pytest.fixture
async def world(socket_dir: Path) -> AsyncIterator[World]:
    client = ElasticClient(VllmConfig(), input_address(socket_dir), output_address(socket_dir), TIMEOUT_S)
    context = zmq.asyncio.Context()
    yield World(socket_dir, client, context)
    client.shutdown()
    client.resources.ctx.destroy(linger=0)
    context.destroy(linger=0)


async def test_requests_of_a_draining_rank_go_on_elsewhere_at_once(world: World) -> None:
    world.connect(A, B)
    await world.serve(RANKS)
    await world.begin("r", A, 7, 8)
    assert await world.serve(RANKS, frozenset({A})) == Applied(None, {0: 1})
    assert await world.ends[A].aborted() == ["r"]
    moved = await world.ends[B].added()
    assert moved.sampling_params is not None
    assert moved.sampling_params.extra_args == {"of": "the user", RESUME_KEY: [7, 8]}
    assert moved.prompt_token_ids == [1, 2, 3], "what was generated is not part of the prompt"
    await world.ends[A].say("r", 9, end=True)  # it had computed this before it heard
    await world.ends[A].say(moved.request_id, 9, end=True)
    await world.ends[B].say(moved.request_id, 10)
    assert await world.delivered() == ("r", [10], False)
    await world.ends[B].say(moved.request_id, 11, end=True)
    assert await world.delivered() == ("r", [11], True)
    assert world.client.in_flight == 0


async def test_a_client_cannot_pass_off_tokens_as_output(world: World) -> None:
    world.connect(A)
    await world.serve({A: 0})
    claimed = request("r")
    assert claimed.sampling_params is not None
    claimed.sampling_params.extra_args = {"of": "the user", RESUME_KEY: ["no token"]}
    await world.client.add_request_async(claimed)
    added = await world.ends[A].added()
    assert added.sampling_params is not None
    assert added.sampling_params.extra_args == {"of": "the user"}


async def test_a_draining_rank_gets_no_new_requests(world: World) -> None:
    world.connect(A, B)
    await world.serve(RANKS, frozenset({A}))
    for number in range(3):
        await world.begin(f"r{number}", B)
    assert world.client.in_flight_by_rank() == {0: 0, 1: 3}
    await world.serve(RANKS)
    await world.begin("r3", A)


async def test_with_all_draining_nobody_drains(world: World) -> None:
    world.connect(A, B)
    await world.serve(RANKS)
    await world.begin("r", A)
    assert await world.serve(RANKS, frozenset(RANKS)) == Applied(None, None)
    await world.begin("s", B)
    await world.begin("t", A)
    assert world.client.in_flight_by_rank() == {0: 2, 1: 1}


async def test_a_request_that_has_ended_is_not_moved(world: World) -> None:
    world.connect(A, B)
    await world.serve(RANKS)
    await world.begin("r", A)
    await world.ends[A].say("r", 7, end=True)
    assert await world.delivered() == ("r", [7], True)
    assert await world.serve(RANKS, frozenset({A})) == Applied(None, {0: 0})
    await world.begin("s", B)  # the first that B hears of


async def test_a_request_comes_back_to_a_rank_that_still_computes_it(world: World) -> None:
    """Draining is cancelled, and the other rank drains. Nothing of the first attempt may count for the third."""
    world.connect(A, B)
    await world.serve(RANKS)
    await world.begin("r", A, 7)
    await world.serve(RANKS, frozenset({A}))
    second = (await world.ends[B].added()).request_id
    assert await world.serve(RANKS) == Applied(None, None)
    assert await world.serve(RANKS, frozenset({B})) == Applied(None, {1: 1})
    assert await world.ends[B].aborted() == [second]
    assert await world.ends[A].aborted() == ["r"]
    third = await world.ends[A].added()
    assert len({"r", second, third.request_id}) == 3, "vLLM tells requests by their ids, and so does an ABORT"
    await world.ends[A].say("r", 8, end=True)
    await world.ends[A].say(third.request_id, 9, end=True)
    assert await world.delivered() == ("r", [9], True)


async def test_what_a_client_aborts_after_a_move_ends_where_it_is_now(world: World) -> None:
    world.connect(A, B)
    await world.serve(RANKS)
    await world.begin("r", A)
    await world.serve(RANKS, frozenset({A}))
    moved = (await world.ends[B].added()).request_id
    await world.client.abort_requests_async(["r"])
    assert await world.ends[B].aborted() == [moved]
    assert world.client.in_flight == 0


async def test_a_request_that_waits_for_a_rank_to_connect_is_not_sent_after_it_has_moved(world: World) -> None:
    world.connect(B)
    await world.serve(RANKS)
    waiting = asyncio.ensure_future(world.client.add_request_async(request("r")))
    while world.client.ledger.load(A) == 0:
        await asyncio.sleep(0)
    await world.serve(RANKS, frozenset({A}))
    assert (await world.ends[B].added()).prompt_token_ids == [1, 2, 3]
    world.connect(A)
    await asyncio.wait_for(waiting, TIMEOUT_S)
    assert await world.ends[A].aborted() == ["r"]
    await world.serve(RANKS)
    await world.begin("s", A)  # and nothing before it


async def test_an_epoch_is_answered_once_whoever_drains(world: World) -> None:
    world.connect(A, B, C)
    assert await world.serve({**RANKS, C: 2}) == Applied(Handover(0, (), ()))
    await world.begin("r", A, 7)
    await world.begin("s", B, 7)
    assert await world.serve({**RANKS, C: 2}, frozenset({B})) == Applied(None, {1: 1})
    world.epoch += 1
    survivors = {B: 1, C: 2}
    assert await world.serve(survivors, frozenset({B})) == Applied(Handover(1, ("r",), ()), {1: 0})
    assert world.client.in_flight_by_rank() == {1: 0, 2: 2}
    assert await world.serve(survivors) == Applied()
    world.epoch -= 1
    assert await world.serve({**RANKS, C: 2}, frozenset({C})) == Applied(), "an epoch that is over"
    assert world.client.in_flight_by_rank() == {1: 0, 2: 2}


async def test_a_request_that_nobody_survives_is_given_up(world: World) -> None:
    world.connect(A, B)
    await world.serve(RANKS)
    await world.begin("poison", A)
    await world.begin("innocent", B)
    for replacement in range(100, 100 + MAX_DEATHS):
        world.epoch += 1
        world.connect(replacement)
        applied = await world.serve({replacement: 0, B: 1})
        if applied.given_up:
            break
        assert applied == Applied(Handover(1, (), ("poison",)))
        await world.ends[replacement].added()
    assert applied == Applied(Handover(1, (), ()), None, ("poison",))
    assert replacement == 100 + MAX_DEATHS - 1
    assert world.client.in_flight_by_rank() == {0: 0, 1: 1}


async def test_what_a_rank_did_last_is_not_shown_for_ever(world: World) -> None:
    world.connect(A, B)
    await world.serve(RANKS)
    world.epoch += 1
    await world.serve({B: 1})
    outputs = await asyncio.wait_for(world.client.get_output_async(), TIMEOUT_S)
    assert (outputs.engine_index, outputs.outputs) == (0, [])
    assert outputs.scheduler_stats is not None
    assert (outputs.scheduler_stats.num_running_reqs, outputs.scheduler_stats.kv_cache_usage) == (0, 0.0)


async def test_silence_across_a_change_of_the_group_is_told_once(world: World) -> None:
    world.connect(A, B)
    await world.serve(RANKS)
    await world.begin("r", A, 7)
    await world.begin("s", B, 7)
    await world.begin("new", A)
    world.epoch += 1
    await world.serve({B: 1})
    assert (await asyncio.wait_for(world.client.get_output_async(), TIMEOUT_S)).outputs == []
    moved = [await world.ends[B].added() for _ in range(2)]
    await asyncio.sleep(0.05)
    for request_id in (moved[0].request_id, "s", moved[1].request_id):
        for token in (8, 9):
            await world.ends[B].say(request_id, token)
            await world.delivered()
    gaps = world.client.watch.take_gaps()
    assert len(gaps) == 2, "one had no token yet"
    assert all(0.05 <= gap < 5 for gap in gaps)
    assert world.client.watch.take_gaps() == []


async def test_what_a_front_end_that_died_has_left_is_stopped(world: World) -> None:
    world.connect(A, B)
    await world.serve(RANKS)
    await world.begin("ours", A, 1)
    await world.ends[B].say("left behind", 7)
    assert await world.ends[B].aborted() == ["left behind"]
    await world.ends[A].say("ours", 2)
    assert await world.delivered() == ("ours", [2], False)
