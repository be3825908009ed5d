"""Asks a daemon for /health and /metrics many times a second, as a scraper does: from a process that does nothing else.

A process that also streams would find an answer late because it was busy itself. Ends with SIGTERM; then what came is
written to stdout: a JSON list of answers.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from elastic_daemon.drill.daemon import Daemon
from elastic_daemon.errors import ElasticError

INTERVAL_S = 0.05
TIMEOUT_S = 30.0
STOP_S = 40.0
ROUTES = ("/health", "/metrics")
BEGUN = "asking"


@dataclass(frozen=True)
class Answer:
    """`where`: port (through the front end) or socket (the supervisor's). `asked`: monotonic. `status`: 0 for none."""

    where: str
    route: str
    asked: float
    seconds: float
    status: int


@asynccontextmanager
async def asking(daemon: Daemon) -> AsyncIterator[list[Answer]]:
    """Meanwhile, have another process ask. The list is filled at the end. Raises ElasticError if it came to grief."""
    path = daemon.control.runtime_dir / "http.sock"
    command = [sys.executable, "-m", "bench.asker", daemon.url, str(path)]
    asker = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert asker.stdout is not None
    answers: list[Answer] = []
    try:
        async with asyncio.timeout(STOP_S):
            begun = await asker.stdout.readline()
        if begun.decode().strip() != BEGUN:
            raise ElasticError("bench.asker did not begin")
        yield answers
    finally:
        if asker.returncode is None:
            asker.terminate()
        said = await asyncio.wait_for(asker.stdout.read(), STOP_S)
        status = await asker.wait()
    if status:
        raise ElasticError(f"bench.asker: exit status {status}")
    answers += [Answer(**one) for one in json.loads(said)]


class UnixConnection(HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("daemon", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Asker(threading.Thread):
    """Asks all routes in turn over one connection, from `since` on, until it is over."""

    def __init__(self, where: str, connection: HTTPConnection, since: float, over: threading.Event) -> None:
        super().__init__(name=where)
        self.answers: list[Answer] = []
        self._where, self._connection, self._over = where, connection, over
        self._due = since

    def run(self) -> None:
        for route in itertools.cycle(ROUTES):
            if self._over.wait(max(0.0, self._due - time.monotonic())):
                break
            self._ask(route)
        self._connection.close()

    def _ask(self, route: str) -> None:
        asked = time.monotonic()
        try:
            self._connection.request("GET", route)
            answer = self._connection.getresponse()
            answer.read()
            status = answer.status
        except (OSError, HTTPException) as error:
            print(f"{self._where} {route}: {error!r}", file=sys.stderr)
            self._connection.close()
            status = 0
        answered = time.monotonic()
        self.answers.append(Answer(self._where, route, asked, answered - asked, status))
        self._due += INTERVAL_S * math.ceil(max(answered - self._due, INTERVAL_S) / INTERVAL_S)


def run(url: str, path: Path) -> list[Answer]:
    over, now, public = threading.Event(), time.monotonic(), urlsplit(url)
    assert public.hostname is not None
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    # Never both at once: one answer would be read while the other waits.
    askers = [
        Asker("port", HTTPConnection(public.hostname, public.port, timeout=TIMEOUT_S), now, over),
        Asker("socket", UnixConnection(path, TIMEOUT_S), now + INTERVAL_S / 2, over),
    ]
    for asker in askers:
        asker.start()
    print(BEGUN, flush=True)
    for asker in askers:
        asker.join()
    return [answer for asker in askers for answer in asker.answers]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.asker", description=__doc__)
    parser.add_argument("url", help="where the daemon serves")
    parser.add_argument("socket", type=Path, help="http.sock of its runtime directory")
    chosen = parser.parse_args(arguments)
    print(json.dumps([asdict(answer) for answer in run(chosen.url, chosen.socket)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
