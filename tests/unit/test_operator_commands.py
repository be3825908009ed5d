"""The operator's commands against the real control application, with a plane that says what the test wants."""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from elastic_daemon.cli import make_parser
from elastic_daemon.commands import operator_commands
from elastic_daemon.commands.operator_commands import Target, age, describe_recovery, follow, format_event, status_view
from elastic_daemon.errors import DaemonUnreachable
from elastic_daemon.membership import RankState, Status
from elastic_daemon.protocol import HealthSnapshot, RankHealth, RecoveryKind, RecoveryReport, RequestCounts
from elastic_daemon.routes.health import HealthView
from tests.unit.command_line import Server, run, serving
from tests.unit.operator_plane import OperatorPlane

SHRINK = RecoveryReport(
    epoch=7,
    kind=RecoveryKind.SHRINK,
    ranks=(2,),
    cause="rank 2: process ended",
    seconds={"detect": 0.0012, "fence": 0.002, "total": 0.0884},
    requests=RequestCounts(kept=9, replayed=3, restarted=0, lost=0),
)


class Plane(OperatorPlane):
    """A control plane with a fixed status."""

    def __init__(self, status: Status | None = Status.DEGRADED) -> None:
        super().__init__()
        self.status = status

    def health(self) -> HealthView:
        return HealthView(
            snapshot=self._snapshot(self.status) if self.status is not None else None,
            model="tiny-moe",
            target=4,
            in_flight=12,
            in_flight_by_rank={0: 12},
            pids={(0, 1): 4711},
            epoch_start=datetime.now(UTC).timestamp() - 1000,
        )

    def _snapshot(self, status: Status) -> HealthSnapshot:
        return HealthSnapshot(
            status=status,
            reason="rank 2: process ended [not markup]",
            doing="serving",
            epoch=7,
            target=4,
            active=3,
            expert_safety=None,
            survivable_losses=1,
            ranks=(
                RankHealth(0, RankState.ACTIVE, 1000 - 192.0, None, 1),
                RankHealth(2, RankState.EXCLUDED, 1000 - 5.0, "process ended", 3),
            ),
            last_recovery=SHRINK,
            last_shrink=SHRINK,
            last_grow=None,
            frontend_ready=True,
        )


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (Status.OK, 0),
        (Status.DEGRADED, 0),
        (Status.RECOVERING, 0),
        (Status.STARTING, 1),
        (Status.UNAVAILABLE, 1),
        (Status.STOPPING, 1),
        (None, 1),
    ],
)
def test_status_exit_code_and_header(
    status: Status | None, code: int, socket_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Plane(status), socket_dir):
        assert run("status", "--runtime-dir", str(socket_dir)) == code
    first_line = capsys.readouterr().out.splitlines()[0]
    assert first_line.split(":")[0] == (status or Status.STARTING).value


def test_status_shows_all_there_is(socket_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Plane(), socket_dir):
        run("status", "--runtime-dir", str(socket_dir))
    header, facts, columns, first, second, recovery = (line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert header == "degraded: rank 2: process ended [not markup]"
    assert facts == (
        "model tiny-moe · epoch 7 · ranks 3/4 active · expert safety - · survivable losses 1 · in flight 12"
    )
    assert columns.split() == ["rank", "state", "gpu", "pids", "since", "in", "flight", "reason"]
    assert first.split() == ["0", "active", "-", "4711", "3", "m", first.split()[6], "s", "12", "-"]
    assert second.split()[:4] == ["2", "excluded", "-", "-"]
    assert second.endswith("process ended")
    assert recovery == (
        "last recovery: shrink to epoch 7, lost rank 2 (rank 2: process ended): "
        "detect 1.2, fence 2.0, total 88.4 ms; requests: 9 kept, 3 replayed, 0 restarted, 0 lost"
    )


def test_status_as_json_is_the_body_of_health(socket_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Plane(), socket_dir):
        run("status", "--json", "--runtime-dir", str(socket_dir))
    body = json.loads(capsys.readouterr().out)
    assert body["status"] == "degraded"
    assert body["last_shrink"]["requests"] == {"kept": 9, "replayed": 3, "restarted": 0, "lost": 0}


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["events"], ["events", "--follow"]])
def test_no_daemon(command: list[str], socket_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command, "--runtime-dir", str(socket_dir)) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert f"no daemon answers at {socket_dir}/http.sock: " in err
    assert err.endswith("start one with `elastic-daemon serve`\n")


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "no-url", "http://[::1"])
def test_no_daemon_at_url(url: str, tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable, match="no daemon answers at"):
        Target(tmp_path, url).health()


def test_an_answer_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable, match="the supervisor does not answer"):
        Target(tmp_path).as_health({"error": "the supervisor does not answer: it is gone"})
    with pytest.raises(DaemonUnreachable, match="none of this daemon's"):
        Target(tmp_path).as_health([])


@pytest.mark.parametrize(
    ("body", "lines"),
    [
        ({"status": "starting"}, ["starting", "model - · epoch 0"]),
        (
            {"status": "starting", "reason": "importing the engine", "epoch": 0, "model": "m"},
            ["starting: importing the engine", "model m · epoch 0"],
        ),
    ],
)
def test_status_of_a_daemon_that_has_only_begun(body: dict[str, Any], lines: list[str]) -> None:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(status_view(body, datetime.now(UTC)))
    assert capture.get().splitlines() == lines


def test_events(socket_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plane = Plane()
    plane.events.record("rank_excluded", {"rank": 2, "reason": "process ended"})
    plane.events.record("frontend_ready", {})
    capsys.readouterr()  # the log of the events
    with serving(plane, socket_dir):
        assert run("events", "--runtime-dir", str(socket_dir)) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split(" ", 1)[1] == 'rank_excluded rank=2 reason="process ended"'
    assert second.split(" ", 1)[1] == "frontend_ready"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("plain", "plain"),
        ("two words", '"two words"'),
        ("", '""'),
        ("a=b", '"a=b"'),
        ("größe", "größe"),
        (3, "3"),
        (0.25, "0.25"),
        (None, "null"),
        ([1, 2], "[1, 2]"),
        ({"a": 1}, '{"a": 1}'),
    ],
)
def test_format_event(value: object, written: str) -> None:
    event: Mapping[str, Any] = {"id": 1, "time": 1_700_000_000.25, "event": "happened", "what": value}
    assert format_event(event) == f"2023-11-14T22:13:20.250Z happened what={written}"


def test_follow_goes_on_after_a_break_without_repeating(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(operator_commands, "RECONNECT_PAUSE_S", 0.01)
    plane = Plane()
    followed = follow(Target(socket_dir))
    with serving(plane, socket_dir) as server:
        server.record("one")
        assert next(followed)["event"] == "one"
        server.record("two")
        assert next(followed)["event"] == "two"
    plane.events.record("three", {})
    restarted: list[Server] = []

    def restart_once_it_is_missed() -> None:
        while "waiting for it" not in capsys.readouterr().err:
            time.sleep(0.01)
        restarted.append(Server(plane, socket_dir))

    later = threading.Thread(target=restart_once_it_is_missed, daemon=True)
    later.start()
    try:
        assert next(followed)["event"] == "three"
    finally:
        later.join(20)
        restarted[0].stop()


def test_follow_starts_anew_with_another_daemon(socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_commands, "RECONNECT_PAUSE_S", 0.01)
    followed = follow(Target(socket_dir))
    first = Plane()
    for name in ("a", "b", "c"):
        first.events.record(name, {})
    with serving(first, socket_dir):
        assert [next(followed)["event"] for _ in range(3)] == ["a", "b", "c"]
    second = Plane()
    second.events.record("other", {})
    with serving(second, socket_dir):
        assert next(followed)["event"] == "other"


def test_follow_gives_up_in_the_end(socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_commands, "RECONNECT_PAUSE_S", 0.01)
    monkeypatch.setattr(operator_commands, "RECONNECT_S", 0.3)
    plane = Plane()
    plane.events.record("last", {})
    followed = follow(Target(socket_dir))
    with serving(plane, socket_dir):
        next(followed)
    with pytest.raises(DaemonUnreachable):
        next(followed)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-1, "0 s"),
        (0.9, "0 s"),
        (59, "59 s"),
        (60, "1 m 0 s"),
        (192, "3 m 12 s"),
        (7500, "2 h 5 m"),
        (349200, "4 d 1 h"),
    ],
)
def test_age(seconds: float, shown: str) -> None:
    assert age(seconds) == shown


def test_describe_recovery_without_requests() -> None:
    report = {"epoch": 1, "kind": "start", "ranks": [], "cause": "start", "seconds": {"total": 0.057}, "requests": None}
    assert describe_recovery(report) == "start to epoch 1 (start): total 57.0 ms"


@pytest.mark.parametrize(
    "command", ["serve", "status", "scale", "drain", "exclude", "release", "automation", "events", "drill"]
)
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert f"examples:\n  elastic-daemon {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["status", "events", "drill"])
def test_commands_exist(command: str) -> None:
    arguments: argparse.Namespace = make_parser().parse_args([command])
    assert arguments.url is None
    assert callable(operator_commands.COMMANDS[arguments.command])
