"""The arithmetic of the elasticity benchmark. It measures nothing here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from bench import elasticity
from bench.changes import AFTER_S, BEFORE_S, Change, Kind, Seen, around, change_of, phases, seen, worst_delay
from bench.deployment import excluded, rejoined
from bench.elastic_bars import Bar, Throughput, bars
from bench.elastic_report import Report, render
from bench.elastic_run import Plan, Results, Windows
from bench.footprint import RANKS, Footprint, Process, descendants, lasting_growth, memory_growth, rank_growth, role_of
from bench.load import Outcome, Traffic, Window
from bench.machine import Machine
from elastic_daemon.drill.report import Delay
from tests.unit.drill_stream import stream_of as stream


def traffic(*waits: tuple[float, float, int]) -> Traffic:
    found = Traffic()
    for begin, end, count in waits:
        found.add(begin, end, count)
    return found


def event(name: str, time: float, **fields: Any) -> dict[str, Any]:
    return {"event": name, "time": time, **fields}


REJOIN: list[Mapping[str, Any]] = [
    event("rank_excluded", 100.04, rank=2),
    event("recovery_started", 100.04),
    event("recovery_done", 100.10, kind="shrink", seconds={"fence": 0.01, "total": 0.06}),
    event("rank_starting", 100.60, rank=2),
    event("rank_standby", 103.10, rank=2),
    event("recovery_started", 103.15),
    event("recovery_done", 103.20, kind="grow", seconds={"fence": 0.02, "total": 0.05}),
]


def test_longest_wait_counts_waits_that_lie_in_the_window_in_part() -> None:
    found = traffic((0.0, 1.0, 1), (0.5, 2.5, 1), (2.5, 2.9, 1), (4.0, 9.0, 1))
    assert found.longest_wait(Window(1.5, 2.0)) == 2.0  # it began before and ended after
    assert found.longest_wait(Window(2.6, 3.5)) == pytest.approx(0.4)
    assert found.longest_wait(Window(3.0, 3.9)) == 0.0
    assert found.longest_wait(Window(3.0, 4.1)) == 5.0


def test_rate_counts_tokens_by_their_arrival() -> None:
    found = traffic((0.0, 1.0, 1), (0.0, 1.5, 2), (1.0, 3.0, 4))
    assert found.rate(Window(1.0, 3.0)) == 3.0  # what came at 1.0 is of the window before
    with pytest.raises(ValueError, match="no rate"):
        found.rate(Window(1.0, 1.0))


def test_calm_windows_leave_out_the_rest() -> None:
    assert traffic((0.0, 0.4, 1), (0.4, 1.2, 1), (1.2, 2.2, 1)).windows(Window(0.0, 2.2), 1.0) == pytest.approx(
        [0.8, 1.0]
    )


def test_outcome_tells_lost_refused_and_changed_apart() -> None:
    outcome = Outcome()
    outcome.count(stream(1, 2), stream(1, 2))
    outcome.count(stream(1, 2), stream(1, error="ReadError: "))
    outcome.count(stream(1, 2), stream(error="503: try later"))
    outcome.count(stream(1, 2), stream(1, error="503 in the middle"))
    outcome.count(stream(1, 2), stream(1, 3))
    assert (outcome.streams, outcome.lost, outcome.refused, outcome.changed) == (5, 2, 1, 1)
    total = Outcome(1, 1)
    total.add(outcome)
    assert (total.streams, total.lost, len(total.examples)) == (6, 3, 4)


def rejoin(**changes: Any) -> Change:
    given = {"kind": Kind.REJOIN, "at": 50.0, "events": REJOIN, "clock_s": -50.0, "delays": []}
    return change_of(**{**given, **changes})


def test_change_from_the_daemons_events() -> None:
    change = rejoin(delays=[Delay(50.05, 0.004), Delay(52.0, 0.4), Delay(53.21, 0.03)])
    assert change.kinds == ("shrink", "grow")
    assert change.seconds == pytest.approx(3.2)
    assert change.delays == pytest.approx((0.004, 0.03))
    assert change.delay == 0.4
    assert phases(change) == pytest.approx({"until a start": 0.6, "start to standby": 2.5, "join": 0.1})
    replaced = phases(rejoin(kind=Kind.REPLACEMENT, at=48.0))
    assert replaced == pytest.approx(
        {"until the GPU is known": 0.6, "probation": 2.0, "start to standby": 2.5, "join": 0.1}
    )
    ((window, _),) = change.of_kind("grow")
    assert (window.since, window.until) == pytest.approx((53.15, 53.2))


def test_change_wants_a_regroup() -> None:
    with pytest.raises(ValueError, match="has not changed"):
        rejoin(events=REJOIN[:2])


def test_delay_of_a_timer_that_was_due_before_the_window_and_fired_after_it_counts() -> None:
    assert worst_delay([Delay(2.0, 1.5), Delay(0.9, 9.0), Delay(3.0, 0.1)], Window(1.0, 1.5)) == 1.5


def test_seen_by_clients() -> None:
    """10 tokens/s before the kill, 8 while the rank loads, a pause at the kill and a longer one at the join."""
    found = Traffic()
    for n in range(20):
        found.add(48 + (n - 0.5) / 10, 48 + (n + 0.5) / 10, 1)
    found.add(49.95, 50.17, 1)
    for n in range(20):
        found.add(50.6 + (n - 0.5) / 8, 50.6 + (n + 0.5) / 8, 1)
    found.add(53.1, 53.4, 1)
    one = seen(rejoin(), found)
    assert one.losses == pytest.approx((0.22,))
    assert one.joins == pytest.approx((0.3,))
    assert one.share == pytest.approx(0.8)
    assert one.whole == pytest.approx(0.3)
    assert [part["fence"] for part in (*one.shrinks, *one.grows)] == [0.01, 0.02]


def test_change_without_a_start_has_no_share() -> None:
    change = rejoin(kind=Kind.DOWN, events=REJOIN[1:3])
    assert change.starting is None
    one = seen(change, traffic((49.0, 49.9, 1)))
    assert one.share is None
    assert one.phases == {}


def test_window_around_a_regroup() -> None:
    assert around(Window(5.0, 6.0)) == Window(5.0 - BEFORE_S, 6.0 + AFTER_S)


def test_ends_of_changes_in_the_events() -> None:
    assert not excluded(2)(REJOIN[:2])
    assert excluded(2)(REJOIN[:3])
    assert not excluded(1)(REJOIN)
    assert not rejoined(2)(REJOIN[:6])
    assert rejoined(2)(REJOIN)
    assert not rejoined(1)(REJOIN)
    assert not rejoined(2)([REJOIN[-1], REJOIN[4]])  # it grew before the rank was there


def process(role: str, rss: int, sockets: frozenset[int] = frozenset(), **fields: Any) -> Process:
    return replace(Process(1, role, rss, rss // 2, 10, 3, sockets), **fields)


def abandoned_line(pid: int, count: int) -> str:
    return f'{{"pid": {pid}, "position": 0, "abandoned": {count}, "event": "group_abandoned", "level": "warning"}}'


def test_footprint_counts_by_role() -> None:
    processes = [process("supervisor", 100, frozenset({1, 2})), process(RANKS, 900, frozenset({2, 3}))]
    processes.append(process(RANKS, 800, frozenset({3, 4})))
    one = Footprint.of_processes(processes, listeners=frozenset({2, 4, 7}))
    assert one.counts[RANKS] == {"processes": 2, "descriptors": 20, "sockets": 3, "ports": 2, "threads": 6}
    assert (one.total("processes"), one.total("descriptors")) == (3, 30)
    assert (one.rss["supervisor"], one.pss["supervisor"]) == (100, 50)


def test_growth() -> None:
    before = Footprint.of_processes([process("zygote", 100), process(RANKS, 1)], frozenset())
    processes = [process("zygote", 350, threads=4), process(RANKS, 9, pid=8), process("", 1)]
    after = Footprint.of_processes(processes, frozenset())
    assert lasting_growth(before, after) == {"processes": 0, "descriptors": 0, "sockets": 0, "ports": 0, "threads": 1}
    assert rank_growth(before, after) == {"processes": 1, "descriptors": 10, "sockets": 0, "ports": 0, "threads": 3}
    assert memory_growth(before, after)["zygote"] == 250


def test_groups_that_living_ranks_have_abandoned_explain_growth() -> None:
    """The last line of each counts; one that has ended has taken its groups with it."""
    before = Footprint.of_processes([process(RANKS, 1, pid=7), process("supervisor", 1)], frozenset())
    log = "\n".join([abandoned_line(7, 2), abandoned_line(9, 4), abandoned_line(7, 1)])
    rank = process(RANKS, 1, pid=7, descriptors=27, threads=6)
    after = Footprint.of_processes([rank, process("supervisor", 1, descriptors=12)], frozenset(), log)
    assert after.abandoned == 1
    assert rank_growth(before, after) == {"processes": 0, "descriptors": 1, "sockets": -16, "ports": -1, "threads": -1}
    assert lasting_growth(before, after)["descriptors"] == 1  # its connection to the store is explained


@pytest.mark.parametrize(
    ("title", "role"),
    [
        ("python -m elastic_daemon.cli serve --port 0", "supervisor"),
        ("elastic-daemon: front end ", "front end"),
        ("elastic-daemon: zygote", "zygote"),
        ("elastic-daemon: rank 3", RANKS),
        ("python -m watchdog.cli run --runtime-dir /x", "watchdog"),
        ("sleep 5", ""),
    ],
)
def test_role_from_the_command_line(title: str, role: str) -> None:
    assert role_of(title) == role


def test_footprint_of_this_process() -> None:
    one = Process.of(os.getpid())
    assert one.rss >= one.pss > 0
    assert one.descriptors > 2
    assert os.getpid() in descendants(os.getpid())


def change(kind: Kind, **fields: Any) -> Seen:
    given: dict[str, Any] = {
        "kind": kind, "seconds": 4.0, "joins": (0.1,), "join_delays": (0.01,), "losses": (0.1,), "loss_delays": (0.01,),
        "settling": 0.08, "whole": 0.15, "delay": 0.02, "share": 0.8, "phases": {"join": 0.1},
        "grows": ({"fence": 0.01},),
    }  # fmt: skip
    return Seen(**{**given, **fields})


def results(**fields: Any) -> Results:
    footprint = Footprint.of_processes([process("zygote", 100)], frozenset())
    given: dict[str, Any] = {
        "model": "tiny-moe",
        "calm": [0.05, 0.06],
        "changes": [change(kind) for kind in Kind],
        "footprints": {"at the start": footprint, "after": footprint},
        "before": Windows([100.0, 102.0], [101.0, 100.0]),
        "after": Windows([100.0, 102.0], [101.0, 100.0]),
    }
    return Results(**{**given, **fields})


def test_all_bars_are_met_by_a_good_run() -> None:
    assert [bar.what for bar in bars(results()) if not bar.met] == []


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        (change(Kind.REJOIN, joins=(0.3,)), "rejoin: longest wait"),
        (change(Kind.REPLACEMENT, seconds=5.1), "replacement"),
        (change(Kind.DOWN, whole=0.21), "scale 4 -> 3"),
        (change(Kind.UP, joins=(0.6,)), "scale 3 -> 4: the same"),
        (change(Kind.UP, share=0.5), "tokens/s of the others"),
    ],
)
def test_bar_that_is_not_met(bad: Seen, name: str) -> None:
    """Beside nothing else of its kind, so that medians show it."""
    missed = [bar.what for bar in bars(results(changes=[bad])) if bar.value is not None and not bar.met]
    assert any(what.startswith(name) for what in missed)


def test_what_was_not_measured_is_not_met() -> None:
    assert not any(bar.met for bar in bars(Results()))
    assert not Bar("", None, 1).met
    assert Bar("", 0.0, 0).met
    assert Bar("", 0.97, 0.97, at_least=True).met
    assert not Bar("", 0.96, 0.97, at_least=True).met


def test_growth_is_a_bar() -> None:
    small, large = (Footprint.of_processes([process("zygote", rss)], frozenset()) for rss in (100, 100 + 17 * 1024))
    more = Footprint.of_processes([process("zygote", 100, threads=4)], frozenset())
    missed = [bar.what for bar in bars(results(footprints={"a": small, "b": large})) if not bar.met]
    assert len(missed) == 1 and missed[0].startswith("growth of memory")
    missed = [bar.what for bar in bars(results(footprints={"a": small, "b": more})) if not bar.met]
    assert len(missed) == 1 and "lasting processes" in missed[0]
    one, other = (Footprint.of_processes([process(RANKS, 1)] * number, frozenset()) for number in (4, 5))
    missed = [bar.what for bar in bars(results(footprints={"a": one, "b": other})) if not bar.met]
    assert len(missed) == 1 and "of ranks" in missed[0]


def test_throughput_of_pairs() -> None:
    """Windows in time: worn 98, alone 100, alone 110, worn 110, worn 99, alone 90."""
    windows = Windows([98.0, 110.0, 99.0], [100.0, 110.0, 90.0])
    one = Throughput.of(windows, windows)
    assert one is not None
    assert (one.pairs, one.before, one.after, one.ratio) == (3, 1.0, 1.0, 1.0)
    assert one.noise == pytest.approx(0.1)
    assert one.error == pytest.approx(0.0371 * 2**0.5, abs=1e-4)
    assert Throughput.of(Windows([1.0], []), windows) is None and Throughput.of(windows, Windows()) is None


def test_a_daemon_that_was_slower_from_the_start_is_not_worn() -> None:
    before, after = Windows([90.0, 90.0], [100.0, 100.0]), Windows([45.0, 45.0], [50.0, 50.0])
    one = Throughput.of(before, after)
    assert one is not None and one.ratio == pytest.approx(1.0)
    slower = Throughput.of(before, Windows([81.0, 81.0], [100.0, 100.0]))
    assert slower is not None and slower.ratio == pytest.approx(0.9)


def report(found: Results) -> Report:
    return Report(Machine(2, "CPU", 8.0, "6.1", "3.11", {"torch": "2"}), (1.0, 2.0), 2, 16, 60, 9.0, found)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"outcome": Outcome(9, lost=1, examples=["ReadError"])}, "1 of 9 streams lost"),
        ({"outcome": Outcome(9, refused=2)}, "2 of 9 streams refused"),
        ({"outcome": Outcome(9, changed=3)}, "3 of 9 streams changed"),
        ({"problems": ["it stood still"]}, "it stood still"),
        ({"changes": [change(Kind.REJOIN, joins=(9.0,))]}, None),
    ],
)
def test_verdict(changes: dict[str, Any], problem: str | None) -> None:
    problems = report(results(**changes)).problems
    assert not problems if problem is None else problem in problems


@pytest.mark.parametrize("found", [results(), Results(), results(after=Windows(), footprints={}, changes=[])])
def test_report_is_readable(found: Results) -> None:
    console = Console(width=220)
    with console.capture() as capture:
        console.print(render(report(found)))
    assert "elasticity benchmark passed" in capture.get()
    assert json.loads(json.dumps(report(found).to_json()))["passed"]


def test_quick_plan_is_smaller() -> None:
    quick, full = Plan.of(2, quick=True), Plan.of(10, quick=False)
    assert (full.rejoins, full.rounds, full.steps) == (20, 10, 10)
    assert (quick.rejoins, quick.rounds, quick.replacements) == (2, 2, 1)


@pytest.mark.parametrize("arguments", [["--cycles", "0"], ["--streams", "x"], ["--json", "/nowhere/at/all.json"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        elasticity.main(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err
