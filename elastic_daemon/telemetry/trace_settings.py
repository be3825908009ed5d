"""What is said of traces where OpenTelemetry is not imported: where they go, and how attempts end."""

from __future__ import annotations

from collections.abc import MutableMapping

TRACES = "OTEL_EXPORTER_OTLP_TRACES_"
ALL = "OTEL_EXPORTER_OTLP_"

RANK_LOST, MOVED, ABORTED, GIVEN_UP = "rank lost", "moved off a draining rank", "aborted", "given up"
"""How attempts end, beside vLLM's reasons for which requests finish."""
FAILURES = (RANK_LOST, GIVEN_UP)


def traces_endpoint(environment: MutableMapping[str, str]) -> str | None:
    """The endpoint, None where no traces are wanted.

    vLLM reads the protocol from the variable for traces only: what the one for all signals says is set there too.
    """
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    if (protocol := environment.get(ALL + "PROTOCOL")) is not None:
        environment.setdefault(TRACES + "PROTOCOL", protocol)
    if endpoint := environment.get(TRACES + "ENDPOINT"):
        return endpoint
    if not (base := environment.get(ALL + "ENDPOINT")):
        return None
    over_http = environment.get(TRACES + "PROTOCOL", "grpc").startswith("http")
    return base.rstrip("/") + "/v1/traces" if over_http else base
