"""Traces: a span for each request, one below it for each attempt, links between attempts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from elastic_daemon.telemetry.trace_settings import MOVED, RANK_LOST, traces_endpoint
from elastic_daemon.telemetry.tracing import AttemptTraces, RequestSpans

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C


class Collected:
    def __init__(self) -> None:
        self.provider = TracerProvider()
        self._exporter = InMemorySpanExporter()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())


@pytest.fixture
def collected() -> Collected:
    return Collected()


def _attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_request_that_survives_two_changes(collected: Collected) -> None:
    traces = AttemptTraces(collected.provider)
    headers = {"traceparent": PARENT}
    traces.begin("r", 2, 1, 0, headers)
    traces.token("r", 3)
    traces.interrupt(["r", "unknown"], RANK_LOST)
    traces.begin("r", 0, 2, 3, headers)
    traces.token("r", 1)
    traces.interrupt(["r"], MOVED)
    traces.begin("r", 1, 2, 4, headers)
    traces.token("r", 2)
    traces.end("r", "length")
    first, second, third = collected.spans
    assert [_attributes(span)["elastic.attempt"] for span in collected.spans] == [1, 2, 3]
    assert [_attributes(span)["elastic.rank"] for span in collected.spans] == [2, 0, 1]
    assert [_attributes(span)["elastic.epoch"] for span in collected.spans] == [1, 2, 2]
    assert [_attributes(span)["elastic.ended"] for span in collected.spans] == [RANK_LOST, MOVED, "length"]
    assert [_attributes(span)["elastic.tokens"] for span in collected.spans] == [3, 1, 2]
    assert [_attributes(span)["elastic.tokens_before"] for span in collected.spans] == [0, 3, 4]
    assert [span.status.is_ok for span in collected.spans] == [False, True, True]
    assert not first.links
    assert [link.context.span_id for link in second.links] == [first.context.span_id]
    assert [link.context.span_id for link in third.links] == [second.context.span_id]
    assert {span.context.trace_id for span in collected.spans} == {TRACE_ID}
    assert {span.parent.span_id for span in collected.spans if span.parent} == {0xB7AD6B7169203331}


def test_nothing_is_kept_of_a_request_that_has_ended(collected: Collected) -> None:
    traces = AttemptTraces(collected.provider)
    traces.begin("r", 0, 1, 0, None)
    traces.interrupt(["r"], RANK_LOST)
    traces.end("r", "aborted")  # while nobody computes it
    traces.end("r", "aborted")
    traces.token("r", 1)
    traces.begin("r", 0, 1, 0, None)  # another one of the same id
    traces.end("r", "stop")
    assert [_attributes(span)["elastic.attempt"] for span in collected.spans] == [1, 1]
    assert not collected.spans[1].links
    assert traces._open == traces._previous == {}


def _client(app: Callable[..., Any], collected: Collected) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(RequestSpans(app, collected.provider), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://daemon")


async def _told(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the traceparent that it gets."""
    request = Request(scope, receive)
    status = int(request.query_params.get("status", 200))
    await PlainTextResponse(request.headers.get("traceparent", ""), status)(scope, receive, send)


async def test_the_span_of_a_request_is_passed_on_as_its_context(collected: Collected) -> None:
    async with _client(_told, collected) as client:
        told = (await client.post("/v1/completions", headers={"traceparent": PARENT, "tracestate": "a=b"})).text
        alone = (await client.post("/v1/completions?status=503")).text
    with_client, without = collected.spans
    assert told == f"00-{TRACE_ID:032x}-{with_client.context.span_id:016x}-01"
    assert with_client.parent is not None and with_client.parent.span_id == 0xB7AD6B7169203331
    assert with_client.context.trace_state.get("a") == "b"
    assert _attributes(with_client)["http.response.status_code"] == 200
    assert without.parent is None and alone.split("-")[1] == f"{without.context.trace_id:032x}"
    assert not without.status.is_ok


async def test_what_is_no_request_for_inference_has_no_span(collected: Collected) -> None:
    async with _client(_told, collected) as client:
        assert (await client.get("/v1/models", headers={"traceparent": PARENT})).text == PARENT
    assert collected.spans == []


async def test_a_request_that_fails_ends_its_span(collected: Collected) -> None:
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("no")

    async with _client(failing, collected) as client:
        assert (await client.post("/v1/completions")).status_code == 500
    (span,) = collected.spans
    assert not span.status.is_ok


@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://a:1/t"}, "http://a:1/t"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4317"}, "http://a:4317"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318/", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            "http://a:4318/v1/traces",
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4317", "OTEL_SDK_DISABLED": "true"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4317", "OTEL_TRACES_EXPORTER": "none"}, None),
    ],
    ids=str,
)
def test_endpoint_by_the_standard_environment(environment: dict[str, str], endpoint: str | None) -> None:
    assert traces_endpoint(environment) == endpoint
    if "OTEL_EXPORTER_OTLP_PROTOCOL" in environment:
        assert environment["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf", "which is what vLLM reads"
