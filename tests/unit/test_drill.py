"""The parts of the drill that need no daemon: comparison, verdict, choice of the victim, arguments."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from elastic_daemon.cli import make_parser
from elastic_daemon.commands.operator_commands import Target
from elastic_daemon.drill.drill import (
    Daemon,
    Moment,
    Options,
    choose_ranks,
    parse_ranks,
    prompts_for,
    scheduling_probe,
)
from elastic_daemon.drill.report import (
    Delay,
    DrillResult,
    Run,
    Spread,
    Strike,
    compare,
    first_difference,
    percentile,
    render,
)
from elastic_daemon.errors import ConfigError
from tests.unit.drill_stream import stream


def test_equal_runs_are_the_same() -> None:
    comparison = compare([stream("a"), stream("b")], [stream("a", started=3.0), stream("b", arrivals=(9.0,))])
    assert comparison.same
    assert (comparison.streams, comparison.tokens_equal, comparison.usage_right) == (2, 2, 2)


@pytest.mark.parametrize(
    ("changed", "what", "position"),
    [
        ({"token_ids": (5, 9, 7)}, "token ids", 1),
        ({"token_ids": (5, 6)}, "token ids", 2),
        ({"token_ids": (5, 6, 7, 7)}, "token ids", 3),
        ({"text": "other"}, "texts", None),
        ({"completion_tokens": 4}, "usage counts", None),
        ({"completion_tokens": None}, "usage counts", None),
        ({"finish_reason": "stop"}, "finish reasons", None),
    ],
)
def test_each_change_is_found(changed: dict[str, Any], what: str, position: int | None) -> None:
    comparison = compare([stream("a"), stream("b")], [stream("a"), stream("b", **changed)])
    assert not comparison.same
    assert comparison.differences[0].stream == 1
    assert comparison.differences[0].what == what
    assert comparison.differences[0].position == position


def test_a_token_twice_is_wrong_in_tokens_and_usage() -> None:
    comparison = compare([stream()], [stream(token_ids=(5, 6, 6, 7))])
    assert [difference.what for difference in comparison.differences] == ["token ids", "usage counts"]
    assert comparison.tokens_equal == comparison.usage_right == 0


def test_usage_must_count_what_came_even_where_both_runs_agree() -> None:
    wrong = stream(completion_tokens=2)
    assert compare([wrong], [wrong]).usage_right == 0


def test_texts_are_compared_where_the_server_sends_no_token_ids() -> None:
    reference, same, other = (stream(token_ids=(), text=text) for text in ("abc", "abc", "abd"))
    assert compare([reference], [same]).same
    assert str(compare([reference], [other]).differences[0]) == "stream 0: texts differ: expected 'c', got 'd'"


def test_a_stream_with_an_error_is_lost_and_not_compared_further() -> None:
    comparison = compare([stream()], [stream(token_ids=(5,), error="503", completion_tokens=None)])
    assert comparison.lost == (0,)
    assert comparison.differences == ()
    assert not comparison.same


def test_runs_of_other_prompts_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="prompts"):
        compare([stream("a")], [stream("b")])


@pytest.mark.parametrize(("one", "other", "index"), [("", "", 0), ("ab", "ab", 2), ("ab", "b", 0), ("ab", "abc", 2)])
def test_first_difference(one: str, other: str, index: int) -> None:
    assert first_difference(one, other) == index


def test_longest_gap() -> None:
    seen = stream(arrivals=(1.0, 4.0, 4.5, 6.5))
    assert seen.longest_gap() == 3.0
    assert seen.longest_gap(since=4.2) == 2.0
    assert seen.longest_gap(since=5.0) == 2.0  # began before, ended after
    assert seen.longest_gap(since=7.0) == 0.0
    assert stream(arrivals=()).longest_gap() == 0.0


@pytest.mark.parametrize(("share", "value"), [(0.0, 1.0), (0.5, 2.0), (0.51, 3.0), (0.99, 4.0), (1.0, 4.0)])
def test_percentile(share: float, value: float) -> None:
    assert percentile([4.0, 2.0, 1.0, 3.0], share) == value


def test_spread_of_nothing() -> None:
    assert Spread.of([]) == Spread(0, 0.0, 0.0, 0.0)


def test_run_summary() -> None:
    run = Run.of([stream(started=1.0, ended=5.0), stream(ended=3.0, error="gone")], [Delay(0.0, 0.25), Delay(1.0, 0.5)])
    assert (run.seconds, run.tokens, run.errors, run.delays.max) == (5.0, 6, 1, 0.5)
    assert run.to_json()["tokens_per_second"] == 6 / 5


async def test_scheduling_probe_sees_a_blocked_loop() -> None:
    async with scheduling_probe() as delays:
        await asyncio.sleep(0.02)
        time.sleep(0.1)  # noqa: ASYNC251 (what the probe is there to see)
        await asyncio.sleep(0.02)
    assert max(delay.seconds for delay in delays) > 0.05


SHRINK = {
    "epoch": 2,
    "kind": "shrink",
    "ranks": [1],
    "cause": "rank 1: process ended",
    "seconds": {"detect": 0.0, "total": 0.03},
    "requests": {"kept": 1, "replayed": 1, "restarted": 0, "lost": 0},
}
STRIKE = Strike((1,), (4711,), 1.5, 3, 2, 0.004, Spread.of([0.2, 0.3]), Spread.of([0.001]))


def result(**changes: Any) -> DrillResult:
    streams = [stream("a"), stream("b")]
    health = {"status": "degraded", "data_parallel_size": {"target": 4, "active": 3}, "survivable_losses": 1}
    good = DrillResult(
        daemon="http://127.0.0.1:8000",
        model="tiny-moe",
        started_here=False,
        seed=7,
        before={**health, "status": "ok"},
        after=health,
        comparison=compare(streams, streams),
        reference=Run.of(streams, []),
        disturbed=Run.of(streams, []),
        strike=STRIKE,
        recoveries=(SHRINK,),
        stream_errors={},
    )
    return dataclasses.replace(good, **changes)


def shown(drilled: DrillResult) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render(drilled))
    return capture.get()


def test_a_drill_without_loss_passes() -> None:
    good = result()
    assert good.passed
    body = json.loads(json.dumps(good.to_json()))
    assert body["passed"] is True
    assert body["comparison"]["same"] is True
    assert body["recoveries"][0]["requests"]["replayed"] == 1
    assert body["strike"]["detection_s"] == 0.004
    text = shown(good)
    assert "drill passed: SIGKILL of rank 1 (pid 4711) 1.50 s into the run" in text
    assert "2 of 2 streams complete, 0 lost; tokens equal in 2, usage right in 2" in text
    assert "detection: 4.0 ms" in text


def _lost() -> dict[str, Any]:
    comparison = compare([stream("a"), stream("b")], [stream("a"), stream("b", error="503: no")])
    return {"comparison": comparison, "stream_errors": {1: "503: no"}}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (_lost(), "1 streams lost: 503: no"),
        ({"comparison": compare([stream()], [stream(token_ids=(1, 2, 3))])}, "token ids differ from token 0 on"),
        ({"reference": Run.of([stream(error="x")], [])}, "undisturbed run already"),
        ({"strike": None}, "ended before a rank was to be killed"),
        ({"strike": dataclasses.replace(STRIKE, streams=0)}, "no stream was running"),
        ({"recoveries": ()}, "reported no recovery"),
        ({"recoveries": (), "after": {"status": "gone", "data_parallel_size": None}}, "does not answer any more"),
        ({"recoveries": ({**SHRINK, "requests": {"kept": 1, "lost": 2}},)}, "reports 2 requests lost"),
    ],
)
def test_each_problem_fails_the_drill(changes: dict[str, Any], problem: str) -> None:
    bad = result(**changes)
    assert not bad.passed
    assert len(bad.problems) == 1
    assert problem in bad.problems[0]
    assert bad.to_json()["passed"] is False
    text = shown(bad)
    assert "drill failed" in text
    assert problem in text


def test_a_recovery_without_a_front_end_has_no_counts() -> None:
    assert result(recoveries=({**SHRINK, "requests": None},)).passed


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("0.5", Moment(share=0.5)),
        ("40%", Moment(share=0.4)),
        ("0", Moment(share=0.0)),
        ("2", Moment(seconds=2.0)),
        ("2.5s", Moment(seconds=2.5)),
        ("0.5s", Moment(seconds=0.5)),
    ],
)
def test_moment(text: str, moment: Moment) -> None:
    assert Moment.parse(text) == moment


@pytest.mark.parametrize("text", ["", "soon", "100%", "-1", "-0.1", "-1s", "nan", "inf", "nans", "infs", "s", "%"])
def test_moment_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--at"):
        Moment.parse(text)


def options(*command_line: str) -> Options:
    return Options.parse(make_parser().parse_args(["drill", *command_line]))


def test_arguments() -> None:
    defaults = options()
    assert (defaults.streams, defaults.tokens, defaults.kill, defaults.ranks) == (16, 200, (), None)
    given = options("--streams", "3", "--tokens", "9", "--kill", "0,2", "--at", "1s", "--ranks", "5", "--seed", "1")
    assert given == Options(defaults.target, 3, 9, (0, 2), Moment(seconds=1.0), 5, 1)
    assert options("--url", "http://h:1/").target.base_url == "http://h:1"


@pytest.mark.parametrize(
    ("command_line", "flag"),
    [
        (["--streams", "0"], "--streams"),
        (["--tokens", "-1"], "--tokens"),
        (["--ranks", "0"], "--ranks"),
        (["--ranks", "4", "--url", "http://h"], "--ranks"),
        (["--kill", "one"], "--kill"),
        (["--kill", "1,1"], "--kill"),
        (["--kill", ""], "--kill"),
        (["--at", "later"], "--at"),
    ],
)
def test_bad_arguments_name_the_flag(command_line: list[str], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        options(*command_line)


def test_parse_ranks() -> None:
    assert parse_ranks("2") == (2,)
    assert parse_ranks("3, 0") == (3, 0)


HEALTH = {
    "survivable_losses": 2,
    "ranks": [
        {"rank": 0, "state": "active", "pids": [10]},
        {"rank": 1, "state": "excluded", "pids": []},
        {"rank": 2, "state": "active", "pids": [12]},
        {"rank": 3, "state": "active", "pids": [13]},
    ],
}


def test_choice_of_the_victim() -> None:
    assert choose_ranks(HEALTH, (3, 0), seed=1) == (3, 0)
    chosen = {choose_ranks(HEALTH, (), seed) for seed in range(40)}
    assert chosen == {(0,), (2,), (3,)}
    assert choose_ranks(HEALTH, (), 5) == choose_ranks(HEALTH, (), 5)


@pytest.mark.parametrize(
    ("wanted", "why"), [((1,), "rank 1 is not active"), ((7,), "0, 2, 3"), ((0, 2, 3), "can lose 2")]
)
def test_who_cannot_be_killed(wanted: tuple[int, ...], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        choose_ranks(HEALTH, wanted, 0)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8123", None])
async def test_the_daemon_tells_where_it_serves(monkeypatch: pytest.MonkeyPatch, url: str | None) -> None:
    daemon = Daemon(Target(Path("/nowhere")), "")

    async def get(path: str) -> dict[str, Any]:
        return {"/health": {"status": "starting", "url": url}}[path]  # events may be gone: it keeps the latest only

    monkeypatch.setattr(daemon, "get", get)
    if url is not None:
        assert await daemon.find_url() == url
    else:
        with pytest.raises(ConfigError, match=r"/nowhere/http\.sock.*--url"):
            await daemon.find_url()
    await daemon.close()


def test_prompts_are_tasks_and_differ() -> None:
    prompts = prompts_for(20)
    assert prompts[0] == "count 2 to 176 by 1 ="
    assert len(set(prompts)) == 20
