"""Events reach the log at the level that docs/events.md promises: what `journalctl -p warning` finds."""

from __future__ import annotations

import re
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from elastic_daemon.telemetry.event_levels import LEVELS, ORDINARY, level_of
from elastic_daemon.telemetry.events import EventLog
from elastic_daemon.telemetry.logs import configure_logging
from tests.documents import ROOT

ROW = re.compile(r"^\| (`\w+`(?:, `\w+`)*) \| (\w+)(; .*?)? \|", re.MULTILINE)


def documented() -> dict[str, tuple[str, str]]:
    """The level of each event, and under what condition it is info after all."""
    table = (ROOT / "docs" / "events.md").read_text(encoding="utf-8").partition("## All events")[2]
    rows = [(name, level, but) for names, level, but in ROW.findall(table) for name in re.findall(r"\w+", names)]
    assert len(rows) > 40
    return {name: (level, but) for name, level, but in rows}


def test_the_documents_have_the_level_of_each_event() -> None:
    told = documented()
    assert {name: level for name, (level, _) in told.items()} == {
        name: level_of(name, {}).name.lower() for name in told
    }
    assert told.keys() >= LEVELS.keys()
    assert {name for name, (_, but) in told.items() if but} == ORDINARY.keys()
    for name, (_, values) in ORDINARY.items():
        assert {str(value) for value in values} <= set(re.findall(r"\w+", told[name][1]))


@pytest.mark.parametrize(
    ("name", "fields", "level"),
    [
        ("rank_excluded", {"rank": 2, "incarnation": 3, "reason": "process ended"}, "warning"),
        ("frontend_exited", {"status": "killed by signal 9"}, "error"),
        ("unavailable", {"epoch": 3, "reason": "1 rank cannot hold 16 experts"}, "error"),
        ("recovery_done", {"epoch": 2, "kind": "shrink", "ranks": (2,), "seconds": {}}, "info"),
        ("verdict", {"gpu": "GPU-1", "verdict": "exclude"}, "warning"),
        ("verdict", {"gpu": "GPU-1", "verdict": "ok"}, "info"),
        ("verdict_refused", {"ranks": (2,), "verdict": "ok"}, "warning"),
        ("operation_ended", {"operation": "op-1", "state": "rolled back"}, "warning"),
        ("operation_ended", {"operation": "op-1", "state": "done"}, "info"),
        ("exit", {"code": 4, "reason": "the front end ended 6 times"}, "error"),
        ("exit", {"code": 0, "reason": "drained"}, "info"),
        ("one_of_tomorrow", {"code": 4}, "info"),
    ],
)
def test_each_reaches_the_log_at_its_level(name: str, fields: dict[str, Any], level: str) -> None:
    with capture_logs() as logs:
        EventLog().record(name, fields)
    assert logs == [{"event": name, "log_level": level, **fields}]


@pytest.fixture
def restored_logging() -> Any:
    yield
    structlog.reset_defaults()


@pytest.mark.usefixtures("restored_logging")
def test_a_threshold_hides_what_is_below_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELASTIC_LOG_FORMAT", "journal")
    configure_logging("warning")
    events = EventLog()
    for name in ("rank_standby", "rank_excluded", "unavailable"):
        events.record(name, {"rank": 2})
    assert capsys.readouterr().err == "<4>rank_excluded rank=2\n<3>unavailable rank=2\n"
    assert len(events.since(0)) == 3, "the list has all of them"
