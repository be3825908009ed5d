"""Structured logs: for people on a terminal, as JSON lines elsewhere (`ELASTIC_LOG_FORMAT=json|text` decides)."""

from __future__ import annotations

import logging
import os
import sys

import structlog


def configure_logging(level: str | None = None) -> None:
    """Events go to standard error: a stable snake_case name plus fields. Idempotent."""
    form = os.environ.get("ELASTIC_LOG_FORMAT") or ("text" if sys.stderr.isatty() else "json")
    threshold = logging.getLevelNamesMapping()[(level or os.environ.get("ELASTIC_LOG_LEVEL", "info")).upper()]
    renderer: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if form == "text"
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
