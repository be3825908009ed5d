"""How fast the daemon sees a fault, and how fast survivors serve again.

Starts real daemons with six CPU ranks, real watchdogs and simulated GPUs, under a load of streams, and breaks one rank
or GPU after the other. Prints the spread of each time beside the bar that it is held to.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from bench.command import check_json_path, positive, say, write_json
from bench.detection_trials import OPTIONS, RANKS, SURVIVE, Bench, Kind, Trial
from bench.machine import Machine, load_average
from elastic_daemon.commands.operator_commands import make_console
from elastic_daemon.drill.daemon import Display, own_daemon
from elastic_daemon.drill.report import Spread
from elastic_daemon.errors import ElasticError

EXAMPLES = """examples:
  python -m bench.detection                        20 trials of each fault; about half an hour on two cores
  python -m bench.detection --trials 3 --faults xid,lost
  python -m bench.detection --json detection.json  all raw numbers as well

exit status: 0 if every p99 is within its bar, the right rank was named each time and no stream was lost or changed,
1 if not, 2 for a wrong argument."""

NAMES = {
    "death": Kind.DEATH, "xid": Kind.XID, "lost": Kind.LOST, "wedged": Kind.WEDGED,
    "stopped-decode": Kind.STOPPED_DECODE, "stopped-idle": Kind.STOPPED_IDLE,
}  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """What is measured of one kind of fault, and what it may take."""

    kind: Kind
    what: str
    of: Callable[[Trial], float | None]
    bar_s: float


BARS = (
    Bar(Kind.DEATH, "excluded", lambda trial: trial.excluded_s, 0.05),
    Bar(Kind.XID, "verdict", lambda trial: trial.verdict_s, 0.1),
    Bar(Kind.XID, "first token from survivors", lambda trial: trial.token_s, 1.5),
    Bar(Kind.LOST, "verdict", lambda trial: trial.verdict_s, 1.0),
    Bar(Kind.WEDGED, "verdict", lambda trial: trial.verdict_s, 2.0),
    Bar(Kind.STOPPED_DECODE, "verdict", lambda trial: trial.verdict_s, 3.0),
    Bar(Kind.STOPPED_IDLE, "verdict", lambda trial: trial.verdict_s, 3.0),
)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.detection",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trials", type=positive, default=20, metavar="N", help="of each fault (default: 20)")
    parser.add_argument("--faults", type=_kinds, default=tuple(Kind), metavar="NAMES", help=", ".join(NAMES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all raw numbers to FILE")
    return parser


def _kinds(text: str) -> tuple[Kind, ...]:
    try:
        return tuple(NAMES[name] for name in text.split(","))
    except KeyError as error:
        raise argparse.ArgumentTypeError(f"unknown fault {error}, choose from {', '.join(NAMES)}") from error


def lives(kinds: Sequence[Kind], trials: int) -> Iterator[tuple[Kind, ...]]:
    """All trials, the kinds in turn, as many for each life of a daemon as it survives."""
    return batched(itertools.chain.from_iterable(itertools.repeat(kinds, trials)), SURVIVE)


def batched(kinds: Iterable[Kind], size: int) -> Iterator[tuple[Kind, ...]]:
    left = iter(kinds)
    while batch := tuple(itertools.islice(left, size)):
        yield batch


async def measure(kinds: Sequence[Kind], trials: int, done: list[Trial], problems: list[str]) -> None:
    """Everything, one after the other, into `done`. A life that cannot go on is a problem, and the next one begins."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with Display(make_console(stderr=True)) as display:
        for number, batch in enumerate(lives(kinds, trials), 1):
            try:
                async with own_daemon(RANKS, display, OPTIONS) as daemon:
                    daemon.keep_log = True
                    bench = Bench(daemon)
                    await bench.prepare()
                    for kind in batch:
                        done.append(await bench.suffer(kind))
                        say(describe(done[-1]))
                    daemon.keep_log = False
            except (ElasticError, RuntimeError, TimeoutError) as error:
                problems.append(f"life {number}: {type(error).__name__}: {error}")
                say(problems[-1])


def describe(trial: Trial) -> str:
    def ms(seconds: float | None) -> str:
        return "never" if seconds is None else f"{seconds * 1000:.0f} ms"

    named = "" if trial.named == trial.rank else f", NAMED {trial.named}"
    return (
        f"{trial.kind.value} of rank {trial.rank}: verdict {ms(trial.verdict_s)}, excluded {ms(trial.excluded_s)}, "
        f"token {ms(trial.token_s)}; lost {trial.lost}, changed {trial.changed}{named} ({trial.cause})"
    )


def verdicts(trials: Sequence[Trial]) -> list[str]:
    """What is not as it must be."""
    wrong = []
    for bar in BARS:
        times = [bar.of(trial) for trial in trials if trial.kind is bar.kind]
        seen = [time for time in times if time is not None]
        if len(seen) < len(times):
            wrong.append(f"{bar.kind.value}: no {bar.what} in {len(times) - len(seen)} of {len(times)} trials")
        elif (p99 := Spread.of(seen).p99) > bar.bar_s:
            wrong.append(f"{bar.kind.value}, {bar.what}: p99 {p99 * 1000:.0f} ms, bar {bar.bar_s * 1000:.0f} ms")
    for trial in trials:
        if trial.named != trial.rank:
            wrong.append(f"{trial.kind.value} of rank {trial.rank}: named {trial.named}")
    if lost := sum(trial.lost + trial.changed for trial in trials):
        wrong.append(f"{lost} streams lost or changed")
    return wrong


def render(trials: Sequence[Trial], problems: Sequence[str], load: float, seconds: float) -> Group:
    machine = Machine.here()
    table = Table("fault", "until", "trials", "p50, ms", "p99, ms", "max, ms", "bar, ms", "right rank", box=None)
    for bar in BARS:
        own = [trial for trial in trials if trial.kind is bar.kind]
        if not own:
            continue
        spread = Spread.of([value for trial in own if (value := bar.of(trial)) is not None])
        numbers = (f"{value * 1000:.0f}" for value in (spread.p50, spread.p99, spread.max, bar.bar_s))
        named = sum(trial.named == trial.rank for trial in own)
        table.add_row(bar.kind.value, bar.what, f"{spread.count}/{len(own)}", *numbers, f"{named}/{len(own)}")
    late = Spread.of([trial.lateness_s for trial in trials])
    lost, changed = sum(trial.lost for trial in trials), sum(trial.changed for trial in trials)
    wrong = [*verdicts(trials), *problems]
    return Group(
        Text(
            f"{machine.cores} cores ({machine.processor}), Python {machine.python}; load average {load} at the start; "
            f"{len(trials)} trials in {seconds:.0f} s"
        ),
        table,
        Text(f"streams lost {lost}, changed {changed}"),
        Text(f"worst lateness of this process's own timers in a trial: p50 {late.p50 * 1000:.0f}, "
             f"max {late.max * 1000:.0f} ms"),
        *(Text(f"not as it must be: {line}") for line in wrong),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    check_json_path(parser(), options.json)
    started, load = time.monotonic(), load_average()
    trials: list[Trial] = []
    problems: list[str] = []
    try:
        asyncio.run(measure(options.faults, options.trials, trials, problems))
    except (KeyboardInterrupt, asyncio.CancelledError):
        problems.append("stopped before the end")
    make_console().print(render(trials, problems, load, time.monotonic() - started))
    body = {"trials": [asdict(trial) for trial in trials], "problems": problems}
    write_json(options.json, body)
    return 1 if verdicts(trials) or problems else 0


if __name__ == "__main__":
    sys.exit(main())
