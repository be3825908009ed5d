"""NCCL RAS, the second source beside heartbeats: whom the other processes of a job do not hear.

Each process with a communicator runs a RAS thread (NCCL 2.24 and newer, unless `NCCL_RAS_ENABLE=0`); one of them
listens on `NCCL_RAS_ADDR`, by default localhost:28028, and asks the others. A process that is stopped or stuck as a
whole does not answer: NCCL gives it 3.5 s. One whose main thread alone hangs does answer, so silence is evidence and an
answer is none. It is asked only while some rank is suspected: it wakes a thread in each rank.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from watchdog.errors import RasError
from watchdog.logs import log

TIMEOUT_S = 6.0
"""For the whole question. NCCL itself waits 3.5 s for a process that does not answer."""
AGAIN_S = 1.0
VALID_S = 10.0
"""For how long an answer counts, since it was given."""

_PREPARE = (b"CLIENT PROTOCOL 2\n", b"SET FORMAT json\n")
"""Each is answered by a line."""
_QUESTION = b"VERBOSE STATUS\n"
"""Answered until the connection is closed."""


@dataclass(frozen=True)
class RasReport:
    """`unheard`: pids of processes that a communicator misses, since they do not answer or are taken for dead."""

    unheard: frozenset[int]


def parse(answer: bytes) -> RasReport:
    """An answer in JSON, behind lines of the protocol. Raises RasError."""
    start = answer.find(b"{")
    try:
        report = json.loads(answer[start:] if start >= 0 else b"")
        missing = [rank for one in report["communicators"] for rank in one.get("missing_ranks", ())]
        return RasReport(frozenset(int(rank["pid"]) for rank in missing if _unheard(rank.get("status", {}))))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RasError(f"NCCL RAS answered {answer[:80]!r}, which is no report in JSON: {error}") from error


def _unheard(status: dict[str, Any]) -> bool:
    return bool(status.get("unresponsive") or status.get("considered_dead"))


def address() -> tuple[str, int]:
    """Where RAS listens, from `NCCL_RAS_ADDR` as NCCL reads it. Raises RasError."""
    text = os.environ.get("NCCL_RAS_ADDR", "localhost:28028")
    host, _, port = text.rpartition(":")
    if not port.isdecimal():
        raise RasError(f"NCCL_RAS_ADDR {text!r} is not HOST:PORT")
    return host.strip("[]") or "localhost", int(port)


def ask(where: tuple[str, int], timeout_s: float = TIMEOUT_S) -> RasReport:
    """Blocks for as long as NCCL asks around. Raises RasError."""
    deadline = time.monotonic() + timeout_s
    try:
        with socket.create_connection(where, timeout=timeout_s) as connection:
            for line in _PREPARE:
                connection.sendall(line)
                _receive(connection, deadline, b"\n")
            connection.sendall(_QUESTION)
            return parse(_receive(connection, deadline, None))
    except OSError as error:
        raise RasError(f"NCCL RAS at {where[0]}:{where[1]}: {error}") from error


def _receive(connection: socket.socket, deadline: float, end: bytes | None) -> bytes:
    """What comes until it ends with `end`, or the connection is closed."""
    received = bytearray()
    while end is None or not received.endswith(end):
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        if not (chunk := connection.recv(1 << 16)):
            break
        received += chunk
    return bytes(received)


class RasWitness:
    """Asks RAS in a thread of its own while somebody is suspected, and keeps the answer for a while."""

    def __init__(self, ask: Callable[[], RasReport] = lambda: ask(address())) -> None:
        self._ask = ask
        self._asking: Future[RasReport] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._asked_at = self._answered_at = -VALID_S
        self._report = RasReport(frozenset())
        self._wrong: str | None = None

    def unheard(self, suspicious: bool, now: float) -> frozenset[int]:
        """Pids that a fresh answer misses. Never blocks. `suspicious`: somebody is suspected, so ask (again)."""
        if self._asking is not None and self._asking.done():
            self._take(self._asking, now)
            self._asking = None
        if suspicious and self._asking is None and now - self._asked_at >= AGAIN_S:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "nccl-ras")
            self._asked_at = now
            self._asking = self._thread.submit(self._ask)
        return self._report.unheard if now - self._answered_at < VALID_S else frozenset()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self, asked: Future[RasReport], now: float) -> None:
        try:
            self._report, self._answered_at, self._wrong = asked.result(), now, None
        except RasError as error:
            if str(error) != self._wrong:  # once: without GPUs nobody listens there
                log.info("nccl_ras_unavailable", error=str(error))
            self._wrong = str(error)
