"""Ending requests with an error, in vLLM's output processor: their clients hear of it, and nothing of them is kept."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from vllm.config import VllmConfig
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from elastic_daemon.engine.client import ElasticClient, NotServed
from elastic_daemon.engine.configure import Deployment
from elastic_daemon.engine.openai_app import fail_in_flight, fail_requests
from elastic_daemon.frontend import Frontend
from elastic_daemon.processes.messages import Message, decode
from elastic_daemon.requests import MAX_DEATHS
from tests.contract.engine_ends import input_address, output_address, request


class Front:
    """What `AsyncLLM` has of requests, without engines."""

    def __init__(self, directory: Path) -> None:
        self.processor = OutputProcessor(None, log_stats=False)
        self.llm = cast(AsyncLLM, SimpleNamespace(output_processor=self.processor))
        self.client = ElasticClient(VllmConfig(), input_address(directory), output_address(directory), 1.0)

    def admit(self, request_id: str, n: int = 1, owner: int = 1) -> RequestOutputCollector:
        """A request with `n` choices, as AsyncLLM admits it."""
        params = SamplingParams(n=n, output_kind=RequestOutputKind.DELTA, detokenize=False)
        whole = request(request_id)
        whole.external_req_id, whole.sampling_params = f"external {request_id}", params
        queue = RequestOutputCollector(params.output_kind, request_id)
        if n == 1:
            self.processor.add_request(whole, None, None, 0, queue)
            self.client.ledger.admit(request_id, whole, owner)
            return queue
        parent = ParentRequest(whole)
        for index in range(n):
            child = request("")
            child.request_id, child.sampling_params = parent.get_child_info(index)
            child.external_req_id = whole.external_req_id
            self.processor.add_request(child, None, parent, index, queue)
            self.client.ledger.admit(child.request_id, child, owner)
        return queue

    @property
    def known(self) -> list[str]:
        processor = self.processor
        assert set(processor.request_states) == {rid for ids in processor.external_req_ids.values() for rid in ids}
        assert all(rid in self.client.ledger for rid in processor.request_states)
        assert len(self.client.ledger) == len(processor.request_states)
        return sorted([*processor.request_states, *processor.parent_requests])


@pytest.fixture
async def front(socket_dir: Path) -> AsyncIterator[Front]:
    front = Front(socket_dir)
    yield front
    front.client.shutdown()
    front.client.resources.ctx.destroy(linger=0)


async def test_only_those_named_end(front: Front) -> None:
    doomed, other = front.admit("doomed"), front.admit("other")
    assert fail_requests(front.llm, front.client, ["doomed", "gone already"], NotServed("no luck")) == 1
    with pytest.raises(NotServed, match="no luck"):
        await doomed.get()
    assert other.get_nowait() is None
    assert front.known == ["other"]


async def test_all_choices_of_a_client_end_together(front: Front) -> None:
    choices, other = front.admit("several", n=3), front.admit("other", n=2)
    assert fail_requests(front.llm, front.client, ["1_several"], NotServed("no luck")) == 3
    with pytest.raises(NotServed, match="no luck"):
        await choices.get()
    assert other.get_nowait() is None
    assert front.known == ["0_other", "1_other", "other"]


async def test_all_in_flight_end_once(front: Front) -> None:
    queues = [front.admit("one"), front.admit("several", n=2)]
    assert fail_in_flight(front.llm, front.client, NotServed("too late")) == 3
    for queue in queues:
        with pytest.raises(NotServed, match="too late"):
            await queue.get()
    assert front.known == []
    assert fail_in_flight(front.llm, front.client, NotServed("too late")) == 0, "nobody is counted twice"


class Answering(Frontend):
    """A front end without a server, which follows what it is told."""

    def __init__(self, front: Front, writer: asyncio.StreamWriter) -> None:
        super().__init__(cast(Deployment, None), {})
        self._client, self._llm, self._writer = front.client, front.llm, writer

    async def follow(self, epoch: int, incarnation: int, draining: list[int]) -> None:
        members = [
            {"rank": 0, "incarnation": incarnation, "response": ""},
            {"rank": 1, "incarnation": 2, "response": ""},
        ]
        message: Message = {"type": "membership", "epoch": epoch, "status": "ok", "reason": "", "hold": True}
        await self._apply({**message, "members": members, "draining": draining})


async def test_the_supervisor_hears_what_was_moved_and_what_was_given_up(front: Front) -> None:
    ours, theirs = socket.socketpair()
    _, writer = await asyncio.open_connection(sock=ours)
    reader, their_writer = await asyncio.open_connection(sock=theirs)

    async def heard() -> Message:
        return decode(await asyncio.wait_for(reader.readline(), 10.0))

    answering, poison = Answering(front, writer), front.admit("poison")
    for epoch in range(1, MAX_DEATHS + 2):
        await answering.follow(epoch, 1 if epoch == 1 else 100 + epoch, draining=[2])
        synced, moved = await heard(), await heard()
        assert (synced["type"], synced["epoch"], synced["lost"]) == ("synced", epoch, int(epoch > MAX_DEATHS))
        assert moved == {"type": "moved", "epoch": epoch, "draining": [2], "requests": [{"rank": 1, "count": 0}]}
    with pytest.raises(NotServed, match="given up after 5 ranks died computing it"):
        await poison.get()
    assert front.known == []

    await answering.follow(epoch, 100 + epoch, draining=[])
    front.admit("other", owner=100 + epoch)
    await answering.follow(epoch, 100 + epoch, draining=[100 + epoch])
    assert (await heard())["requests"] == [{"rank": 0, "count": 1}], "and no `synced` in between"
    writer.close()
    their_writer.close()
