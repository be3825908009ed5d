"""The control connection between supervisor and children: JSON lines over one Unix socket.

Every line is an object with a `type`. A child says `hello` first. Anything about a recovery carries its epoch; whoever
gets an answer to an older epoch drops it.

    rank  -> supervisor   hello, ready, fault, fenced, regrouped, regroup_failed, respread_done, stored, column, reply
    supervisor -> rank    fence, regroup, resume, respread, store, call
    front end -> supervisor   hello, ready, synced, moved, adopted, stats, drained
    supervisor -> front end   membership, settings, drain
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import IO, Any

from elastic_daemon.errors import ControlClosed

Message = dict[str, Any]

MAX_LINE_BYTES = 64 * 1024 * 1024
"""Placement tables of 58 layers and 72 ranks are a few hundred kilobytes; a longer line than this is not ours."""


def encode(message: Message) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    message = json.loads(line)
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise ValueError("a control message is an object with a type")
    return message


class ControlClient:
    """A child's blocking end of the control connection. Sending is safe from any thread."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise ControlClosed(f"no supervisor at {path}: {error}") from error
        self._lock = threading.Lock()

    def send(self, type_: str, **fields: Any) -> None:
        """Raises ControlClosed when the supervisor is gone."""
        try:
            with self._lock:
                self._socket.sendall(encode({"type": type_, **fields}))
        except OSError as error:
            raise ControlClosed(f"control connection lost: {error}") from error

    def messages(self) -> Iterator[Message]:
        """Messages of the supervisor until the connection ends, in whatever way: what was cut off is no message."""
        with self._socket.makefile("rb") as stream:
            while (line := _read_line(stream)).endswith(b"\n"):
                yield decode(line)

    def close(self) -> None:
        self._socket.close()


def _read_line(stream: IO[bytes]) -> bytes:
    try:
        return stream.readline(MAX_LINE_BYTES)
    except OSError:  # a reset: the supervisor died before it had read all that was sent to it
        return b""
