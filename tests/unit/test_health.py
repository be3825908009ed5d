"""`/health` as others parse it: field names and values are a contract."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from typing import Any

import pytest

from elastic_daemon.membership import RankState, Status
from elastic_daemon.protocol import HealthSnapshot, RankHealth, RecoveryKind, RecoveryReport, RequestCounts
from elastic_daemon.routes.health import HealthView, WatchdogView, url_of

REPORT = RecoveryReport(
    epoch=7,
    kind=RecoveryKind.SHRINK,
    ranks=(2,),
    cause="process ended",
    seconds={"detect": 0.0123456789, "total": 0.1},
    requests=RequestCounts(kept=9, replayed=3, restarted=1, lost=0),
)

SNAPSHOT = HealthSnapshot(
    status=Status.DEGRADED,
    reason="rank 2: process ended",
    doing="serving",
    epoch=7,
    target=4,
    active=3,
    expert_safety=1,
    survivable_losses=0,
    ranks=(
        RankHealth(0, RankState.ACTIVE, 100.0, None, 1),
        RankHealth(2, RankState.EXCLUDED, 160.5, "process ended", 3),
    ),
    last_recovery=REPORT,
    last_shrink=REPORT,
    last_grow=None,
    frontend_ready=True,
)


def view(snapshot: HealthSnapshot | None = SNAPSHOT) -> HealthView:
    return HealthView(
        snapshot=snapshot,
        model="tiny-moe",
        target=4,
        in_flight=12,
        in_flight_by_rank={0: 5, 2: 4},
        pids={(0, 1): 4711, (2, 2): 4712},
        epoch_start=1_700_000_000.0,
        url="http://127.0.0.1:8000",
    )


@pytest.mark.parametrize("status", Status)
def test_http_status(status: Status) -> None:
    serving = status in (Status.OK, Status.DEGRADED, Status.RECOVERING)
    assert view(dataclasses.replace(SNAPSHOT, status=status)).http_status == (200 if serving else 503)


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("frontend_ready", [True, False])
def test_ready_is_who_would_serve_or_hold_a_request(status: Status, frontend_ready: bool) -> None:
    shown = view(dataclasses.replace(SNAPSHOT, status=status, frontend_ready=frontend_ready))
    assert (shown.unready is None) is (frontend_ready and shown.http_status == 200)


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("frontend_ready", [True, False])
def test_nobody_is_ready_who_would_refuse_a_request(status: Status, frontend_ready: bool) -> None:
    snapshot = dataclasses.replace(SNAPSHOT, status=status, frontend_ready=frontend_ready)
    shown = dataclasses.replace(view(snapshot), refusing="9 requests wait already")
    assert shown.unready is not None
    assert shown.http_status == view(snapshot).http_status, "that is for /readyz only"


def test_why_it_is_not_ready() -> None:
    def why(refusing: str | None = None, **changes: Any) -> str | None:
        return dataclasses.replace(view(dataclasses.replace(SNAPSHOT, **changes)), refusing=refusing).unready

    assert why() is None
    assert why(refusing="9 requests wait already") == "9 requests wait already"
    assert why(frontend_ready=False) == "the front end is starting"
    assert why(status=Status.STOPPING, reason="stop requested") == "stop requested"
    assert why(status=Status.STOPPING, reason="") == "stopping"
    assert view(None).unready == "importing the engine"


def test_before_the_engine_is_known() -> None:
    starting = view(None)
    assert (starting.status, starting.http_status) == (Status.STARTING, 503)
    body = starting.to_json()
    assert (body["status"], body["epoch"], body["model"]) == ("starting", 0, "tiny-moe")
    assert body["reason"]
    assert body.keys() == view().to_json().keys(), "the same fields as later"
    assert body["data_parallel_size"] == {"target": 4, "active": 0}
    assert (body["expert_safety"], body["in_flight"], body["ranks"], body["last_recovery"]) == (None, 12, [], None)


def test_body() -> None:
    body = json.loads(json.dumps(view().to_json()))
    assert body.keys() == {
        "status",
        "reason",
        "doing",
        "epoch",
        "model",
        "url",
        "data_parallel_size",
        "expert_safety",
        "survivable_losses",
        "in_flight",
        "ranks",
        "watchdog",
        "last_recovery",
        "last_shrink",
        "last_grow",
    }
    assert (body["status"], body["reason"], body["epoch"]) == ("degraded", "rank 2: process ended", 7)
    assert body["data_parallel_size"] == {"target": 4, "active": 3}
    assert (body["expert_safety"], body["survivable_losses"], body["in_flight"]) == (1, 0, 12)
    assert body["url"] == "http://127.0.0.1:8000"
    assert body["watchdog"] == {"mode": "off", "state": "off", "pid": None, "reason": None}
    assert [rank["gpu"] for rank in body["ranks"]] == [None, None]


def test_gpus_and_a_watchdog_that_is_gone() -> None:
    watchdog = WatchdogView("spawn", "down", None, "the watchdog was killed by SIGKILL; it is started again")
    ranks = tuple(
        dataclasses.replace(rank, gpu=gpu) for rank, gpu in zip(SNAPSHOT.ranks, ("GPU-a", "GPU-b"), strict=True)
    )
    seen = dataclasses.replace(view(dataclasses.replace(SNAPSHOT, ranks=ranks)), watchdog=watchdog)
    body = seen.to_json()
    assert [rank["gpu"] for rank in body["ranks"]] == ["GPU-a", "GPU-b"]
    assert body["reason"] == "rank 2: process ended; the watchdog was killed by SIGKILL; it is started again"
    assert (body["status"], seen.http_status) == ("degraded", 200), "it does not change what clients get"
    assert body["watchdog"]["state"] == "down"


def test_requests_of_a_suspect_are_counted() -> None:
    suspect = dataclasses.replace(SNAPSHOT, ranks=(RankHealth(0, RankState.SUSPECT, 1.0, "straggler", 1),))
    assert view(suspect).to_json()["ranks"][0]["in_flight"] == 5


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("localhost", "http://localhost:80"),
    ],
)
def test_url_of(host: str, url: str) -> None:
    assert url_of(host, 80) == url


def test_ranks() -> None:
    active, excluded = view().to_json()["ranks"]
    assert active.keys() == {"rank", "state", "host", "gpu", "pids", "since", "reason", "in_flight"}
    assert (active["rank"], active["state"], active["pids"], active["in_flight"]) == (0, "active", [4711], 5)
    assert datetime.fromisoformat(active["since"]).timestamp() == 1_700_000_100.0
    assert active["reason"] is None
    assert excluded["pids"] == [], "the pid of another incarnation is not this one's"
    assert (excluded["state"], excluded["reason"]) == ("excluded", "process ended")
    assert excluded["in_flight"] == 0, "only an active rank computes requests"
    assert excluded["since"] == "2023-11-14T22:16:00.500+00:00"


def test_reports() -> None:
    body = view().to_json()
    assert body["last_recovery"] == {
        "epoch": 7,
        "kind": "shrink",
        "ranks": [2],
        "cause": "process ended",
        "seconds": {"detect": 0.012346, "total": 0.1},
        "requests": {"kept": 9, "replayed": 3, "restarted": 1, "lost": 0},
    }
    assert body["last_shrink"] == body["last_recovery"]
    assert body["last_grow"] is None


def test_a_recovery_without_front_end_has_no_counts() -> None:
    snapshot = dataclasses.replace(SNAPSHOT, last_recovery=dataclasses.replace(REPORT, requests=None))
    assert view(snapshot).to_json()["last_recovery"]["requests"] is None
