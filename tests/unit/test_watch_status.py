"""`status --watch`: plain text and JSON lines where nobody looks at a terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from elastic_daemon.commands.operator_commands import Target
from tests.unit.command_line import run, serving
from tests.unit.test_operator_commands import Plane


class Naps:
    """Stands in for `time.sleep`: the watcher's naps are counted, and the last one is broken by Ctrl-C."""

    def __init__(self, most: int) -> None:
        self.left, self._sleep = most, time.sleep
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> None:
        if seconds < 0.05:  # the server's
            self._sleep(seconds)
            return
        self.seconds.append(seconds)
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def watched(socket_dir: Path, monkeypatch: pytest.MonkeyPatch, naps: Naps, *more: str) -> int:
    monkeypatch.setattr("elastic_daemon.commands.operator_commands.time.sleep", naps)
    return run("status", "--watch", *more, "--runtime-dir", str(socket_dir))


def test_watch_repeats_until_interrupted(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    naps = Naps(3)
    with serving(Plane(), socket_dir):
        assert watched(socket_dir, monkeypatch, naps) == 130
    out = capsys.readouterr().out
    assert out.count("degraded: rank 2") == 3
    assert "\x1b" not in out
    assert naps.seconds == [1.0] * 3


def test_watch_as_json_is_one_line_each(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    naps = Naps(2)
    with serving(Plane(), socket_dir):
        watched(socket_dir, monkeypatch, naps, "0.5", "--json")
    assert [json.loads(line)["status"] for line in capsys.readouterr().out.splitlines()] == ["degraded"] * 2
    assert naps.seconds == [0.5] * 2


def test_watch_outlives_the_daemon(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = 0
    health = Target.health

    def once(target: Target) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return health(target if asked == 1 else Target(socket_dir / "gone"))

    monkeypatch.setattr(Target, "health", once)
    with serving(Plane(), socket_dir):
        watched(socket_dir, monkeypatch, Naps(2), "--json")
    assert [json.loads(line)["status"] for line in capsys.readouterr().out.splitlines()] == ["degraded", "unreachable"]


def test_watch_of_no_daemon(socket_dir: Path) -> None:
    assert run("status", "--watch", "--runtime-dir", str(socket_dir)) == 3
