"""The metrics that others rely on: names, types and labels, in one list, and what they say."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from elastic_daemon.app import make_control_app
from elastic_daemon.config import Settings
from elastic_daemon.membership import Status
from elastic_daemon.protocol import RecoveryKind, RecoveryReport, RequestCounts
from elastic_daemon.routes.health import HealthView, WatchdogView
from elastic_daemon.routes.recovery_history import KEPT
from elastic_daemon.supervisor import Supervisor
from elastic_daemon.telemetry import exposition
from elastic_daemon.telemetry.client_gaps import ClientGaps
from elastic_daemon.telemetry.loop_lag import watch_lag
from elastic_daemon.telemetry.metrics import Metrics
from tests.unit.operator_plane import OperatorPlane

EXPORTED = {
    "elastic_client_gap_seconds": ("histogram", ()),
    "elastic_control_loop_lag_seconds": ("histogram", ()),
    "elastic_epoch": ("gauge", ()),
    "elastic_event_streams": ("gauge", ()),
    "elastic_event_streams_dropped_total": ("counter", ()),
    "elastic_expert_load_bytes_total": ("counter", ("source",)),
    "elastic_expert_load_seconds_total": ("counter", ("source",)),
    "elastic_expert_safety": ("gauge", ()),
    "elastic_in_flight": ("gauge", ()),
    "elastic_ranks": ("gauge", ("state",)),
    "elastic_ranks_wanted": ("gauge", ()),
    "elastic_recovery_seconds": ("histogram", ("kind", "phase")),
    "elastic_requests_lost_total": ("counter", ()),
    "elastic_requests_refused_total": ("counter", ()),
    "elastic_requests_preserved_total": ("counter", ("how",)),
    "elastic_status": ("gauge", ("status",)),
    "elastic_survivable_losses": ("gauge", ()),
    "elastic_watchdog_up": ("gauge", ()),
    "elastic_watchdog_verdicts_total": ("counter", ("signal", "verdict")),
}

VIEW = HealthView(None, "m", 4, 0, {}, {}, 0.0)


def _rendered(metrics: Metrics, view: HealthView = VIEW) -> dict[tuple[str, str], float]:
    """Name and value of the only label, if any -> value."""
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(metrics.render(view))
        for sample in family.samples
    }


def test_all_are_there_and_no_others() -> None:
    collectors: Any = Metrics()._text._registry._collector_to_names
    found = {
        collector._name + "_total" * (collector._type == "counter"): (collector._type, tuple(collector._labelnames))
        for collector in collectors
    }
    assert found == EXPORTED


def test_none_of_them_takes_the_slow_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which costs a millisecond of the control loop for a dozen metrics."""
    metrics = Metrics()
    metrics.verdict("xid", "failed")
    metrics.moved(2)
    metrics.client_gap(0.1)

    def slow(_: object) -> bytes:
        raise AssertionError("left to the library")

    monkeypatch.setattr(exposition, "generate_latest", slow)
    assert "elastic_watchdog_verdicts_total" in metrics.render(VIEW)


def test_what_is_there_before_the_engine_is_known() -> None:
    samples = _rendered(Metrics())
    assert samples["elastic_ranks_wanted", ""] == 4
    assert samples["elastic_status", "starting"] == 1
    assert sum(samples["elastic_status", status.value] for status in Status) == 1
    assert str(samples["elastic_survivable_losses", ""]) == "nan"
    assert samples["elastic_watchdog_up", ""] == 1, "nobody is to watch"


def test_a_watchdog_that_is_missing() -> None:
    view = HealthView(None, "m", 4, 0, {}, {}, 0.0, watchdog=WatchdogView("spawn", "down", None, "it is gone"))
    assert _rendered(Metrics(), view)["elastic_watchdog_up", ""] == 0


def test_gaps_come_from_the_front_end(tmp_path: Any) -> None:
    supervisor = Supervisor(Settings(runtime_dir=tmp_path))
    peer: Any = object()
    supervisor._frontend._peer = peer
    supervisor._frontend.hear(
        peer,
        {"type": "stats", "in_flight": 2, "by_rank": {"0": 2}, "refused": 1, "refusing": None, "gaps": [0.12, 3.0]},
    )
    samples = _rendered(supervisor.metrics)
    assert samples["elastic_client_gap_seconds_count", ""] == 2
    assert samples["elastic_client_gap_seconds_bucket", "0.15"] == 1
    assert samples["elastic_client_gap_seconds_sum", ""] == pytest.approx(3.12)


async def test_lag_of_a_loop_that_was_held_up() -> None:
    lags: list[float] = []
    watching = asyncio.create_task(watch_lag(lags.append, 0.01))
    await asyncio.sleep(0.05)
    time.sleep(0.2)  # noqa: ASYNC251
    await asyncio.sleep(0.03)
    watching.cancel()
    assert len(lags) > 2
    assert max(lags) > 0.15
    assert min(lags) >= 0


def test_a_gap_lasts_from_the_last_token_before_to_the_first_after() -> None:
    gaps = ClientGaps()
    assert gaps.delivered("a", 1.0) is None
    assert gaps.delivered("a", 1.1) is None
    gaps.interrupt(["a"])
    assert gaps.delivered("a", 1.5) == pytest.approx(0.4)
    assert gaps.delivered("a", 1.6) is None, "it was closed"


def test_two_changes_in_one_silence_are_one_gap() -> None:
    gaps = ClientGaps()
    gaps.delivered("a", 1.0)
    gaps.interrupt(["a"])
    gaps.interrupt(["a"])
    assert gaps.delivered("a", 3.0) == 2.0
    assert gaps.delivered("a", 4.0) is None


def test_no_gap_without_a_token_before_it_or_after_it() -> None:
    gaps = ClientGaps()
    gaps.interrupt(["new"])
    assert gaps.delivered("new", 1.0) is None
    gaps.delivered("gone", 1.0)
    gaps.interrupt(["gone"])
    gaps.forget("gone")
    gaps.delivered("gone", 5.0)  # another request of the same name
    assert gaps.delivered("gone", 6.0) is None


async def test_totals_agree_with_the_metrics() -> None:
    """And go on where `/recoveries` forgets: they never fall."""
    plane = OperatorPlane()
    for epoch in range(2 * KEPT):
        counts = RequestCounts(3, 2, 1, epoch % 2)
        report = RecoveryReport(epoch, RecoveryKind.SHRINK, (2,), "killed", {"total": 0.05}, counts)
        plane.metrics.recovery(report)
        plane.recoveries.record(report, 3, 1e9)
    plane.metrics.moved(5)
    plane.metrics.lost(7)  # with a front end
    plane.metrics.refused(4)
    for seconds in (0.004, 0.12, 0.12, 700.0):
        plane.metrics.client_gap(seconds)
    app = make_control_app(plane)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://daemon") as client:
        answer = await client.get("/totals")
        told = answer.json()
        remembered = (await client.get("/recoveries")).json()
    assert len(answer.content) < 1000, "it is asked for again and again"
    samples = _rendered(plane.metrics)
    requests = told["requests"]
    assert requests == {
        **{how: samples["elastic_requests_preserved_total", how] for how in ("kept", "replayed", "restarted", "moved")},
        "lost": samples["elastic_requests_lost_total", ""],
        "refused": samples["elastic_requests_refused_total", ""],
    }
    assert requests["kept"] == 6 * KEPT > sum(row["requests"]["kept"] for row in remembered)
    assert requests["lost"] == KEPT + 7
    gap = told["client_gap"]
    name = "elastic_client_gap_seconds"
    assert gap["buckets"] == {le: value for (sample, le), value in samples.items() if sample == f"{name}_bucket"}
    assert (gap["count"], gap["sum"]) == (samples[f"{name}_count", ""], samples[f"{name}_sum", ""]) == (4, 700.244)
    assert (gap["buckets"]["0.01"], gap["buckets"]["0.15"], gap["buckets"]["+Inf"]) == (1, 3, 4)


def test_totals_of_nothing() -> None:
    """Asking leaves no trace in the metrics."""
    metrics = Metrics()
    before = metrics.render(VIEW)
    told = metrics.totals()
    assert set(told["requests"].values()) == {0} and told["client_gap"]["count"] == 0
    assert metrics.render(VIEW) == before
