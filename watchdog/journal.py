"""Log lines for systemd's journal, for the watchdog and for the daemon: `<4>rank_excluded rank=2 reason="..."`.

The journal keeps time, unit and pid itself and takes the priority from the prefix (sd-daemon(3)), so the line has the
event and its fields only: to be read as it is in `journalctl`, and parsed, for each value is a bare word or JSON.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}

_BARE = re.compile(r"[\w./:@%+-]+", re.ASCII)


def stderr_is_journal() -> bool:
    """Whether standard error is the stream that systemd connected to the journal, and not redirected since."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # closed, or no file at all
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


def log_format() -> str:
    """`text`, `json` or `journal`: what `ELASTIC_LOG_FORMAT` says, else what suits standard error."""
    if form := os.environ.get("ELASTIC_LOG_FORMAT"):
        return form
    if stderr_is_journal():
        return "journal"
    return "text" if sys.stderr.isatty() else "json"


def journal_line(event: str, level: str, fields: Mapping[str, Any]) -> str:
    """One line, whatever the values are."""
    shown = "".join(f" {name}={_value(value)}" for name, value in fields.items())
    return f"<{PRIORITIES.get(level, 6)}>{_one_line(event)}{shown}"


def _value(value: Any) -> str:
    if isinstance(value, str) and _BARE.fullmatch(value):
        return value
    return _one_line(json.dumps(value, default=str, ensure_ascii=False, separators=(",", ":")))


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())
