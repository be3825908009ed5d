"""Every command in the documents is run by a test, or a reason says why not; and its program takes its arguments."""

from __future__ import annotations

import importlib
import re
import shlex

import pytest

from tests.documented import (
    BENCHES,
    ELSEWHERE,
    ENDLESS,
    EXCEPTIONS,
    OVER_TLS,
    PATTERNS,
    RUN,
    SMALLEST,
    WATCHDOGS,
    accounted_for,
    filled,
)
from tests.documents import ROOT, Command, commands
from tests.unit.test_help import parse_command

COMMANDS = commands()
LINES = {filled(command.line) for command in COMMANDS}


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 150
    assert {"elastic-daemon automation off", "make install", "systemctl stop elastic-daemon.service"} <= LINES
    assert "elastic-daemon serve --help" in LINES, "it goes on in the next line"


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_it_is_run_or_a_reason_says_why_not(command: Command) -> None:
    assert accounted_for(command.line), f"say in tests/documented.py which test runs it: {command.line}"


@pytest.mark.parametrize(
    "line", ["elastic-daemon status --nobody-runs-this", "make coffee", "python -m bench.new", "curl http://x/livez"]
)
def test_another_one_would_be_missed(line: str) -> None:
    assert not accounted_for(line)


def test_nothing_is_listed_that_no_document_has() -> None:
    assert {*RUN, *ENDLESS, *WATCHDOGS, *OVER_TLS} <= LINES
    assert not [start for start in PATTERNS if not any(re.match(start, line) for line in LINES)]
    assert all(why for _, why in EXCEPTIONS)


@pytest.mark.parametrize(("start", "test", "text"), ELSEWHERE)
def test_it_is_run_elsewhere(start: str, test: str, text: str) -> None:
    assert text in (ROOT / test).read_text(encoding="utf-8"), start


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_it_parses(command: Command) -> None:
    """Whatever becomes of it. One that only names a command has no arguments to parse."""
    line = filled(command.line).removeprefix("watch -n1 ").replace("COMMAND", "status")
    words = shlex.split(line)
    program = next(word for word in words if "=" not in word)
    if program.rpartition("/")[2] in ("elastic-daemon", "elastic-watchdog"):
        if line in {*RUN, *ENDLESS, *WATCHDOGS, *OVER_TLS} or ("--" in line and not line.endswith("--help")):
            parse_command(line)
    elif program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets
    elif (bench := re.match(BENCHES, line)) and bench[2] in SMALLEST and words[3:]:
        module = importlib.import_module(bench[2])
        parser = getattr(module, "parser", None) or module.make_parser
        parser().parse_args(words[3:])
    elif program.endswith("python") and words[1] != "-m":
        assert (ROOT / words[1]).exists()
    elif program.startswith("system") and (units := [word for word in words if word.endswith(".service")]):
        assert all((ROOT / "systemd" / unit).exists() for unit in units)
