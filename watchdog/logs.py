"""Structured logs: for people on a terminal, for the journal under systemd, as JSON lines elsewhere.

`ELASTIC_LOG_FORMAT=json|text|journal` decides otherwise.

The same lines as the daemon's, which structlog writes. Not structlog here: it, and what it imports, would take as much
memory as the rest of the watchdog.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any

from watchdog.errors import OptionError
from watchdog.journal import journal_line, log_format, send, stderr_is_journal


class Level(IntEnum):
    """With the aliases of Python's logging: the daemon takes them, and hands its level on to its watchdog."""

    NOTSET = 0
    DEBUG = 10
    INFO = 20
    WARNING = WARN = 30
    ERROR = 40
    CRITICAL = FATAL = 50


FORMS = ("json", "text", "journal")


class Logger:
    """Events go to standard error: a stable snake_case name plus fields."""

    def __init__(self) -> None:
        self.threshold = Level.INFO
        self.form = "json"
        self.into_journal = False
        """Whether the journal is at the other end, and takes entries."""

    def info(self, event: str, **fields: Any) -> None:
        self._write(Level.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._write(Level.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._write(Level.ERROR, event, fields)

    def _write(self, level: Level, event: str, fields: dict[str, Any]) -> None:
        if level < self.threshold:
            return
        if self.into_journal and send("elastic-watchdog", event, level.name.lower(), fields):
            return
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        if self.form == "journal":
            line = journal_line(event, level.name.lower(), fields)
        elif self.form == "text":
            shown = "".join(f" {name}={value}" for name, value in fields.items())
            line = f"{now} [{level.name.lower():<8}] {event:<30}{shown}"
        else:
            line = json.dumps({**fields, "event": event, "level": level.name.lower(), "timestamp": now}, default=repr)
        print(line, file=sys.stderr, flush=True)


log = Logger()


def configure_logging() -> None:
    """As the environment says. Raises OptionError for what is no level or format. Idempotent."""
    level, form = os.environ.get("ELASTIC_LOG_LEVEL", "info"), log_format()
    if level.upper() not in Level.__members__:
        raise OptionError(f"ELASTIC_LOG_LEVEL: expected debug, info, warning, error or critical (got {level!r})")
    if form not in FORMS:
        raise OptionError(f"ELASTIC_LOG_FORMAT: expected json, text or journal (got {form!r})")
    log.threshold, log.form = Level[level.upper()], form
    log.into_journal = form == "journal" and stderr_is_journal()
