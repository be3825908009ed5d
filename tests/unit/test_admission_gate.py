"""Who is refused, over HTTP: the real gate before an application that answers when the test says so."""

from __future__ import annotations

import asyncio
import itertools
import time

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from elastic_daemon.admission import Limits, Queue
from elastic_daemon.admission_gate import AdmissionGate
from tests.unit.http_server import serving


class Engine:
    """An application that queues as vLLM's does: a request joins, and leaves with its first token."""

    def __init__(self, queue: Queue) -> None:
        self.go = asyncio.Event()
        self._queue = queue
        self._ids = map(str, itertools.count())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await Request(scope, receive).body()
        if scope["method"] == "POST":
            self._queue.join(id_ := next(self._ids))
            await self.go.wait()
            self._queue.begin(id_, time.monotonic())
            self._queue.leave([id_])
        await JSONResponse({})(scope, receive, send)


async def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    queue = Queue()
    queue.departures.serving(True, time.monotonic())
    gate = AdmissionGate(engine := Engine(queue), queue, Limits(max_waiting=1, queue_timeout_s=600.0))
    async with serving(gate) as (host, port), httpx.AsyncClient(base_url=f"http://{host}:{port}") as http:
        first = asyncio.create_task(http.post("/v1/completions", json={"prompt": "1"}))
        async with asyncio.timeout(10):
            while not queue.waiting:
                await asyncio.sleep(0.005)
        for path in ("/v1/completions", "/v1/chat/completions"):
            refused = await http.post(path, json={"prompt": "2"})
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("ServiceUnavailableError", 503)
            assert error["message"].startswith("1 requests wait already")
        assert (await http.get("/v1/models")).status_code == 200, "only what would be computed is refused"
        gate.limits = Limits(max_waiting=2, queue_timeout_s=600.0)
        second = asyncio.create_task(http.post("/v1/completions", json={"prompt": "3"}))
        async with asyncio.timeout(10):
            while queue.waiting < 2:
                await asyncio.sleep(0.005)
        engine.go.set()
        assert [(await answer).status_code for answer in (first, second)] == [200, 200]
        assert (await http.post("/v1/completions", json={"prompt": "4"})).status_code == 200
    assert (queue.waiting, queue.refused) == (0, 2)
