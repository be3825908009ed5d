"""The supervisor's HTTP routes over a stub of the supervisor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import AsyncIterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.routing import Route

from elastic_daemon.app import make_control_app
from elastic_daemon.errors import ControlClosed
from elastic_daemon.membership import RankState, Status
from elastic_daemon.protocol import RecoveryKind, RecoveryReport, RequestCounts
from elastic_daemon.routes.control_routes import CONTROL_PATHS, CONTROL_TEMPLATES, is_control_path, is_order
from elastic_daemon.telemetry.events import KEPT
from tests.unit.supervised_plane import SNAPSHOT, Plane, asking


@pytest.fixture
def plane() -> Plane:
    return Plane()


@pytest.fixture
async def client(plane: Plane) -> AsyncIterator[httpx.AsyncClient]:
    async with asking(plane) as client:
        yield client


CODES = {
    Status.STARTING: 503,
    Status.OK: 200,
    Status.DEGRADED: 200,
    Status.RECOVERING: 200,
    Status.UNAVAILABLE: 503,
    Status.STOPPING: 503,
}


@pytest.mark.parametrize("status", Status)
async def test_health_and_readyz_of_each_status(plane: Plane, client: httpx.AsyncClient, status: Status) -> None:
    plane.snapshot = dataclasses.replace(SNAPSHOT, status=status)
    health = await client.get("/health")
    assert health.status_code == CODES[status]
    assert health.json() == plane.health().to_json()
    ready = await client.get("/readyz")
    assert ready.status_code == CODES[status]
    reason = None if CODES[status] == 200 else SNAPSHOT.reason
    assert ready.json() == {"ready": CODES[status] == 200, "status": status.value, "reason": reason}


async def test_nobody_is_ready_without_a_front_end(plane: Plane, client: httpx.AsyncClient) -> None:
    """Ranks live, so that it recovers soon; who asks meanwhile gets 503 at once, as a request does."""
    plane.snapshot = dataclasses.replace(SNAPSHOT, status=Status.RECOVERING, frontend_ready=False)
    assert (await client.get("/health")).status_code == 200
    ready = await client.get("/readyz")
    reason = "the front end is starting"
    assert (ready.status_code, ready.json()) == (503, {"ready": False, "status": "recovering", "reason": reason})
    assert (await client.head("/readyz")).status_code == 503
    assert (await client.post("/v1/completions", json={})).status_code == 503


async def test_nobody_is_ready_while_a_request_would_be_refused(plane: Plane, client: httpx.AsyncClient) -> None:
    plane.refusing = "4096 requests wait already, and no more may"
    ready = await client.get("/readyz")
    assert (ready.status_code, ready.json()) == (503, {"ready": False, "status": "ok", "reason": plane.refusing})
    assert (await client.get("/health")).status_code == 200
    plane.refusing = None
    assert (await client.get("/readyz")).json() == {"ready": True, "status": "ok", "reason": None}


async def test_before_the_engine_is_known(plane: Plane, client: httpx.AsyncClient) -> None:
    plane.snapshot = None
    assert (await client.get("/health")).status_code == 503
    ready = await client.get("/readyz")
    assert ready.json() == {"ready": False, "status": "starting", "reason": "importing the engine"}
    metrics = await client.get("/metrics")
    assert metrics.status_code == 200
    families = {family.name: family for family in text_string_to_metric_families(metrics.text)}
    assert math.isnan(families["elastic_expert_safety"].samples[0].value), "0 would say that a loss costs a disk read"
    assert (await client.get("/livez")).status_code == 200


async def test_livez_follows_the_control_loop_only(plane: Plane, client: httpx.AsyncClient) -> None:
    plane.snapshot = dataclasses.replace(SNAPSHOT, status=Status.UNAVAILABLE)
    assert (await client.get("/livez")).status_code == 200
    plane.is_turning = False
    plane.snapshot = SNAPSHOT
    stuck = await client.get("/livez")
    assert (stuck.status_code, stuck.json()) == (503, {"turning": False})


async def test_expert_safety_before_the_first_placement(plane: Plane, client: httpx.AsyncClient) -> None:
    plane.snapshot = dataclasses.replace(SNAPSHOT, expert_safety=None)
    assert "\nelastic_expert_safety NaN\n" in (await client.get("/metrics")).text
    plane.snapshot = SNAPSHOT
    assert "\nelastic_expert_safety 1.0\n" in (await client.get("/metrics")).text


async def test_metrics_parse_and_agree_with_health(plane: Plane, client: httpx.AsyncClient) -> None:
    plane.metrics.recovery(
        RecoveryReport(
            3, RecoveryKind.SHRINK, (2,), "killed", {"detect": 0.02, "total": 0.3}, RequestCounts(4, 2, 1, 0)
        )
    )
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert samples["elastic_epoch", ()] == 3
    assert samples["elastic_expert_safety", ()] == 1
    assert samples["elastic_in_flight", ()] == 5
    assert {state.value: samples["elastic_ranks", (("state", state.value),)] for state in RankState} == {
        state.value: 2.0 if state is RankState.ACTIVE else 0.0 for state in RankState
    }
    assert samples["elastic_requests_preserved_total", (("how", "kept"),)] == 4
    assert samples["elastic_requests_preserved_total", (("how", "replayed"),)] == 2
    assert samples["elastic_requests_preserved_total", (("how", "restarted"),)] == 1
    assert samples["elastic_requests_lost_total", ()] == 0
    labels = (("kind", "shrink"), ("phase", "total"))
    assert samples["elastic_recovery_seconds_count", labels] == 1
    assert samples["elastic_recovery_seconds_sum", labels] == pytest.approx(0.3)
    assert all(name.startswith("elastic_") for name, _ in samples)


async def test_events_since(plane: Plane, client: httpx.AsyncClient) -> None:
    for number in range(3):
        plane.events.record("counted", {"number": number, "kind": RecoveryKind.SHRINK})
    everything = (await client.get("/events")).json()
    assert [(e["id"], e["event"], e["number"], e["kind"]) for e in everything] == [
        (1, "counted", 0, "shrink"),
        (2, "counted", 1, "shrink"),
        (3, "counted", 2, "shrink"),
    ]
    assert [e["time"] for e in everything] == sorted(e["time"] for e in everything)
    assert [e["id"] for e in (await client.get("/events", params={"since": 2})).json()] == [3]
    assert (await client.get("/events", params={"since": 3})).json() == []
    assert (await client.get("/events", params={"since": "x"})).status_code == 422
    assert [e["id"] for e in (await client.get("/events", params={"last": 2})).json()] == [2, 3]
    assert [e["id"] for e in (await client.get("/events", params={"since": 2, "last": 2})).json()] == [3]
    assert {(await client.get("/events", params={"last": last})).status_code for last in (0, -1, "x", 2001)} == {422}


async def test_events_are_kept_up_to_a_limit(plane: Plane, client: httpx.AsyncClient) -> None:
    for number in range(KEPT + 5):
        plane.events.record("counted", {"number": number})
    kept = (await client.get("/events")).json()
    assert (len(kept), kept[0]["id"], kept[-1]["id"]) == (KEPT, 6, KEPT + 5)


async def test_experts(plane: Plane, client: httpx.AsyncClient) -> None:
    plane.answers["column"] = {0: [[0, 1]], 3: [[2, 0]]}
    assert (await client.get("/experts")).json() == {"ranks": {"0": [[0, 1]], "3": [[2, 0]]}}


async def test_verify_experts(plane: Plane, client: httpx.AsyncClient) -> None:
    plane.answers["wrong_slots"] = {0: [], 1: []}
    assert (await client.get("/experts/verify")).json() == {"ok": True, "wrong_slots": {"0": [], "1": []}}
    plane.answers["wrong_slots"] = {0: [], 1: [[2, 7, 5]]}
    assert (await client.get("/experts/verify")).json() == {"ok": False, "wrong_slots": {"0": [], "1": [[2, 7, 5]]}}


@pytest.mark.parametrize("path", ["/experts", "/experts/verify"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ControlClosed("rank 2 ended before it answered"), "rank 2 ended"),
        (RuntimeError("rank 1: OSError: no checkpoint"), "rank 1: OSError"),
        (TimeoutError(), "in time"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_ranks_that_cannot_answer(
    plane: Plane, client: httpx.AsyncClient, path: str, error: Exception, message: str
) -> None:
    plane.answers = {"column": error, "wrong_slots": error}
    answer = await client.get(path)
    assert answer.status_code == 503
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/health", "/livez", "/readyz", "/metrics"])
async def test_probes_with_head(plane: Plane, client: httpx.AsyncClient, path: str) -> None:
    assert (await client.head(path)).status_code == 200
    plane.snapshot, plane.is_turning = None, False
    assert (await client.head(path)).status_code == (200 if path == "/metrics" else 503)


ALLOWED = {
    **dict.fromkeys(CONTROL_PATHS | CONTROL_TEMPLATES, "GET"),
    **dict.fromkeys(("/health", "/livez", "/readyz", "/metrics", "/dashboard", "/dashboard/{file}"), "GET, HEAD"),
    "/automation": "GET, POST",
    "/scale_elastic_ep": "POST",
    "/is_scaling_elastic_ep": "POST",
    "/ranks/{rank}/exclude": "POST",
    "/ranks/{rank}/drain": "POST",
    "/ranks/{rank}/release": "POST",
    "/gpus/{uuid}/release": "POST",
}


@pytest.mark.parametrize("template", sorted(ALLOWED))
async def test_other_methods_on_control_paths(client: httpx.AsyncClient, template: str) -> None:
    path = template.replace("{", "").replace("}", "")
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        if method in ALLOWED[template].split(", "):
            continue
        answer = await client.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, ALLOWED[template]), method


@pytest.mark.parametrize("path", ["/ranks/1/restart", "/gpus/GPU-1/exclude"])
async def test_what_looks_like_a_control_path_but_is_none(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.post(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, 404)


def test_all_routes_are_known_as_control_paths(plane: Plane) -> None:
    paths = {route.path for route in make_control_app(plane).routes if isinstance(route, Route)}
    assert paths - {"/{path:path}"} == CONTROL_PATHS | CONTROL_TEMPLATES
    assert all(is_control_path(path.replace("{", "").replace("}", "")) for path in CONTROL_PATHS | CONTROL_TEMPLATES)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/",
        "/operations/",
        "/operations/a/b",
        "/dashboard/",
        "/dashboard/a/b",
        "/dashboard/../events",
        "/operations/../scale_elastic_ep",
        "/operations/..",
        "/operations/.",
        "/ranks/1",
        "/ranks/../drain",
        "/ranks/1/..",
        "/ranks/1/drain/",
        "/gpus/a b/release",
        "/gpus/a\n/release",
        "/gpus/a\n",
        "/operations/a?b",
        "/operations/a#b",
        "/operations/a%2fb",
        "/scale_elastic_ep/",
        "//scale_elastic_ep",
    ],
)
def test_other_paths_are_none(path: str) -> None:
    assert not is_control_path(path)


def test_whatever_may_change_something_is_an_order() -> None:
    read = {"/health", "/livez", "/readyz", "/metrics", "/events", "/experts", "/experts/verify", "/operations"}
    read |= {"/placement", "/recoveries", "/totals", "/dashboard"}
    for path in CONTROL_PATHS | CONTROL_TEMPLATES:
        for method in ("POST", "PUT", "DELETE", "PATCH", "TRACE", "MADE-UP"):
            assert is_order(method, path.replace("{", "").replace("}", "")) is (
                path not in read | {"/is_scaling_elastic_ep"}
            )
        for method in ("GET", "HEAD", "OPTIONS"):
            assert not is_order(method, path)
    assert not is_order("POST", "/v1/completions")


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/openapi.json", "/docs", "/v1/models", "/v1/chat/completions", "/invocations"])
async def test_what_only_a_front_end_serves(plane: Plane, client: httpx.AsyncClient, method: str, path: str) -> None:
    plane.snapshot = dataclasses.replace(SNAPSHOT, status=Status.UNAVAILABLE, reason="expert 3 has no slot")
    answer = await client.request(method, path, content=b"{}")
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    if method == "HEAD":
        return
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("ServiceUnavailableError", 503)
    assert "expert 3 has no slot" in error["message"]
