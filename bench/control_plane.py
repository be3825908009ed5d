"""Whether the daemon can be asked while it has its hands full.

A daemon with four CPU ranks serves streams. A process of its own asks for `/health` and `/metrics` many times a second,
on the public port (through the front end) and on the supervisor's own socket, while nothing happens and while two ranks
are killed one after the other. Then 64 streams run, and the daemon's own measure of its control loop is read.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bench.asker import ROUTES, Answer, asking
from bench.clocks import clock_offset_s
from bench.command import check_json_path, say, to_the_end, write_json
from bench.exposition import samples_of
from bench.machine import Machine, load_average
from bench.tables import figures_table
from elastic_daemon.commands.operator_commands import make_console
from elastic_daemon.drill.daemon import Daemon, Display, own_daemon, victims_of
from elastic_daemon.drill.load import prompts_for, run_streams, scheduling_probe
from elastic_daemon.errors import ElasticError

EXAMPLES = """examples:
  python -m bench.control_plane                      three lives of two losses each; about two minutes on two cores
  python -m bench.control_plane --lives 1 --json control.json

exit status: 0 if all was answered and no stream was lost, 1 if not, 2 for a wrong argument. Bars that are not met are
printed, and do not count."""

RANKS, LIVES = 4, 3
STREAMS, TOKENS, KILL_AT = 16, 150, 0.3
MANY_STREAMS, MANY_TOKENS = 64, 100
AFTERMATH_S = 0.3
"""What counts as during a recovery: from the kill to so long after the daemon says that it is done."""
RUN_S = 180.0
ANSWER_BAR_S, LAG_BAR_S = 0.02, 0.05
LAG = "elastic_control_loop_lag_seconds_bucket"
OPTIONS = ("--restore", "off")


@dataclass
class Measured:
    """`recoveries`: from when to when, monotonic. `lag`: buckets of the loop under many streams, by upper bound."""

    answers: list[Answer] = field(default_factory=list)
    recoveries: list[tuple[float, float]] = field(default_factory=list)
    lag: dict[float, float] = field(default_factory=dict)
    lateness_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def seconds_of(self, where: str, route: str, in_recovery: bool) -> list[float]:
        def falls_in(answer: Answer) -> bool:
            end = answer.asked + answer.seconds
            return any(answer.asked < until and end > since for since, until in self.recoveries)

        mine = (one for one in self.answers if (one.where, one.route) == (where, route))
        return sorted(one.seconds for one in mine if falls_in(one) == in_recovery)

    @property
    def problems(self) -> list[str]:
        refused = [one for one in self.answers if one.status != 200]
        found = [f"{len(refused)} answers were not 200, such as {refused[0]}"] if refused else []
        return found + self.errors


def quantile(ascending: Sequence[float], share: float) -> float:
    """The smallest value that so large a share does not exceed; NaN if there is none."""
    return ascending[max(0, math.ceil(share * len(ascending)) - 1)] if ascending else math.nan


def bucket_quantile(buckets: dict[float, float], share: float) -> float:
    """An upper bound of it, from cumulative counts by upper bound."""
    total = max(buckets.values(), default=0.0)
    return min((bound for bound, count in buckets.items() if total and count >= share * total), default=math.nan)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.control_plane",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lives", type=int, choices=range(1, 21), default=LIVES, metavar="N", help=f"({LIVES})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all raw numbers to FILE")
    return parser


async def measure(measured: Measured, lives: int) -> None:
    """Into `measured`."""
    started = time.monotonic()
    with Display(make_console(stderr=True)) as display:
        for life in range(lives):
            say(f"life {life + 1} of {lives}")
            try:
                async with own_daemon(RANKS, display, OPTIONS) as daemon:
                    await _live(daemon, measured, many=life == 0)
            except (ElasticError, TimeoutError) as error:
                measured.errors.append(f"life {life + 1}: {type(error).__name__}: {error}")
    measured.seconds = time.monotonic() - started


async def _live(daemon: Daemon, measured: Measured, many: bool) -> None:
    await _stream(daemon, measured, STREAMS, 16)  # warm
    if many:
        before = await _lag(daemon)
        await _stream(daemon, measured, MANY_STREAMS, MANY_TOKENS)
        measured.lag = {bound: count - before[bound] for bound, count in (await _lag(daemon)).items()}
    try:
        async with asking(daemon) as answers, scheduling_probe() as delays:
            await _stream(daemon, measured, STREAMS, TOKENS)
            for rank in (1, 3):
                await _stream(daemon, measured, STREAMS, TOKENS, victim=rank)
    finally:
        measured.answers += answers
        measured.lateness_s += [delay.seconds for delay in delays]


async def _stream(daemon: Daemon, measured: Measured, streams: int, tokens: int, victim: int | None = None) -> None:
    health = await daemon.health()
    left, killed = round(KILL_AT * streams * tokens), 0.0
    with victims_of(health, [] if victim is None else [victim]) as victims:

        def token(_: int, count: int) -> None:
            nonlocal left, killed
            left -= count
            if victims and not killed and left <= 0:
                killed = time.monotonic()
                victims[0].kill()

        since = max(event["id"] for event in await daemon.events())
        clock_s = clock_offset_s()
        async with asyncio.timeout(RUN_S):
            results = await run_streams(daemon.url, prompts_for(streams), tokens, token)
    measured.errors += [str(result.error) for result in results if result.error]
    if victim is not None:
        done = [event["time"] for event in await daemon.events(since) if event["event"] == "recovery_done"]
        if not done:
            raise ElasticError("no recovery came to its end")
        measured.recoveries.append((killed, max(done) + clock_s + AFTERMATH_S))


async def _lag(daemon: Daemon) -> dict[float, float]:
    async with httpx.AsyncClient(base_url=daemon.url, timeout=30) as client:
        text = (await client.get("/metrics")).text
    return {float(sample.labels["le"]): sample.value for sample in samples_of(text, LAG)}


def render(measured: Measured, load: float) -> Group:
    machine = Machine.here()
    parts: list[Text | Table] = [
        Text(
            f"{machine.cores} cores ({machine.processor}), Python {machine.python}; load average {load} at the start; "
            f"{RANKS} ranks, {STREAMS} streams, {len(measured.recoveries)} recoveries; {measured.seconds:.0f} s"
        )
    ]
    for in_recovery, title in ((False, "under load"), (True, "during recoveries")):
        table = figures_table(title, "asked", "p50 ms", "p99 ms", "longest ms", "bar 20 ms")
        for where, route in itertools.product(("port", "socket"), ROUTES):
            seconds = measured.seconds_of(where, route, in_recovery)
            p99 = quantile(seconds, 0.99)
            figures = (f"{quantile(seconds, share) * 1000:.1f}" for share in (0.5, 0.99, 1.0))
            table.add_row(
                f"{route} ({where})", str(len(seconds)), *figures, "met" if p99 <= ANSWER_BAR_S else "not met"
            )
        parts.append(table)
    lag = bucket_quantile(measured.lag, 0.99)
    p50, verdict = bucket_quantile(measured.lag, 0.5), "met" if lag <= LAG_BAR_S else "not met"
    samples = max(measured.lag.values(), default=0.0)
    late = sorted(measured.lateness_s)
    parts += [
        Text(
            f"control loop under {MANY_STREAMS} streams: p50 at most {p50 * 1000:g} ms, p99 at most {lag * 1000:g} ms "
            f"of {samples:.0f} samples (bar 50 ms: {verdict})"
        ),
        Text(
            f"lateness of this process's own timers: p50 {quantile(late, 0.5) * 1000:.1f} ms, "
            f"p99 {quantile(late, 0.99) * 1000:.1f} ms"
        ),
        *(Text(f"problem: {problem}") for problem in measured.problems),
    ]
    return Group(*parts)


def as_json(measured: Measured) -> dict[str, Any]:
    return {**asdict(measured), "lag": {str(bound): count for bound, count in measured.lag.items()}}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    check_json_path(parser(), options.json)
    measured, load = Measured(), load_average()
    to_the_end(measure(measured, options.lives))
    make_console().print(render(measured, load))
    write_json(options.json, as_json(measured))
    return 1 if measured.problems else 0


if __name__ == "__main__":
    sys.exit(main())
