"""How soon requests are served again after a crash of the front end.

A daemon with four CPU ranks serves streams when its front end gets SIGKILL. From then on a client asks for a completion
again and again, until one succeeds. Each kill has a daemon of its own, since the wait before a restart doubles with
each end in a minute. The processes of the ranks must be those of before.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bench.command import check_json_path, positive, say, to_the_end, write_json
from bench.control_plane import quantile
from bench.footprint import descendants, role_of
from bench.machine import Machine, load_average
from bench.tables import figures_table
from elastic_daemon.commands.operator_commands import make_console
from elastic_daemon.drill.daemon import Daemon, Display, own_daemon
from elastic_daemon.drill.load import prompts_for, run_streams, stream_client
from elastic_daemon.errors import ElasticError

EXAMPLES = """examples:
  python -m bench.frontend_restart                   ten kills; about three minutes on two cores
  python -m bench.frontend_restart --kills 2 --json restart.json

exit status: 0 if each time a completion succeeded again, by the same processes of the ranks, 1 if not, 2 for a wrong
argument. A bar that is not met is printed, and does not count."""

RANKS, KILLS = 4, 10
STREAMS, TOKENS, KILL_AT = 8, 150, 0.3
BAR_S = 5.0
ASK_S, ANSWER_S, GIVE_UP_S = 0.02, 10.0, 60.0


@dataclass(frozen=True)
class Restart:
    """Seconds from the kill on. `ready_s`: the new front end accepts connections, by the daemon's event.
    `served_s`: the first completion that succeeds is complete. `cut`: streams that the kill ended."""

    ready_s: float
    served_s: float
    refused: int
    cut: int


@dataclass
class Measured:
    restarts: list[Restart] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.frontend_restart",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=positive, default=KILLS, metavar="N", help=f"({KILLS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all raw numbers to FILE")
    return parser


async def measure(measured: Measured, kills: int) -> None:
    """Into `measured`."""
    started = time.monotonic()
    with Display(make_console(stderr=True)) as display:
        for kill in range(kills):
            say(f"kill {kill + 1} of {kills}")
            try:
                async with own_daemon(RANKS, display) as daemon:
                    measured.restarts.append(await _kill(daemon))
            except (ElasticError, TimeoutError) as error:
                measured.problems.append(f"kill {kill + 1}: {type(error).__name__}: {error}")
    measured.seconds = time.monotonic() - started


async def _kill(daemon: Daemon) -> Restart:
    """Raises ElasticError if it does not serve again, or not with the same ranks."""
    await run_streams(daemon.url, prompts_for(STREAMS), 16)  # warm
    ranks = _pids(await daemon.health())
    since = max(event["id"] for event in await daemon.events())
    frontend, left = _frontend_of(daemon), round(KILL_AT * STREAMS * TOKENS)
    reached = asyncio.Event()

    def token(_: int, count: int) -> None:
        nonlocal left
        left -= count
        if left <= 0:
            reached.set()

    streams = asyncio.create_task(run_streams(daemon.url, prompts_for(STREAMS), TOKENS, token))
    await asyncio.wait_for(reached.wait(), GIVE_UP_S)
    killed, wall = time.monotonic(), time.time()
    os.kill(frontend, signal.SIGKILL)
    refused = await asyncio.wait_for(_until_served(daemon.url), GIVE_UP_S)
    served_s = time.monotonic() - killed
    cut = sum(result.error is not None for result in await streams)
    if (now := _pids(await daemon.health())) != ranks:
        raise ElasticError(f"the ranks were {ranks} and are {now}")
    ready = [event["time"] for event in await daemon.events(since) if event["event"] == "frontend_ready"]
    if len(ready) != 1 or not cut:
        raise ElasticError(f"{len(ready)} front ends became ready, {cut} streams were cut")
    return Restart(ready[0] - wall, served_s, refused, cut)


async def _until_served(url: str) -> int:
    """How often it was refused, or cut off, before."""
    body = {"prompt": "12+34=", "max_tokens": 4, "temperature": 0}
    refused = 0
    async with stream_client(url) as client:
        while True:
            try:
                answer = await client.post("/v1/completions", json=body, timeout=ANSWER_S)
                if answer.status_code == 200 and answer.json()["choices"][0]["text"]:
                    return refused
            except httpx.HTTPError:
                pass
            refused += 1
            await asyncio.sleep(ASK_S)


def _pids(health: dict[str, object]) -> dict[int, list[int]]:
    rows = health["ranks"]
    assert isinstance(rows, list)
    return {row["rank"]: row["pids"] for row in rows}


def _frontend_of(daemon: Daemon) -> int:
    assert daemon.process is not None
    for pid in descendants(daemon.process.pid):
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        if role_of(title) == "front end":
            return pid
    raise ElasticError("there is no front end")


def render(measured: Measured, load: float) -> Group:
    machine = Machine.here()
    parts: list[Text | Table] = [
        Text(
            f"{machine.cores} cores ({machine.processor}), Python {machine.python}; load average {load} at the start; "
            f"{RANKS} ranks, {STREAMS} streams, {len(measured.restarts)} kills; {measured.seconds:.0f} s"
        )
    ]
    table = figures_table("from SIGKILL of the front end", "n", "p50 s", "worst s", "bar 5 s")
    for name, seconds, bar in (
        ("until it is ready", sorted(one.ready_s for one in measured.restarts), None),
        ("until a completion succeeds", sorted(one.served_s for one in measured.restarts), BAR_S),
    ):
        worst = quantile(seconds, 1.0)
        verdict = "" if bar is None else "met" if worst <= bar else "not met"
        table.add_row(name, str(len(seconds)), f"{quantile(seconds, 0.5):.2f}", f"{worst:.2f}", verdict)
    cut, refused = (sum(getattr(one, name) for one in measured.restarts) for name in ("cut", "refused"))
    parts += [
        table,
        Text(f"streams cut by the kills: {cut}; requests refused until then: {refused}"),
        *(Text(f"problem: {problem}") for problem in measured.problems),
    ]
    return Group(*parts)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    check_json_path(parser(), options.json)
    measured, load = Measured(), load_average()
    to_the_end(measure(measured, options.kills))
    make_console().print(render(measured, load))
    write_json(options.json, asdict(measured))
    return 1 if measured.problems else 0


if __name__ == "__main__":
    sys.exit(main())
