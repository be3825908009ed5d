"""Logs for the journal: one line each, with a priority, the same from both programs."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_daemon.config import LOG_LEVELS
from watchdog.cli import main
from watchdog.journal import journal_line
from watchdog.logs import Level

PROGRAM = """
import sys
if sys.argv[1] == "daemon":
    import structlog
    from elastic_daemon.logs import configure_logging
    log = structlog.get_logger()
else:
    from watchdog.logs import configure_logging, log
configure_logging()
log.warning("rank_excluded", rank=2, gpu="GPU-1", reason="xid 79", seconds={"fence": 0.1})
"""
LINE = '<4>rank_excluded rank=2 gpu=GPU-1 reason="xid 79" seconds={"fence":0.1}\n'


def log_of(program: str, tmp_path: Path, journal: str | None) -> str:
    """What `program` writes to a file that it takes for the journal's stream where `journal` names it."""
    environment = {name: value for name, value in os.environ.items() if name != "ELASTIC_LOG_FORMAT"}
    with (tmp_path / "stream").open("w+") as stream:
        found = os.fstat(stream.fileno())
        if journal is not None:
            environment["JOURNAL_STREAM"] = journal.format(device=found.st_dev, inode=found.st_ino)
        subprocess.run([sys.executable, "-c", PROGRAM, program], stderr=stream, env=environment, check=True, timeout=60)
        stream.seek(0)
        return stream.read()


@pytest.mark.parametrize("program", ["daemon", "watchdog"])
def test_lines_for_the_journal_are_those_of_the_other_program(program: str, tmp_path: Path) -> None:
    assert log_of(program, tmp_path, "{device}:{inode}") == LINE


@pytest.mark.parametrize("program", ["daemon", "watchdog"])
@pytest.mark.parametrize("journal", [None, "{device}:1", "nonsense"])
def test_elsewhere_lines_are_json(program: str, journal: str | None, tmp_path: Path) -> None:
    """Also where standard error was the journal and has been redirected since."""
    assert json.loads(log_of(program, tmp_path, journal))["event"] == "rank_excluded"


@given(st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), st.text() | st.integers() | st.none() | st.floats()))
def test_a_line_stays_one_line(fields: dict[str, Any]) -> None:
    line = journal_line("event", "info", fields)
    assert line.startswith("<6>event")
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize(("level", "priority"), [("debug", 7), ("info", 6), ("warning", 4), ("error", 3)])
def test_levels_become_priorities(level: str, priority: int) -> None:
    assert journal_line("event", level, {}) == f"<{priority}>event"


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("ELASTIC_LOG_LEVEL", "loud", "debug, info, warning, error or critical"),
        ("ELASTIC_LOG_LEVEL", "", "debug, info, warning, error or critical"),
        ("ELASTIC_LOG_FORMAT", "xml", "json, text or journal"),
    ],
)
def test_a_watchdog_names_a_bad_variable_and_is_not_started_again(
    variable: str,
    value: str,
    expected: str,
    tmp_path: Path,
    clean_environment: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit status 2 is what systemd does not try again."""
    clean_environment.setenv(variable, value)
    with pytest.raises(SystemExit) as ended:
        main(["run", "--runtime-dir", str(tmp_path), "--state-dir", str(tmp_path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"elastic-watchdog: {variable}: expected {expected} (got {value!r})\n"


def test_a_watchdog_knows_each_level_that_the_daemon_takes() -> None:
    """The daemon hands its own on."""
    levels = logging.getLevelNamesMapping()
    assert {name.lower() for name in Level.__members__} == LOG_LEVELS
    assert all(levels[name] == level for name, level in Level.__members__.items())
