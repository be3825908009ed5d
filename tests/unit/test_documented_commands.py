"""Every command in the documents is run, parsed, or says what it needs. tests/e2e runs those that can be run."""

from __future__ import annotations

import re
import shlex

import pytest

from bench.gpu_drill import make_parser as gpu_drill_parser
from tests.documents import ENDLESS, OTHERS, ROOT, RUN, Command, Kind, classify, commands
from tests.unit.test_help import parse_command

COMMANDS = commands()


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 60


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_it_is_classified(command: Command) -> None:
    assert classify(command), f"say in tests/documents.py what becomes of it: {command.line}"


def test_no_class_is_left_over() -> None:
    lines = {command.line for command in COMMANDS}
    assert {*RUN, *ENDLESS} <= lines
    assert not [start for start, _, _ in OTHERS if not any(re.match(start, line) for line in lines)]
    assert all(why for _, _, why in OTHERS)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_it_parses(command: Command) -> None:
    """Whatever becomes of it: its program takes these arguments."""
    line = command.line.removeprefix("watch -n1 ")
    words = shlex.split(line)
    program = next(word for word in words if "=" not in word)
    if program.rpartition("/")[2] in ("elastic-daemon", "elastic-watchdog"):
        parse_command(line)
    elif program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets
    elif words[1:3] == ["-m", "bench.gpu_drill"]:
        gpu_drill_parser().parse_args(words[3:])
    elif program.endswith("python"):
        assert (ROOT / words[1]).exists()
    else:
        assert program == "curl" or classify(command) is not None
        assert program == "curl" or (classify(command) or (None,))[0] is Kind.NEEDS
