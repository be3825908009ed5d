"""Ending requests with an error, in vLLM's output processor: their clients hear of it, and nothing of them is kept."""

from __future__ import annotations

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
from elastic_daemon.engine.openai_app import fail_in_flight, fail_requests
from tests.contract.engine_ends import input_address, output_address, request


class Front:
    """What `AsyncLLM` has of requests, without engines."""

    def __init__(self, directory: Path) -> None:
        self.processor = OutputProcessor(None, log_stats=False)
        self.llm = cast(AsyncLLM, SimpleNamespace(output_processor=self.processor))
        self.client = ElasticClient(VllmConfig(), input_address(directory), output_address(directory), 1.0)

    def admit(self, request_id: str, n: int = 1) -> RequestOutputCollector:
        """A request with `n` choices, as AsyncLLM admits it."""
        params = SamplingParams(n=n, output_kind=RequestOutputKind.DELTA, detokenize=False)
        whole = request(request_id)
        whole.external_req_id, whole.sampling_params = f"external {request_id}", params
        queue = RequestOutputCollector(params.output_kind, request_id)
        if n == 1:
            self.processor.add_request(whole, None, None, 0, queue)
            self.client.ledger.admit(request_id, whole, 1)
            return queue
        parent = ParentRequest(whole)
        for index in range(n):
            child = request("")
            child.request_id, child.sampling_params = parent.get_child_info(index)
            child.external_req_id = whole.external_req_id
            self.processor.add_request(child, None, parent, index, queue)
            self.client.ledger.admit(child.request_id, child, 1)
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
