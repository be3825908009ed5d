"""The front-end process: vLLM's OpenAI server on the daemon's listening socket.

It accepts connections, answers inference itself, and passes control paths on to the supervisor. Its crash costs the
requests in flight, never ranks or weights: the supervisor then answers on the same socket and starts another.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import structlog
import uvicorn
from prometheus_client import REGISTRY
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.v1.engine.async_llm import AsyncLLM

from elastic_daemon.engine.client import ElasticClient, NotServed
from elastic_daemon.engine.configure import Deployment
from elastic_daemon.engine.group_view import Applied, Membership, membership_from_message
from elastic_daemon.engine.openai_app import fail_in_flight, fail_requests, make_app, make_llm
from elastic_daemon.errors import ConfigError
from elastic_daemon.gates.access import AccessGuard, AccessRules
from elastic_daemon.gates.admission import Limits
from elastic_daemon.gates.admission_gate import AdmissionGate, BatchGate
from elastic_daemon.gates.limits import KEEP_ALIVE_S, BoundedHttp, SizeLimits
from elastic_daemon.gates.tls import tls_from_message
from elastic_daemon.processes.messages import MAX_LINE_BYTES, Message, decode, encode
from elastic_daemon.requests import MAX_DEATHS
from elastic_daemon.routes.control_routes import is_control_path
from elastic_daemon.routes.http_errors import unavailable
from elastic_daemon.telemetry.exposition import Exposition
from elastic_daemon.telemetry.logs import configure_logging
from elastic_daemon.telemetry.metrics import METRICS_TYPE

log = structlog.get_logger(__name__)

STATS_INTERVAL_S = 0.5

LAST_WORDS_S = 1.0
"""So long before a drain is over, requests that have not ended are ended with an error: after it, they are cut."""


class ControlProxy:
    """ASGI application that sends control paths to the supervisor and everything else to vLLM's application."""

    def __init__(self, app: ASGIApp, socket_path: str) -> None:
        self._app = app
        self._supervisor = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=socket_path), base_url="http://supervisor", timeout=None
        )
        self._own_metrics = Exposition(REGISTRY)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_control_path(scope["path"]):
            response = await self._forward(Request(scope, receive))
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _forward(self, request: Request) -> Response:
        headers = [(k, v) for k, v in request.headers.raw if k != b"connection"]
        forwarded = self._supervisor.build_request(
            request.method, request.url.path, params=request.query_params, headers=headers, content=await request.body()
        )
        try:
            answer = await self._supervisor.send(forwarded, stream=True)
        except httpx.TransportError as error:
            return JSONResponse({"error": f"the supervisor does not answer: {error}"}, 503)
        if request.url.path == "/metrics":
            text = self._own_metrics.render() + (await answer.aread()).decode()
            return Response(text, answer.status_code, media_type=METRICS_TYPE)
        return StreamingResponse(
            _until_broken(answer), answer.status_code, dict(answer.headers), background=BackgroundTask(answer.aclose)
        )


async def _until_broken(answer: httpx.Response) -> AsyncIterator[bytes]:
    """What the supervisor says. A stream that it breaks off ends."""
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    except httpx.TransportError as error:
        log.warning("control_answer_broken_off", path=answer.request.url.path, error=str(error))


class HoldGate:
    """ASGI middleware that holds requests for inference while nothing is served, before a response has begun.

    A stream that has begun can only end in an error event; held here, a request still gets its 503.
    """

    def __init__(self, app: ASGIApp, client: ElasticClient) -> None:
        self._app = app
        self._client = client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            try:
                await self._client.until_serving()
            except NotServed as error:
                return await unavailable(str(error))(scope, receive, send)
        await self._app(scope, receive, send)


class Frontend:
    """Ties vLLM's server, the engine client and the supervisor's instructions together."""

    def __init__(self, deployment: Deployment, spec: Message) -> None:
        self._deployment = deployment
        self._spec = spec
        self._lost = 0  # requests given up since the group last served
        self._client: ElasticClient
        self._guard: AccessGuard
        self._gate: AdmissionGate
        self._batches: BatchGate
        self._sizes: SizeLimits
        self._llm: AsyncLLM
        self._server: uvicorn.Server
        self._writer: asyncio.StreamWriter

    async def run(self) -> None:
        spec = self._spec
        reader, self._writer = await asyncio.open_unix_connection(spec["control"], limit=MAX_LINE_BYTES)
        self._say("hello", role="frontend")
        self._client = ElasticClient(
            self._deployment.config, spec["input_address"], spec["output_address"], spec["settings"]["hold_timeout_s"]
        )
        self._llm = make_llm(self._deployment, self._client)
        settings = spec["settings"]
        queue, limits = self._client.watch.queue, _limits_of(settings)
        batches = self._batches = BatchGate(await make_app(self._deployment, self._llm), queue, limits)
        gated = self._gate = AdmissionGate(HoldGate(batches, self._client), queue, limits)
        app = self._guard = AccessGuard(
            ControlProxy(self._traced(gated), spec["http_socket"]), AccessRules.from_message(settings["access"])
        )
        self._sizes = SizeLimits(app, settings["max_body_bytes"])
        self._tls = tls_from_message(spec["tls"])
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._sizes,
                lifespan="on",
                log_level="warning",
                access_log=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                http=BoundedHttp,
                **(self._tls.uvicorn_options if self._tls is not None else {}),
            )
        )
        self._server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        listener = socket.socket(fileno=os.dup(spec["listen_fd"]))
        async with asyncio.TaskGroup() as tasks:
            instructions = tasks.create_task(self._follow(reader))
            stats = tasks.create_task(self._report_stats())
            serving = tasks.create_task(self._server.serve(sockets=[listener]))
            while not self._server.started:
                await asyncio.sleep(0.01)
                if serving.done():
                    break
            self._say("ready")
            await serving
            self._say_stats()  # what was in flight half a second ago is not lost
            self._say("drained", lost=self._lost)
            instructions.cancel()
            stats.cancel()
        self._llm.shutdown()
        if self._client.watch.traces is not None:
            await asyncio.to_thread(self._client.watch.traces.flush)

    def _traced(self, app: ASGIApp) -> ASGIApp:
        if self._deployment.config.observability_config.otlp_traces_endpoint is None:
            return app
        from elastic_daemon.telemetry.tracing import AttemptTraces, RequestSpans

        self._client.watch.traces = AttemptTraces()
        return RequestSpans(app)

    def _say(self, type_: str, **fields: Any) -> None:
        self._writer.write(encode({"type": type_, **fields}))

    def _stop(self) -> None:
        self._server.should_exit = True

    async def _follow(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            message = decode(line)
            if message["type"] == "membership":
                await self._apply(message)
            elif message["type"] == "settings":
                self._adopt(message)
                self._say("adopted")
            elif message["type"] == "drain":
                self._drain(message["timeout_s"])
        self._stop()

    def _drain(self, timeout_s: float) -> None:
        if not self._server.should_exit:
            last_words = max(timeout_s - LAST_WORDS_S, timeout_s / 2)
            asyncio.get_running_loop().call_later(
                last_words, self._fail_all, "the daemon stops, and cannot wait longer"
            )
        self._server.config.timeout_graceful_shutdown = max(1, int(timeout_s))
        self._stop()

    def _fail_all(self, reason: str) -> None:
        failed = fail_in_flight(self._llm, self._client, NotServed(reason))
        self._lost += failed
        if failed:
            log.warning("requests_failed", count=failed, reason=reason)

    def _adopt(self, settings: Message) -> None:
        """What has changed in a reload."""
        self._guard.rules = AccessRules.from_message(settings["access"])
        self._client.hold_timeout_s = settings["hold_timeout_s"]
        self._gate.limits = self._batches.limits = _limits_of(settings)
        self._sizes.max_body_bytes = settings["max_body_bytes"]
        if self._tls is not None and self._server.config.ssl is not None:
            try:
                self._tls.load_into(self._server.config.ssl)
            except ConfigError as error:  # it goes on with the certificate that it has
                log.warning("certificate_unreadable", reason=str(error))
        configure_logging(settings["log_level"])

    async def _apply(self, message: Message) -> None:
        membership = membership_from_message(message)
        applied = await self._client.apply(membership)
        self._client.watch.queue.departures.serving(membership.serving, time.monotonic())
        if applied.given_up:
            error = NotServed(f"given up after {MAX_DEATHS} ranks died computing it")
            self._lost += fail_requests(self._llm, self._client, applied.given_up, error)
            log.warning("requests_given_up", requests=applied.given_up, deaths=MAX_DEATHS)
        if membership.serving:
            self._answer(membership, applied)
        elif not membership.hold:
            self._fail_all(membership.reason)

    def _answer(self, membership: Membership, applied: Applied) -> None:
        if (handover := applied.handover) is not None:
            self._say(
                "synced",
                epoch=membership.epoch,
                kept=handover.kept,
                replayed=len(handover.replayed),
                restarted=len(handover.restarted),
                lost=self._lost,
                delivered=self._client.ledger.delivered,
            )
            self._lost = 0
        if applied.moved is not None:
            counts = [{"rank": rank, "count": count} for rank, count in applied.moved.items()]
            self._say("moved", epoch=membership.epoch, draining=sorted(membership.draining), requests=counts)

    def _say_stats(self) -> None:
        self._say(
            "stats",
            in_flight=self._client.in_flight,
            by_rank=self._client.in_flight_by_rank(),
            refused=self._client.watch.queue.refused,
            refusing=self._gate.refusal(),
            gaps=[round(gap, 4) for gap in self._client.watch.take_gaps()],
        )

    async def _report_stats(self) -> None:
        while True:
            self._say_stats()
            with contextlib.suppress(ConnectionError):
                await self._writer.drain()
            await asyncio.sleep(STATS_INTERVAL_S)


def _limits_of(settings: Message) -> Limits:
    return Limits(settings["max_waiting"], settings["queue_timeout_s"])


def run_frontend(deployment: Deployment, spec: Message) -> None:
    """Be the front end until told to drain. Called in a fresh fork of the zygote."""
    configure_logging(spec["settings"]["log_level"])  # a reload may have changed it since the zygote's start
    asyncio.run(Frontend(deployment, spec).run())
