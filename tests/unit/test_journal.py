"""Logs for the journal: an entry each, or else one line with a priority, the same from both programs."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_daemon.config import LOG_LEVELS
from tests.timing import SLACK_S
from watchdog import journal as journal_module
from watchdog.cli import main
from watchdog.journal import LONGEST_NAME, journal_line, send
from watchdog.logs import Level

PROGRAM = """
import sys
import watchdog.journal
watchdog.journal.SOCKET = sys.argv[2]
if sys.argv[1] == "daemon":
    import structlog
    from elastic_daemon.telemetry.logs import configure_logging
    log = structlog.get_logger()
else:
    from watchdog.logs import configure_logging, log
configure_logging()
log.warning("rank_excluded", rank=2, gpu="GPU-1", reason="xid 79", seconds={"fence": 0.1})
"""
LINE = '<4>rank_excluded rank=2 gpu=GPU-1 reason="xid 79" seconds={"fence":0.1}\n'


Entry = dict[str, list[str]]


def entry_of(datagram: bytes) -> Entry:
    """A datagram of the journal's native protocol, as journald reads it: a name may come several times."""
    fields: Entry = {}
    while datagram:
        line, _, datagram = datagram.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size, datagram = int.from_bytes(datagram[:8], "little"), datagram[8:]
            value, end, datagram = datagram[:size], datagram[size : size + 1], datagram[size + 1 :]
            assert (len(value), end) == (size, b"\n")
        assert re.fullmatch(rb"[A-Z][A-Z0-9_]*", name)
        assert len(name) <= LONGEST_NAME
        fields.setdefault(name.decode(), []).append(value.decode())
    return fields


@contextmanager
def journald(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(path))
        receiver.settimeout(5)
        yield receiver


@pytest.fixture
def receiver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    monkeypatch.setattr(journal_module, "SOCKET", str(tmp_path / "socket"))
    with journald(tmp_path / "socket") as listening:
        yield listening


def log_of(program: str, tmp_path: Path, journal: str | None) -> str:
    """What `program` writes to a file that it takes for the journal's stream where `journal` names it."""
    command = [sys.executable, "-c", PROGRAM, program, str(tmp_path / "socket")]
    environment = {name: value for name, value in os.environ.items() if name != "ELASTIC_LOG_FORMAT"}
    with (tmp_path / "stream").open("w+") as stream:
        found = os.fstat(stream.fileno())
        if journal is not None:
            environment["JOURNAL_STREAM"] = journal.format(device=found.st_dev, inode=found.st_ino)
        subprocess.run(command, stderr=stream, env=environment, check=True, timeout=60)
        stream.seek(0)
        return stream.read()


@pytest.mark.parametrize("program", ["daemon", "watchdog"])
def test_the_journal_gets_an_entry_with_a_field_for_each_of_the_event(program: str, tmp_path: Path) -> None:
    with journald(tmp_path / "socket") as listening:
        assert log_of(program, tmp_path, "{device}:{inode}") == "", "said twice"
        entry = entry_of(listening.recv(65536))
    assert entry == {
        "MESSAGE": [LINE.removeprefix("<4>").rstrip("\n")],
        "PRIORITY": ["4"],
        "SYSLOG_IDENTIFIER": [f"elastic-{program}"],
        "ELASTIC_EVENT": ["rank_excluded"],
        "ELASTIC_RANK": ["2"],
        "ELASTIC_GPU": ["GPU-1"],
        "ELASTIC_REASON": ["xid 79"],
        "ELASTIC_SECONDS": ['{"fence":0.1}'],
    }


@pytest.mark.parametrize("program", ["daemon", "watchdog"])
def test_a_format_that_was_asked_for_elsewhere_is_text(program: str, tmp_path: Path) -> None:
    """Who redirects standard error and asks for the journal's lines wants them there."""
    command = [sys.executable, "-c", PROGRAM, program, str(tmp_path / "socket")]
    environment = {**os.environ, "ELASTIC_LOG_FORMAT": "journal"}
    with journald(tmp_path / "socket"):
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert run.stderr == LINE


NAMES = st.text(min_size=1, max_size=80)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(event=st.text(min_size=1), fields=st.dictionaries(NAMES, VALUES, max_size=8))
def test_any_event_arrives_as_it_is(event: str, fields: dict[str, Any]) -> None:
    entry = entry_of(sent_of(event, fields))
    assert entry["MESSAGE"] == [as_bytes(journal_line(event, "info", fields).removeprefix("<6>"))]
    assert entry["PRIORITY"] == ["6"]
    assert as_bytes(event) in entry["ELASTIC_EVENT"]
    values = [value for name, all_of in entry.items() if name.startswith("ELASTIC_") for value in all_of]
    assert len(values) == 1 + len(fields)
    assert {as_bytes(value) for value in fields.values() if isinstance(value, str)} <= set(values)


def as_bytes(text: str) -> str:
    """What is no character is spelt out."""
    return text.encode(errors="backslashreplace").decode()


def sent_of(event: str, fields: dict[str, Any]) -> bytes:
    """What comes out of the journal's socket."""
    name = f"\0elastic-journal-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening, pytest.MonkeyPatch.context() as patch:
        listening.bind(name)
        listening.settimeout(5)
        patch.setattr(journal_module, "SOCKET", name)
        assert send("test", event, "info", fields)
        return listening.recv(1 << 20)


def test_a_value_of_several_lines_keeps_them(receiver: socket.socket) -> None:
    assert send("test", "failed", "error", {"exception": "one\nELASTIC_RANK=7\n"})
    entry = entry_of(receiver.recv(65536))
    assert entry["ELASTIC_EXCEPTION"] == ["one\nELASTIC_RANK=7\n"]
    assert "ELASTIC_RANK" not in entry


@pytest.mark.usefixtures("receiver")
def test_what_does_not_fit_into_a_datagram_is_a_line_of_text() -> None:
    assert not send("test", "failed", "error", {"exception": "x" * (1 << 24)})


@pytest.mark.usefixtures("receiver")
def test_a_journal_that_does_not_read_stops_nobody() -> None:
    began = time.monotonic()
    taken = [send("test", "event", "info", {"number": number}) for number in range(2000)]
    assert taken[0] and not taken[-1]
    assert time.monotonic() - began < SLACK_S


@pytest.mark.parametrize("program", ["daemon", "watchdog"])
def test_without_the_journals_socket_lines_are_those_of_the_other_program(program: str, tmp_path: Path) -> None:
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
