"""Traces and metrics of requests that outlive a rank, taken by a receiver of OTLP over HTTP and by a scraper."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.cluster import Cluster, run_streams
from tests.e2e.conftest import _short

pytestmark = pytest.mark.e2e


class Receiver:
    """Keeps all spans that it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = ExportTraceServiceRequest()
                request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
                spans.extend(
                    span for one in request.resource_spans for scope in one.scope_spans for span in scope.spans
                )
                body = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def named(self, start: str) -> list[Any]:
        return [span for span in list(self.spans) if span.name.startswith(start)]


def _attribute(span: Any, name: str) -> Any:
    (value,) = [one.value for one in span.attributes if one.key == name]
    return getattr(value, value.WhichOneof("value"))


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def traced(receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Sends its traces to `receiver`, soon. It has lost rank 2 under load."""
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url.removesuffix("/v1/traces"),
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    with Cluster(_short(tmp_path_factory), env=environment) as cluster:
        streams = run_streams(cluster, during=lambda: cluster.kill(2))
        assert not [stream.error for stream in streams if stream.error]
        yield cluster


def test_both_attempts_at_a_request_are_linked(traced: Cluster, receiver: Receiver) -> None:
    traced.wait_for(lambda: len(receiver.named("llm_request")) >= 16 and len(receiver.named("POST /v1/")) >= 16)
    attempts = receiver.named("attempt")
    second = [span for span in attempts if _attribute(span, "elastic.attempt") == 2]
    assert len(second) >= 3, "a quarter of the requests was on the rank"
    by_id = {span.span_id: span for span in receiver.spans}
    for span in second:
        (link,) = span.links
        first = by_id[link.span_id]
        assert _attribute(first, "elastic.rank") == 2 != _attribute(span, "elastic.rank")
        assert _attribute(first, "elastic.ended") == "rank lost"
        assert _attribute(span, "elastic.ended") == "length"
        assert _attribute(first, "elastic.epoch") < _attribute(span, "elastic.epoch")
        assert _attribute(first, "elastic.tokens") == _attribute(span, "elastic.tokens_before")
        assert _attribute(first, "elastic.tokens") + _attribute(span, "elastic.tokens") == 80
        assert first.end_time_unix_nano <= span.start_time_unix_nano
        request = by_id[span.parent_span_id]
        assert request.name == "POST /v1/completions"
        assert first.parent_span_id == span.parent_span_id
        assert request.start_time_unix_nano <= first.start_time_unix_nano
        assert request.end_time_unix_nano >= span.end_time_unix_nano
        assert [one for one in receiver.named("llm_request") if one.parent_span_id == request.span_id]


def test_the_trace_of_a_client_goes_on(traced: Cluster, receiver: Receiver) -> None:
    trace_id, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    body = {"model": "tiny-moe", "prompt": "copy 1 2", "max_tokens": 4}
    answer = httpx.post(
        f"{traced.url}/v1/completions", json=body, headers={"traceparent": f"00-{trace_id}-{parent}-01"}
    )
    assert answer.status_code == 200
    traced.wait_for(lambda: sum(span.trace_id.hex() == trace_id for span in list(receiver.spans)) >= 3)
    spans = {span.name: span for span in list(receiver.spans) if span.trace_id.hex() == trace_id}
    assert spans["POST /v1/completions"].parent_span_id.hex() == parent
    assert spans["attempt"].parent_span_id == spans["POST /v1/completions"].span_id


def samples_of(cluster: Cluster) -> dict[tuple[str, str], float]:
    return {
        (sample.name, sample.labels.get("engine", sample.labels.get("status", ""))): sample.value
        for family in text_string_to_metric_families(httpx.get(f"{cluster.url}/metrics").text)
        for sample in family.samples
        if "le" not in sample.labels
    }


def test_gaps_of_clients_and_idle_gauges_of_the_lost_rank(traced: Cluster) -> None:
    traced.wait_for(lambda: samples_of(traced)["elastic_client_gap_seconds_count", ""] >= 16)
    samples = samples_of(traced)
    assert samples["elastic_client_gap_seconds_count", ""] == 16
    assert samples["vllm:num_requests_running", "2"] == 0
    assert samples["vllm:kv_cache_usage_perc", "2"] == 0
    assert samples["elastic_status", "degraded"] == 1
    assert samples["elastic_control_loop_lag_seconds_count", ""] > 10
