"""The arithmetic of the recovery benchmark. It measures nothing here."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import recovery, stock_shim
from bench.machine import Machine
from bench.measure import FaultResult, Kill, Summary, Undisturbed, by_phase, client_gap, judge, outages, restart_ratio
from bench.ours import Ours
from bench.plan import LOSSES_PER_LIFE, RANKS, Fault, Phase, plan
from bench.report import Report, render
from bench.stock import COLD, PREIMPORTED, Failure, Start, Stock, judge_failure
from elastic_daemon.drill.report import Delay, Spread, StreamResult


def stream(*arrivals: float, started: float = 0.0, prompt: str = "a", **fields: Any) -> StreamResult:
    ids = tuple(range(len(arrivals)))
    result = StreamResult(
        prompt=prompt,
        token_ids=ids,
        text="x" * len(ids),
        finish_reason="length",
        completion_tokens=len(ids),
        error=None,
        started=started,
        ended=max(arrivals, default=started),
        arrivals=arrivals,
    )
    return replace(result, **fields)


def event(name: str, time: float, **fields: Any) -> dict[str, Any]:
    return {"event": name, "time": time, **fields}


def done(time: float) -> dict[str, Any]:
    return event("recovery_done", time, seconds={"resume": 0.01})


def fault_result(**fields: Any) -> FaultResult:
    result = FaultResult(
        life=1,
        fault=Fault(Phase.EARLY, (0,)),
        streams=2,
        lost=0,
        changed=0,
        differences=(),
        detections_s=(0.03,),
        gaps_s=(0.1, 0.15),
        calm_gap_s=0.05,
        resumed_s=0.08,
        outages_s=(0.09, 0.12),
        during=None,
        recoveries=({"seconds": {"fence": 0.01, "total": 0.05}},),
        probe=Spread.of([0.001, 0.004]),
    )
    return replace(result, **fields)


@pytest.mark.parametrize("kills", range(1, 41))
def test_plan_has_as_many_kills_as_asked_for(kills: int) -> None:
    lives = plan(kills)
    victims = [[rank for fault in life for rank in fault.ranks] for life in lives]
    assert sum(map(len, victims)) == kills
    assert all(1 <= len(life) <= LOSSES_PER_LIFE and len(set(life)) == len(life) for life in victims)


def test_full_plan_covers_all_ranks_and_phases() -> None:
    faults = [fault for life in plan(recovery.KILLS) for fault in life]
    assert {fault.phase for fault in faults} == set(Phase)
    ranks = Counter(rank for fault in faults for rank in fault.ranks)
    assert set(ranks) == set(range(RANKS))
    assert min(ranks.values()) >= 4
    assert len({fault.delay_s for fault in faults if fault.phase is Phase.IDLE}) > 2


def test_only_some_phases_kill_two() -> None:
    for fault in (fault for life in plan(40) for fault in life):
        assert len(fault.ranks) == (2 if fault.phase in (Phase.BOTH, Phase.DURING) else 1)


def test_wait_counts_silences_that_end_after_the_kill() -> None:
    assert client_gap(stream(1.0, 3.0, 3.5, 3.6), killed_at=3.2) == pytest.approx(0.5)


def test_wait_counts_the_first_token_from_its_request() -> None:
    assert client_gap(stream(1.0, 1.1, started=0.2), killed_at=0.5) == pytest.approx(0.8)
    assert client_gap(stream(1.0, 1.1, started=0.2), killed_at=1.05) == pytest.approx(0.1)


def test_outage_ends_with_the_first_token_after_the_group_resumes() -> None:
    late = stream(1.0, 2.001, 2.3, 2.4)  # the second was on its way when the rank was killed
    over = stream(1.0, 1.5)
    new = stream(2.5, started=2.1)
    assert outages([late, over, new], killed_at=2.0, resumed_at=2.05) == pytest.approx((0.3,))


def judged(streams: list[StreamResult], **changes: Any) -> FaultResult:
    given: dict[str, Any] = {
        "life": 1,
        "fault": Fault(Phase.EARLY, (2,)),
        "kills": [Kill(2, at=1.0, wall=101.0)],
        "reference": [stream(0.5, 0.6, 0.7)],
        "streams": streams,
        "delays": [Delay(0.9, 0.5), Delay(1.1, 0.002)],
        "events": [event("rank_excluded", 101.03, rank=2), done(101.05)],
        "reports": [{"epoch": 2, "seconds": {"total": 0.08}}],
    }
    return judge(**{**given, **changes})


def test_judge_of_a_good_run() -> None:
    result = judged([stream(0.9, 1.2, 1.3)])
    assert (result.lost, result.changed, result.problems) == (0, 0, ())
    assert result.detections_s == pytest.approx((0.03,))
    assert result.gap_s == pytest.approx(0.3)
    assert result.calm_gap_s == pytest.approx(0.1)
    assert result.outage_s == pytest.approx(0.2)
    assert result.resumed_s == pytest.approx(0.04)
    assert result.recompute_s == pytest.approx(0.16)
    assert result.probe.max == 0.002  # what was before the kill is not of this fault


def test_judge_of_lost_and_changed_streams() -> None:
    lost = judged([stream(0.9, error="500")])
    changed = judged([stream(0.9, 1.2, 1.3, token_ids=(0, 1, 9), text="xyz", finish_reason="stop")])
    assert (lost.lost, lost.changed) == (1, 0)
    assert "500" in lost.problems[0]
    assert (changed.lost, changed.changed) == (0, 1)  # one stream, however much of it differs


def test_judge_of_what_the_daemon_did_not_see() -> None:
    blind = judged([stream(0.9, 1.2, 1.3)], events=[], reports=[])
    assert blind.detections_s == (None,)
    assert len(blind.problems) == 2


def test_judge_when_the_second_signal_was_not_sent() -> None:
    result = judged([stream(0.9, 1.2, 1.3)], fault=Fault(Phase.DURING, (2, 3)))
    assert "only 1 of 2 signals" in result.problems[0]


@pytest.mark.parametrize(("end", "inside"), [(101.2, True), (101.05, False)])
def test_judge_tells_whether_the_second_kill_fell_into_the_recovery(end: float, inside: bool) -> None:
    events = [event("rank_excluded", 101.03, rank=2), event("rank_excluded", 101.12, rank=3)]
    events.append(done(end))
    kills = [Kill(2, 1.0, 101.0), Kill(3, 1.1, 101.1)]
    assert (
        judged([stream(0.9, 1.2, 1.3)], fault=Fault(Phase.DURING, (2, 3)), kills=kills, events=events).during is inside
    )


def test_first_tokens_count_in_the_undisturbed_run_where_they_do_after_the_kill() -> None:
    asked = [stream(1.2, 1.3, 1.4, started=1.01)]
    idle = judged(asked, fault=Fault(Phase.IDLE, (2,)))
    assert idle.calm_gap_s == pytest.approx(0.5)
    assert idle.gap_s == pytest.approx(0.19)
    assert idle.outage_s is None


def test_judge_wants_a_kill() -> None:
    with pytest.raises(ValueError, match="nobody"):
        judged([stream(0.9)], kills=[])


def test_summary_takes_the_worst_client_of_each_fault() -> None:
    results = [fault_result(), fault_result(gaps_s=(0.3, 0.01), outages_s=(), detections_s=(0.01, None), lost=1)]
    summary = Summary.of(results)
    assert (summary.faults, summary.kills, summary.lost) == (2, 3, 1)
    assert (summary.gaps.p50, summary.gaps.max) == (0.15, 0.3)
    assert summary.client_gaps.count == 4
    assert summary.detections == Spread.of([0.03, 0.01])
    assert summary.outages == Spread.of([0.12])
    assert summary.resumed.count == 2
    assert summary.recomputes.max == pytest.approx(0.04)
    assert summary.phases["total"] == Spread.of([0.05, 0.05])


def test_by_phase_leaves_out_what_did_not_happen() -> None:
    results = [fault_result(fault=Fault(Phase.IDLE, (1,))), fault_result()]
    assert list(by_phase(results)) == [Phase.EARLY, Phase.IDLE]


@pytest.mark.parametrize(("restart", "outage", "ratio"), [(40.0, 0.1, 400.0), (None, 0.1, None), (40.0, 0.0, None)])
def test_restart_ratio(restart: float | None, outage: float, ratio: float | None) -> None:
    assert restart_ratio(restart, outage) == (None if ratio is None else pytest.approx(ratio))


def test_undisturbed_run() -> None:
    run = Undisturbed.of([stream(0.5, 0.6), stream(0.7, 0.9, started=0.1, error="no")], [Delay(0, 0.003)])
    assert run.silences == pytest.approx((0.1, 0.2))
    assert run.first_tokens == pytest.approx((0.5, 0.6))
    assert (run.tokens, run.errors, run.probe_max_s) == (4, 1, 0.003)
    assert run.seconds == pytest.approx(0.9)


def failure(*results: StreamResult) -> Failure:
    reference = [stream(0.5, 0.6)] * len(results)
    return judge_failure("Worker", reference, 1.0, 3.0, results, {})


def test_failure_of_stock() -> None:
    found = failure(stream(0.9, error="500"), stream(0.9, ended=1.2), stream(0.8, 1.1), stream(0.8, 0.9))
    assert (found.running, found.lost, found.hanging) == (2, 2, 0)
    assert found.errors == {"500": 1, "incomplete, without an error; finish reason 'length'": 1}
    assert found.failed_s == pytest.approx(0.2)
    assert found.ended_s == 2.0


def test_hanging_stock() -> None:
    found = judge_failure("Worker", [stream(0.5, 0.6)] * 3, 1.0, None, None, {0: 2, 1: 1})
    assert (found.lost, found.hanging, found.failed_s, found.ended_s) == (2, 2, None, None)


def report(*results: FaultResult, kills: int = 1, stock: Stock | None = None) -> Report:
    machine = Machine(2, "CPU", 8.0, "6.1", "3.11", {"torch": "2"})
    ours = Ours([Undisturbed((0.1,), (0.2,), 1.0, 9, 0.001, 0)], list(results), [], "tiny-moe", [stream(0.5)])
    return Report(machine, (1.0, 2.0), kills, 2, 60, 9.0, ours, stock)


def stock_run() -> Stock:
    failure = Failure("Worker", 2, 2, 2, 0, {"500": 2}, 0.2, 2.0)
    starts = [Start(COLD, 41.0, 42.0), Start(PREIMPORTED, 5.0, 6.0)]
    return Stock("python", Start(COLD, 40.0, 41.0), [failure], starts, [stream(0.7)])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"lost": 1}, "1 streams lost"),
        ({"changed": 1, "differences": ("stream 3: texts differ",)}, "1 streams changed"),
        ({"gaps_s": (0.1, 0.21)}, "above 0.2 s"),
        ({"problems": ("the daemon reported no recovery",)}, "no recovery"),
    ],
)
def test_verdict(changes: dict[str, Any], problem: str | None) -> None:
    problems = report(fault_result(**changes)).problems
    assert (problem is None and not problems) or any(str(problem) in one for one in problems)


def test_missing_kills_are_a_failure() -> None:
    assert report(fault_result(), kills=2).problems == ("only 1 of 2 kills were measured",)
    assert report().problems


def test_report_with_stock() -> None:
    whole = report(fault_result(), stock=stock_run())
    assert whole.ratio(COLD) == pytest.approx(350)
    body = json.loads(json.dumps(whole.to_json()))
    assert body["passed"]
    assert body["ratios"] == {COLD: pytest.approx(350), PREIMPORTED: pytest.approx(50)}
    assert body["stock_tokens_equal"] == 1
    assert body["faults"][0]["fault"]["phase"] == "decode, early"


@pytest.mark.parametrize("stock", [None, stock_run(), Stock(problems=["it did not start"])])
def test_report_is_readable(stock: Stock | None) -> None:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render(report(fault_result(), stock=stock)))
    text = capture.get()
    assert "passed" in text
    assert ("350 (bar: 200), met" in text) == bool(stock is not None and stock.starts)


@pytest.mark.parametrize("arguments", [["--kills", "0"], ["--tokens", "5"], ["--json", "/nowhere/at/all.json"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        recovery.main(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_plugin_is_found_as_an_installed_one(tmp_path: Path) -> None:
    directory = stock_shim.plugin_directory(tmp_path / "plugin")
    (found,) = metadata.Distribution.discover(path=[str(directory)])
    (point,) = found.entry_points
    assert (point.group, point.load()) == ("vllm.general_plugins", stock_shim.register)
