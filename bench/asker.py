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
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from elastic_daemon.drill_daemon import Daemon
from elastic_daemon.errors import ElasticError

INTERVAL_S = 0.05
STOP_S = 10.0
ROUTES = ("/health", "/metrics")
BEGUN = "asking"


@dataclass(frozen=True)
class Answer:
    """`where`: port (through the front end) or socket (the supervisor's own). `asked`: monotonic."""

    where: str
    route: str
    asked: float
    seconds: float
    status: int


@asynccontextmanager
async def asking(daemon: Daemon) -> AsyncIterator[list[Answer]]:
    """Meanwhile, have another process ask. The list is filled at the end. Raises ElasticError if it came to grief."""
    socket = daemon.control.runtime_dir / "http.sock"
    command = [sys.executable, "-m", "bench.asker", daemon.url, str(socket)]
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


async def ask(client: httpx.AsyncClient, where: str, since: float, answers: list[Answer]) -> None:
    """Ask all routes in turn, from `since` on."""
    due = since
    async with client:
        for route in itertools.cycle(ROUTES):
            await asyncio.sleep(due - time.monotonic())
            asked = time.monotonic()
            answer = await client.get(route)
            answered = time.monotonic()
            answers.append(Answer(where, route, asked, answered - asked, answer.status_code))
            due += INTERVAL_S * math.ceil(max(answered - due, INTERVAL_S) / INTERVAL_S)


async def run(url: str, socket: Path) -> list[Answer]:
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    answers: list[Answer] = []
    transport, now = httpx.AsyncHTTPTransport(uds=str(socket)), time.monotonic()
    own = httpx.AsyncClient(transport=transport, base_url="http://daemon", timeout=30)
    public = httpx.AsyncClient(base_url=url, timeout=30)
    # Never both at once: the text of one answer keeps this process from reading the other.
    async with asyncio.TaskGroup() as group:
        askers = [
            group.create_task(ask(public, "port", now, answers)),
            group.create_task(ask(own, "socket", now + INTERVAL_S / 2, answers)),
        ]
        print(BEGUN, flush=True)
        await over.wait()
        for asker in askers:
            asker.cancel()
    return answers


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.asker", description=__doc__)
    parser.add_argument("url", help="where the daemon serves")
    parser.add_argument("socket", type=Path, help="http.sock of its runtime directory")
    chosen = parser.parse_args(arguments)
    print(json.dumps([asdict(answer) for answer in asyncio.run(run(chosen.url, chosen.socket))]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
