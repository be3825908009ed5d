"""How long a rank that is three times as slow as its peers stays unnamed, and that it is named only.

One daemon with CPU ranks under a load of streams: four, or as many as there are processors, since ranks that share them
and wait give theirs to the slow one, which hides it. A thread stops and continues one rank a hundred times a second,
so that it runs for a third of the time; one rank after the other, and none for a while in between.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from bench.command import check_json_path, positive, say, write_json
from bench.load import Load, Outcome
from bench.machine import Machine, load_average
from bench.watched import until_watched
from elastic_daemon.commands.operator_commands import make_console
from elastic_daemon.drill.daemon import Daemon, Display, own_daemon
from elastic_daemon.drill.load import prompts_for, run_streams
from elastic_daemon.drill.report import Spread
from elastic_daemon.errors import ElasticError

EXAMPLES = """examples:
  python -m bench.straggler                    20 slow ranks; about seven minutes
  python -m bench.straggler --trials 3 --json straggler.json

exit status: 0 if the right rank alone was named each time, none was excluded and no stream was lost or changed, 1 if
not, 2 for a wrong argument."""

RANKS = max(2, min(4, os.cpu_count() or 2))
STREAMS, TOKENS = 8, 120
SLOWDOWN = 3
PERIOD_S = 0.01
NAMED_WITHIN_S, CLEARED_WITHIN_S, POLL_S = 40.0, 40.0, 0.2
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Trial:
    """`named_s`: None if the rank was not named. `others`: ranks named beside it."""

    rank: int
    named_s: float | None
    others: tuple[int, ...]


@dataclass
class Run:
    trials: list[Trial] = field(default_factory=list)
    outcome: Outcome = field(default_factory=Outcome)
    excluded: list[int] = field(default_factory=list)
    problem: str | None = None

    def wrong(self) -> list[str]:
        """What is not as it must be."""
        found = [f"rank {one.rank} was not named within {NAMED_WITHIN_S:g} s" for one in self.trials if not one.named_s]
        found += [f"ranks {list(one.others)} were named, {one.rank} was slow" for one in self.trials if one.others]
        found += [f"rank {rank} was excluded" for rank in self.excluded]
        if lost := self.outcome.lost + self.outcome.refused + self.outcome.changed:
            found.append(f"{lost} streams lost, refused or changed")
        return found + ([self.problem] if self.problem is not None else [])


@contextlib.contextmanager
def slowed(pid: int) -> Iterator[None]:
    """Meanwhile the process runs for one part of SLOWDOWN of the time."""
    over = threading.Event()

    def keep_stopping() -> None:
        with contextlib.suppress(ProcessLookupError):
            while not over.is_set():
                os.kill(pid, signal.SIGSTOP)
                over.wait(PERIOD_S * (SLOWDOWN - 1) / SLOWDOWN)
                os.kill(pid, signal.SIGCONT)
                over.wait(PERIOD_S / SLOWDOWN)

    thread = threading.Thread(target=keep_stopping)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def named(events: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Rank -> Unix time at which it was first called a straggler."""
    found: dict[int, float] = {}
    for event in events:
        if event["event"] == "verdict" and event["verdict"] == "suspect" and event.get("signal") == "straggler":
            found.setdefault(event["rank"], event["time"])
    return found


async def trial(daemon: Daemon, rank: int) -> Trial:
    health = await until_watched(daemon, START_TIMEOUT_S)
    pid = next(row["pids"][0] for row in health["ranks"] if row["rank"] == rank)
    since = max(event["id"] for event in await daemon.events())
    started = time.time()
    with slowed(pid):
        found = await _until_named(daemon, since, rank)
    await _until_cleared(daemon)
    at = found.pop(rank, None)
    return Trial(rank, None if at is None else at - started, tuple(sorted(found)))


async def _until_named(daemon: Daemon, since: int, rank: int) -> dict[int, float]:
    deadline = time.monotonic() + NAMED_WITHIN_S
    while rank not in (found := named(await daemon.events(since))) and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)
    return found


async def _until_cleared(daemon: Daemon) -> None:
    """Raises TimeoutError."""
    async with asyncio.timeout(CLEARED_WITHIN_S):
        while any(row["state"] == "suspect" for row in (await daemon.health())["ranks"]):
            await asyncio.sleep(POLL_S)


async def measure(run: Run, trials: int) -> None:
    """Into `run`; raises nothing that a daemon does."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with Display(make_console(stderr=True)) as display:
        try:
            async with own_daemon(RANKS, display) as daemon:
                reference = await run_streams(daemon.url, prompts_for(STREAMS), TOKENS)
                async with Load(daemon.url, reference, run.outcome):
                    for number in range(trials):
                        run.trials.append(await trial(daemon, number % RANKS))
                        say(f"{number + 1} of {trials}: {run.trials[-1]}")
                run.excluded = [event["rank"] for event in await daemon.events() if event["event"] == "rank_excluded"]
        except (ElasticError, RuntimeError, TimeoutError) as error:
            run.problem = f"{type(error).__name__}: {error}"


def render(run: Run, load: float, seconds: float) -> Group:
    machine, times = Machine.here(), [one.named_s for one in run.trials if one.named_s is not None]
    lines = [
        f"{machine.cores} cores ({machine.processor}), Python {machine.python}; load average {load} at the start; "
        f"{len(run.trials)} trials in {seconds:.0f} s, ranks slower by {SLOWDOWN}",
        f"{len(times)} of {len(run.trials)} named, {len(run.excluded)} excluded; "
        f"streams {run.outcome.streams}, lost {run.outcome.lost}, changed {run.outcome.changed}",
    ]
    if times:
        spread = Spread.of(times)
        lines.append(f"until named: p50 {spread.p50:.1f}, p99 {spread.p99:.1f}, max {spread.max:.1f} s")
    return Group(*map(Text, lines), *(Text(f"not as it must be: {line}") for line in run.wrong()))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.straggler",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trials", type=positive, default=20, metavar="N", help="slow ranks (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all raw numbers to FILE")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    check_json_path(parser(), options.json)
    started, load, run = time.monotonic(), load_average(), Run()
    try:
        asyncio.run(measure(run, options.trials))
    except (KeyboardInterrupt, asyncio.CancelledError):
        run.problem = "stopped before the end"
    make_console().print(render(run, load, time.monotonic() - started))
    write_json(options.json, {"trials": [asdict(one) for one in run.trials], "problems": run.wrong()})
    return 1 if run.wrong() else 0


if __name__ == "__main__":
    sys.exit(main())
