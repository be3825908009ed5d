"""Who is refused, over HTTP: the real gate before an application that answers when the test says so."""

from __future__ import annotations

import asyncio
import itertools
import time

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from elastic_daemon.gates.admission import FEWEST, Limits, Queue, requests_in
from elastic_daemon.gates.admission_gate import AdmissionGate, BatchGate
from tests.unit.http_server import serving


class Engine:
    """An application that queues as vLLM's does: a request joins, and leaves with its first token."""

    def __init__(self, queue: Queue) -> None:
        self.go = asyncio.Event()
        self._queue = queue
        self._ids = map(str, itertools.count())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        if scope["method"] == "POST":
            await asyncio.gather(*(self._generate() for _ in range(requests_in(body))))
        await JSONResponse({"bytes": len(body)})(scope, receive, send)

    async def _generate(self) -> None:
        self._queue.join(id_ := next(self._ids))
        await self.go.wait()
        self._queue.begin(id_, time.monotonic())
        self._queue.leave([id_])


async def joined(queue: Queue, number: int) -> None:
    async with asyncio.timeout(10):
        while queue.waiting != number:
            await asyncio.sleep(0.005)


async def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    queue = Queue()
    queue.departures.serving(True, time.monotonic())
    gate = AdmissionGate(engine := Engine(queue), queue, Limits(max_waiting=1, queue_timeout_s=600.0))
    async with serving(gate) as (host, port), httpx.AsyncClient(base_url=f"http://{host}:{port}") as http:
        first = asyncio.create_task(http.post("/v1/completions", json={"prompt": "1"}))
        await joined(queue, 1)
        assert gate.refusal() == "1 requests wait already, and no more may"
        for path in ("/v1/completions", "/v1/chat/completions"):
            refused = await http.post(path, json={"prompt": "2"})
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("ServiceUnavailableError", 503)
            assert error["message"].startswith("1 requests wait already")
        assert (await http.get("/v1/models")).status_code == 200, "only what would be computed is refused"
        gate.limits = Limits(max_waiting=2, queue_timeout_s=600.0)
        assert gate.refusal() is None
        second = asyncio.create_task(http.post("/v1/completions", json={"prompt": "3"}))
        await joined(queue, 2)
        engine.go.set()
        assert [(await answer).status_code for answer in (first, second)] == [200, 200]
        assert (await http.post("/v1/completions", json={"prompt": "4"})).status_code == 200
    assert (queue.waiting, queue.refused) == (0, 2)


async def test_who_would_wait_longer_than_the_deadline_is_refused_and_told_when_to_come_again() -> None:
    queue, limits = Queue(), Limits(max_waiting=4096, queue_timeout_s=60.0)
    queue.departures.serving(True, time.monotonic())
    gate = AdmissionGate(engine := Engine(queue), queue, limits)
    async with serving(gate) as (host, port), httpx.AsyncClient(base_url=f"http://{host}:{port}") as http:
        waiting = [asyncio.create_task(http.post("/v1/completions", json={"prompt": "1"})) for _ in range(8)]
        await joined(queue, 8)
        now = time.monotonic() + 40.0  # in which this many have got their first token: 0.4 a second
        for number in range(FEWEST):
            queue.departures.left(now - 40.0 + number / FEWEST)
        queue.departures.left(now)
        gate.limits = Limits(max_waiting=4096, queue_timeout_s=10.0)
        refused = await http.post("/v1/completions", json={"prompt": "2"})
        rate = (FEWEST + 1) / 40.0
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) == pytest.approx(8 / rate - 10.0, abs=1.5)
        assert refused.json()["error"]["message"].startswith("8 requests wait already: come again in ")
        queue.departures.serving(False, time.monotonic())
        held = asyncio.create_task(http.post("/v1/completions", json={"prompt": "3"}))
        await joined(queue, 9)  # in a recovery nobody is refused for the wait
        queue.departures.serving(True, time.monotonic())
        gate.limits = limits
        admitted = asyncio.create_task(http.post("/v1/completions", json={"prompt": "4"}))
        await joined(queue, 10)
        engine.go.set()
        assert {(await answer).status_code for answer in (*waiting, held, admitted)} == {200}
    assert (queue.waiting, queue.refused) == (0, 1)


@pytest.mark.parametrize(
    ("body", "requests"),
    [
        (b"", 1),
        (b"{", 1),
        (b"[1, 2]", 1),
        (b"[" * 100_000, 1),
        (b'{"prompt": "a b c"}', 1),
        (b'{"prompt": []}', 1),
        (b'{"prompt": [1, 2, 3]}', 1),
        (b'{"prompt": ["a", "b", "c"]}', 3),
        (b'{"prompt": [[1, 2], [3]]}', 2),
        (b'{"prompt": ["a", "b"], "n": 3}', 6),
        (b'{"prompt": ["a"], "n": "3"}', 3),
        (b'{"prompt": "a", "prompt_embeds": ["x", "y"]}', 3),
        (b'{"messages": [{}, {}], "n": 4}', 4),
        (b'{"messages": [], "n": null}', 1),
        (b'{"messages": [], "n": -4}', 1),
        (b'{"messages": [], "n": 1e999}', 1),
        (b'{"messages": [], "n": [7]}', 1),
        ('{"prompt": ["a", "b"]}'.encode("utf-16"), 2),
    ],
)
def test_requests_of_a_body(body: bytes, requests: int) -> None:
    assert requests_in(body) == requests


async def test_a_batch_finds_room_as_a_whole_or_is_refused() -> None:
    """One HTTP request must not pass `max_waiting` many times over."""
    queue, limits = Queue(), Limits(max_waiting=4, queue_timeout_s=600.0)
    queue.departures.serving(True, time.monotonic())
    gate = AdmissionGate(BatchGate(engine := Engine(queue), queue, limits), queue, limits)
    async with serving(gate) as (host, port), httpx.AsyncClient(base_url=f"http://{host}:{port}") as http:
        for path, body in (
            ("/v1/completions", {"prompt": ["a"] * 5}),
            ("/v1/completions", {"prompt": [[1], [2]], "n": 3}),
            ("/v1/chat/completions", {"messages": [], "n": 5}),
        ):
            refused = await http.post(path, json=body)
            assert refused.status_code == 400 and "retry-after" not in refused.headers
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("BadRequestError", 400)
            assert error["message"].endswith("at most 4 can wait")
        assert (queue.waiting, queue.refused) == (0, 0)

        first = asyncio.create_task(http.post("/v1/completions", json={"prompt": ["a", "b", "c"]}))
        await joined(queue, 3)
        refused = await http.post("/v1/completions", json={"prompt": ["a", "b"]})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["message"].startswith("3 requests wait already, and this makes 2: come again in")
        assert (queue.waiting, queue.refused) == (3, 1)
        second = asyncio.create_task(http.post("/v1/completions", json={"prompt": ["d"]}))
        await joined(queue, 4)
        assert (await http.post("/v1/completions", json={"prompt": "e"})).status_code == 503
        engine.go.set()
        assert [(await answer).status_code for answer in (first, second)] == [200, 200]
        whole = {"prompt": ["x" * 200_000] * 4}
        answer = await http.post("/v1/completions", json=whole)
        assert answer.json() == {"bytes": len(answer.request.content)}, "what is behind gets all of the body"
    assert (queue.waiting, queue.refused) == (0, 2)


async def test_a_batch_counts_before_the_engine_s_client_has_it() -> None:
    queue, limits = Queue(), Limits(max_waiting=4, queue_timeout_s=600.0)
    over = queue.arrive()
    assert queue.widen(3, limits, 0.0) is None
    assert queue.waiting == 3
    queue.join("a")
    queue.join("b")
    assert queue.waiting == 3
    queue.leave(["a", "b"])
    assert queue.waiting == 1
    over()
    assert queue.waiting == 0
