"""The parts of the drill that need no daemon: comparison, verdict, choice of the victim, arguments."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import re
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from elastic_daemon.cli import make_parser
from elastic_daemon.client_tls import client_tls
from elastic_daemon.drill import (
    Daemon,
    Display,
    Fault,
    Moment,
    Options,
    Victim,
    _watched_run,
    choose_ranks,
    parse_ranks,
    prompts_for,
    run_streams,
    scheduling_probe,
    victims_of,
)
from elastic_daemon.drill_report import (
    Delay,
    DrillResult,
    Run,
    Spread,
    StreamResult,
    Strike,
    compare,
    first_difference,
    percentile,
    render,
)
from elastic_daemon.errors import ConfigError
from elastic_daemon.operator_commands import Target
from tests.certificates import issued


def stream(prompt: str = "p", tokens: tuple[int, ...] = (5, 6, 7), **changes: Any) -> StreamResult:
    """An undisturbed stream with one token a second."""
    whole = StreamResult(
        prompt=prompt,
        token_ids=tokens,
        text="".join(chr(97 + token) for token in tokens),
        finish_reason="length",
        completion_tokens=len(tokens),
        error=None,
        started=0.0,
        ended=float(len(tokens)),
        arrivals=tuple(float(second) for second in range(1, len(tokens) + 1)),
    )
    return dataclasses.replace(whole, **changes)


# --- comparison -------------------------------------------------------------------------------------------------------


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


# --- numbers ----------------------------------------------------------------------------------------------------------


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


# --- verdict ----------------------------------------------------------------------------------------------------------


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


# --- arguments --------------------------------------------------------------------------------------------------------


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


# --- the fault --------------------------------------------------------------------------------------------------------


SLEEPER = "import setproctitle, sys, time; setproctitle.setproctitle(sys.argv[1]); print(flush=True); time.sleep(60)"


@pytest.fixture
def start_process() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(title: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", SLEEPER, title], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_victim_is_killed(start_process: Callable[[str], subprocess.Popen[bytes]]) -> None:
    process = start_process("elastic-daemon: rank 3")
    health = {"ranks": [{"rank": 3, "pids": [process.pid]}, {"rank": 4, "pids": [1]}]}
    with victims_of(health, [3]) as (victim,):
        victim.kill()
        assert process.wait(10) == -9
        victim.kill()  # gone already: no error


@pytest.mark.parametrize("title", ["elastic-daemon: rank 2", "elastic-daemon: rank 31", "something else"])
def test_no_other_process_is_killed(title: str, start_process: Callable[[str], subprocess.Popen[bytes]]) -> None:
    process = start_process(title)
    with pytest.raises(ConfigError, match="is not rank 3 on this machine"):
        Victim(3, [process.pid])
    assert process.poll() is None


def test_victim_without_process() -> None:
    with pytest.raises(ConfigError, match="no process"):
        Victim(3, [])
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(ConfigError, match="rank 3: its process"):
        Victim(3, [gone.pid])


class Recorder(Victim):
    def __init__(self, rank: int) -> None:
        self.rank, self.pids, self.kills = rank, (os.getpid(),), 0

    def kill(self) -> None:
        self.kills += 1


def test_fault_strikes_once_at_its_share_of_the_tokens() -> None:
    victim = Recorder(2)
    fault = Fault([victim], Moment(share=0.4), all_tokens=10)
    for tokens in (1, 2):
        fault.token(tokens)
    assert victim.kills == 0
    assert fault.report([stream()], [], []) is None
    for _ in range(5):
        fault.token(1)
    assert victim.kills == 1
    assert fault.seen == 4


async def test_fault_strikes_after_seconds() -> None:
    victim = Recorder(2)
    fault = Fault([victim], Moment(seconds=0.01), all_tokens=10)
    fault.run_begins()
    fault.token(9)
    assert victim.kills == 0
    await asyncio.sleep(0.1)
    assert victim.kills == 1


async def test_fault_that_comes_too_late_strikes_nobody() -> None:
    victim = Recorder(2)
    fault = Fault([victim], Moment(seconds=0.05), all_tokens=10)
    fault.run_begins()
    fault.run_ended()
    await asyncio.sleep(0.1)
    assert victim.kills == 0


def test_report_of_the_fault() -> None:
    fault = Fault([Recorder(1), Recorder(2)], Moment(), 10)
    fault.at, fault.wall_time, fault.seen = 2.0, 1000.0, 5
    streams = [stream(arrivals=(1.0, 1.5, 4.0)), stream(ended=1.0)]
    delays = [Delay(1.0, 0.9), Delay(3.0, 0.1)]
    events = [
        {"event": "rank_excluded", "rank": 1, "time": 1000.01},
        {"event": "rank_fault", "rank": 2, "time": 1000.02},
    ]
    strike = fault.report(streams, delays, events)
    assert strike is not None
    assert (strike.ranks, strike.streams, strike.at_s, strike.detection_s) == ((1, 2), 1, 2.0, None)
    assert (strike.gaps.max, strike.delays.max) == (2.5, 0.1)
    strike = fault.report(streams, delays, [*events, {"event": "rank_excluded", "rank": 2, "time": 1000.25}])
    assert strike is not None
    assert strike.detection_s == pytest.approx(0.25)


# --- streams ----------------------------------------------------------------------------------------------------------


def chunk(token: int, finish: str | None = None) -> str:
    return json.dumps({"choices": [{"text": chr(token), "token_ids": [token], "finish_reason": finish}]})


USAGE = json.dumps({"choices": [], "usage": {"completion_tokens": 2}})
GOOD = [chunk(97), chunk(98, "length"), USAGE, "[DONE]"]


@contextlib.asynccontextmanager
async def answering(status: str, lines: list[str], tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The port of a server that sends these events to whoever asks, and hangs up."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = "".join(f"data: {line}\n\n" for line in lines)
        writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n{body}".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=tls) as server:
        yield server.sockets[0].getsockname()[1]


async def answered(status: str, lines: list[str]) -> tuple[StreamResult, list[tuple[int, int]]]:
    """One stream against such a server."""
    tokens: list[tuple[int, int]] = []
    async with answering(status, lines) as port:
        url = f"http://127.0.0.1:{port}"
        (seen,) = await run_streams(url, ["p"], 2, lambda number, count: tokens.append((number, count)))
    return seen, tokens


async def test_stream_is_read() -> None:
    seen, tokens = await answered("200 OK", GOOD)
    assert seen.error is None
    assert (seen.token_ids, seen.text, seen.finish_reason, seen.completion_tokens) == ((97, 98), "ab", "length", 2)
    assert tokens == [(0, 1), (0, 1)]
    assert seen.started <= seen.arrivals[0] <= seen.arrivals[1] <= seen.ended


@pytest.mark.parametrize(
    ("status", "lines", "error"),
    [
        ("503 Busy", ["no capacity"], "503: data: no capacity"),
        ("200 OK", GOOD[:2], r"without \[DONE\]"),
        ("200 OK", [GOOD[0], '{"error": {"message": "gone"}}', "[DONE]"], "gone"),
        ("200 OK", ["{"], "not a completion stream"),
    ],
)
async def test_streams_that_fail_say_why(status: str, lines: list[str], error: str) -> None:
    seen, _ = await answered(status, lines)
    assert seen.error is not None
    assert re.search(error, seen.error)


async def test_streams_of_a_daemon_with_a_private_authority(tmp_path: Path) -> None:
    made = issued(tmp_path)
    (server := ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)).load_cert_chain(made.cert, made.key)
    console = Console(file=io.StringIO())
    async with answering("200 OK", GOOD, server) as port:
        for authority, error in ((made.authority, None), (None, "CERTIFICATE_VERIFY_FAILED")):
            target = Target(tmp_path, f"https://localhost:{port}", client_tls({}, authority))
            daemon = Daemon(target, target.base_url)
            options = Options(target, streams=1, tokens=2)
            (seen,), _, _ = await _watched_run(daemon, Display(console), "undisturbed", options, ["p"], None)
            assert seen.error is None if error is None else error in str(seen.error)
            await daemon.close()


async def test_stream_without_server() -> None:
    (seen,) = await run_streams("http://127.0.0.1:1", ["p"], 2)
    assert seen.error is not None
    assert seen.error.startswith("ConnectError")
