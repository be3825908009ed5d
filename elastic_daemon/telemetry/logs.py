"""Structured logs: for people on a terminal, for the journal under systemd, as JSON lines elsewhere.

`ELASTIC_LOG_FORMAT=json|text|journal` decides otherwise.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import structlog


def configure_logging(level: str | None = None) -> None:
    """Events go to standard error: a stable snake_case name plus fields. Idempotent."""
    from watchdog.journal import log_format  # not at the top: `serve` says it clearly where another `watchdog` is

    threshold = logging.getLevelNamesMapping()[(level or os.environ.get("ELASTIC_LOG_LEVEL", "info")).upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _renderer(log_format()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def _renderer(form: str) -> structlog.types.Processor:
    if form == "journal":
        from watchdog.journal import stderr_is_journal

        return _enter_into_journal if stderr_is_journal() else _render_for_journal
    if form == "text":
        return structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty() and not os.environ.get("NO_COLOR"))
    return structlog.processors.JSONRenderer()


def _enter_into_journal(logger: object, method: str, event: structlog.types.EventDict) -> str:
    from watchdog.journal import send

    if send("elastic-daemon", *_parts(event)):
        raise structlog.DropEvent
    return _render_for_journal(logger, method, event)


def _render_for_journal(_: object, __: str, event: structlog.types.EventDict) -> str:
    from watchdog.journal import journal_line

    return journal_line(*_parts(event))


def _parts(event: structlog.types.EventDict) -> tuple[str, str, dict[str, Any]]:
    """Event, level and fields. The journal has the time of its own."""
    own = ("event", "level", "timestamp")
    return str(event["event"]), event["level"], {k: v for k, v in event.items() if k not in own}
