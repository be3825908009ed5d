"""Events for systemd's journal, for the watchdog and for the daemon.

Where standard error is the journal, each is one entry of its native protocol, with a field for each of the event's:
`journalctl ELASTIC_EVENT=rank_excluded ELASTIC_RANK=2`. What the journal does not take so is written as a line of text,
`<4>rank_excluded rank=2 reason="..."`, of which it takes the priority only (sd-daemon(3)): no event is lost. MESSAGE of
an entry is that line without its prefix: to be read as it is, and parsed, for each value is a bare word or JSON.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Mapping
from typing import Any

PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}

SOCKET = "/run/systemd/journal/socket"
PREFIX = "ELASTIC_"
"""Of the fields' names, so that none is taken for one of the journal's own."""

LONGEST_NAME = 64
"""The journal drops a field with a longer one."""

_BARE = re.compile(r"[\w./:@%+-]+", re.ASCII)
_NO_NAME = re.compile(r"[^A-Z0-9_]")


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
    return f"<{_priority(level)}>{_message(event, fields)}"


def send(identifier: str, event: str, level: str, fields: Mapping[str, Any]) -> bool:
    """Hand it to the journal as one entry. False: it was not taken, and is to be written as a line.

    It never waits: a journal that does not read must not stop a control loop here.
    """
    entry = {"MESSAGE": _message(event, fields), "PRIORITY": str(_priority(level)), "SYSLOG_IDENTIFIER": identifier}
    named = [(_name(name), value if isinstance(value, str) else _json(value)) for name, value in fields.items()]
    datagram = b"".join(_field(*field) for field in (*entry.items(), (f"{PREFIX}EVENT", event), *named))
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto(datagram, SOCKET)
    except OSError:  # nobody listens, its queue is full, or the entry is too large for a datagram
        return False
    return True


def _field(name: str, value: str) -> bytes:
    """As in https://systemd.io/JOURNAL_NATIVE_PROTOCOL: a value of several lines has its length before it."""
    data = value.encode(errors="backslashreplace")
    if b"\n" in data:
        return b"%s\n%s%s\n" % (name.encode(), len(data).to_bytes(8, "little"), data)
    return b"%s=%s\n" % (name.encode(), data)


def _name(key: str) -> str:
    return (PREFIX + _NO_NAME.sub("_", key.upper()))[:LONGEST_NAME]


def _priority(level: str) -> int:
    return PRIORITIES.get(level, 6)


def _message(event: str, fields: Mapping[str, Any]) -> str:
    return _one_line(event) + "".join(f" {name}={_value(value)}" for name, value in fields.items())


def _value(value: Any) -> str:
    return value if isinstance(value, str) and _BARE.fullmatch(value) else _one_line(_json(value))


def _json(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False, separators=(",", ":"))


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())
