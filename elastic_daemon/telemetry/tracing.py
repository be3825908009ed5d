"""Traces of requests: one span for each, one below it for each attempt, with a link to the attempt before.

The front end begins the span of a request at its door and hands its context on as `traceparent`, as if the client had
sent it: vLLM's own span (`llm_request`) and those of the attempts then hang below it, wherever they are made. Nothing
of this is imported, and nothing wrapped, unless an endpoint is set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elastic_daemon.telemetry.trace_settings import FAILURES

NAME = "elastic_daemon"

FLUSH_MS = 2000

PROPAGATOR = TraceContextTextMapPropagator()
HEADERS = (b"traceparent", b"tracestate")


@dataclass
class _Attempt:
    span: trace.Span
    number: int
    tokens: int = 0


class AttemptTraces:
    """Spans of the attempts at requests in flight."""

    def __init__(self, provider: trace.TracerProvider | None = None) -> None:
        """`provider`: None for the one of this process."""
        self._tracer = trace.get_tracer(NAME, tracer_provider=provider)
        self._open: dict[str, _Attempt] = {}
        self._previous: dict[str, tuple[int, trace.SpanContext]] = {}

    def begin(self, request_id: str, rank: int, epoch: int, tokens: int, headers: Mapping[str, str] | None) -> None:
        """`rank` is given the request, of which its client has `tokens`. `headers`: with the context of its span."""
        number, before = self._previous.pop(request_id, (0, None))
        span = self._tracer.start_span(
            "attempt",
            context=PROPAGATOR.extract(dict(headers or {})),
            links=[trace.Link(before, {"elastic.link": "previous attempt"})] if before is not None else None,
            attributes={
                "elastic.attempt": number + 1,
                "elastic.rank": rank,
                "elastic.epoch": epoch,
                "elastic.tokens_before": tokens,
                "gen_ai.request.id": request_id,
            },
        )
        self._open[request_id] = _Attempt(span, number + 1)

    def token(self, request_id: str, count: int) -> None:
        if (attempt := self._open.get(request_id)) is not None:
            attempt.tokens += count

    def end(self, request_id: str, reason: str) -> None:
        """The request has ended, and the attempt with it. Nothing happens if it has ended before."""
        self._close(request_id, reason)
        self._previous.pop(request_id, None)

    def interrupt(self, request_ids: Iterable[str], reason: str) -> None:
        """These attempts have ended, and others may follow."""
        for request_id in request_ids:
            if (attempt := self._close(request_id, reason)) is not None:
                self._previous[request_id] = attempt.number, attempt.span.get_span_context()

    @staticmethod
    def flush() -> None:
        """Send what has not been sent, as far as the receiver takes it in time: the process ends."""
        force: Any = getattr(trace.get_tracer_provider(), "force_flush", None)
        if force is not None:
            force(FLUSH_MS)

    def _close(self, request_id: str, reason: str) -> _Attempt | None:
        attempt = self._open.pop(request_id, None)
        if attempt is not None:
            attempt.span.set_attributes({"elastic.ended": reason, "elastic.tokens": attempt.tokens})
            if reason in FAILURES:
                attempt.span.set_status(trace.StatusCode.ERROR, reason)
            attempt.span.end()
        return attempt


class RequestSpans:
    """ASGI middleware: a span for each POST, below the client's if it sends a `traceparent`."""

    def __init__(self, app: ASGIApp, provider: trace.TracerProvider | None = None) -> None:
        self._app = app
        self._tracer = trace.get_tracer(NAME, tracer_provider=provider)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        given = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in HEADERS}
        path = scope["path"]
        span = self._tracer.start_span(
            f"POST {path}",
            context=PROPAGATOR.extract(given),
            kind=trace.SpanKind.SERVER,
            attributes={"http.request.method": "POST", "url.path": path},
        )
        carrier: dict[str, str] = {}
        PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
        headers = [(name, value) for name, value in scope["headers"] if name not in HEADERS]
        headers += [(name.encode(), value.encode("latin-1")) for name, value in carrier.items()]

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(trace.StatusCode.ERROR)
            await send(message)

        with trace.use_span(span, end_on_exit=True):
            await self._app({**scope, "headers": headers}, receive, watched)
