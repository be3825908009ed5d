"""Whether a healthy deployment is left alone: load and noise for ten minutes, and nothing may come of it.

Starts a real daemon with four CPU ranks, a real watchdog and simulated GPUs, keeps it under a load of streams, and
makes noise: clocks that are lowered for seconds, corrected memory errors, Xids of the kind that programs cause, ranks
that stand still for half a second, a process that competes for the processor. Every exclusion, every other act of the
watchdog, and every stream that is lost or changed is a failure; so is noise that the watchdog has not even seen.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from bench.command import check_json_path, write_json
from bench.machine import Machine, load_average
from bench.soak_noise import Disturber, Made, Noise
from bench.watched import until_watched
from elastic_daemon.commands.operator_commands import make_console
from elastic_daemon.drill.daemon import Daemon, Display, own_daemon
from elastic_daemon.drill.load import prompts_for, run_streams, scheduling_probe
from elastic_daemon.drill.report import StreamResult, compare
from elastic_daemon.errors import ElasticError
from watchdog.errors import WatchdogError
from watchdog.status import read_status

EXAMPLES = """examples:
  python -m bench.soak                       ten minutes
  python -m bench.soak --minutes 1 --seed 7
  python -m bench.soak --json soak.json      all that was counted as well

exit status: 0 if nothing was excluded, acted on, lost or changed and all noise was seen, 1 if not, 2 for a wrong
argument."""

RANKS, STREAMS, TOKENS = 4, 6, 60
LOOK_S = 0.5
READY_S, RUN_S = 120.0, 180.0
"""How long the watchdog may take to see everything, and a round of streams to end."""
SHORT_MINUTES = 2.0
"""In less, some kinds of noise may not come up."""

DISTURBING = ("rank_excluded", "rank_draining", "rank_left_out", "recovery_started", "watchdog_down", "regrouping")
"""Events of a daemon that serves, of which there must be none."""


@dataclass
class Seen:
    """What the daemon and its watchdog said meanwhile."""

    verdicts: Counter[str] = field(default_factory=Counter)
    """'suspect xid:13' -> how many."""
    acted: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    """Those of DISTURBING, with their fields."""
    signals: set[str] = field(default_factory=set)

    def take(self, event: dict[str, Any]) -> None:
        if event["event"] == "verdict":
            what = f"{event['verdict']} {event.get('signal') or '-'}"
            self.verdicts[what] += 1
            self.signals |= {one["signal"] for one in event.get("evidence", ())}
            if event["verdict"] not in ("ok", "suspect"):
                self.acted.append(f"{what}: {event.get('reason', '')}{'' if event['act'] else ' (held back)'}")
        elif event["event"] in DISTURBING:
            fields = {name: value for name, value in event.items() if name not in ("id", "time", "event")}
            self.events.append(f"{event['event']} {fields}")


@dataclass
class Load:
    requests: int = 0
    tokens: int = 0
    lost: int = 0
    changed: int = 0
    longest_gap_s: float = 0.0
    examples: list[str] = field(default_factory=list)

    def take(self, reference: Sequence[StreamResult], streams: Sequence[StreamResult]) -> None:
        outcome = compare(reference, streams)
        self.requests += len(streams)
        self.tokens += sum(stream.tokens for stream in streams)
        self.lost += len(outcome.lost)
        self.changed += len({difference.stream for difference in outcome.differences})
        self.longest_gap_s = max(self.longest_gap_s, *(stream.longest_gap() for stream in streams))
        self.examples += [str(streams[number].error) for number in outcome.lost]
        self.examples += map(str, outcome.differences)


@dataclass
class Soak:
    """One run. `problem`: why it could not go on."""

    minutes: float
    seed: int
    made: Made = field(default_factory=Made)
    seen: Seen = field(default_factory=Seen)
    load: Load = field(default_factory=Load)
    lateness_s: float = 0.0
    problem: str | None = None


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=_positive, default=10.0, metavar="N", help="of noise (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was counted to FILE")
    return parser


def _positive(text: str) -> float:
    if not 0 < (number := float(text)) < 24 * 60:
        raise argparse.ArgumentTypeError(f"expected minutes above 0 and below a day, got {text}")
    return number


async def measure(soak: Soak) -> None:
    """Into `soak`; raises nothing that a daemon does."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with Display(make_console(stderr=True)) as display:
        try:
            async with own_daemon(RANKS, display) as daemon:
                daemon.keep_log = True
                await _soak(daemon, soak, display)
                daemon.keep_log = bool(wrong(soak))
        except (ElasticError, WatchdogError, RuntimeError, TimeoutError) as error:
            soak.problem = f"{type(error).__name__}: {error}"


async def _soak(daemon: Daemon, soak: Soak, display: Display) -> None:
    prompts = prompts_for(STREAMS)
    async with asyncio.timeout(RUN_S):
        reference = await run_streams(daemon.url, prompts, TOKENS)
    if bad := [stream.error for stream in reference if stream.error]:
        raise RuntimeError(f"the undisturbed run failed: {bad[0]}")
    await until_watched(daemon, READY_S)
    since = max(event["id"] for event in await daemon.events())
    disturber = Disturber(daemon, soak.seed)
    soak.made = disturber.made
    display.phase(f"noise for {soak.minutes:g} minutes")
    noise = asyncio.create_task(disturber.run())
    watch = asyncio.create_task(_watch(daemon, since, soak.seen))
    try:
        async with scheduling_probe() as delays:
            end = time.monotonic() + 60 * soak.minutes
            while time.monotonic() < end:
                async with asyncio.timeout(RUN_S):
                    soak.load.take(reference, await run_streams(daemon.url, prompts, TOKENS))
                display.show(f"{end - time.monotonic():.0f} s left, {soak.load.requests} requests")
                for task in (noise, watch):
                    if task.done():
                        raise RuntimeError(f"the noise or its observer ended: {task.exception()!r}")
                soak.lateness_s = max(soak.lateness_s, *(delay.seconds for delay in delays))
                delays.clear()
        await asyncio.sleep(2 * LOOK_S)  # what came last is still to be seen
    finally:
        for task in (noise, watch):
            task.cancel()
        await asyncio.gather(noise, watch, return_exceptions=True)


async def _watch(daemon: Daemon, since: int, seen: Seen) -> None:
    """Events of the daemon, and evidence that the watchdog has on record, as they come."""
    while True:
        for event in await daemon.events(since):
            since = max(since, event["id"])
            seen.take(event)
        status = await asyncio.to_thread(read_status, daemon.control.runtime_dir)
        for row in (*status["gpus"], *status["ranks"]):
            seen.signals |= {one["signal"] for one in row["evidence"]}
        await asyncio.sleep(LOOK_S)


def wrong(soak: Soak) -> list[str]:
    """What is not as it must be. Pure."""
    found = [f"it could not go on: {soak.problem}"] if soak.problem else []
    found += [f"the daemon was disturbed: {event}" for event in soak.seen.events]
    found += [f"a verdict that acts: {verdict}" for verdict in soak.seen.acted]
    if soak.load.lost or soak.load.changed:
        found.append(f"{soak.load.lost} streams lost, {soak.load.changed} changed: {soak.load.examples[:3]}")
    if not soak.load.requests:
        found.append("there was no load")
    if unseen := soak.made.expected - soak.seen.signals:
        found.append(f"noise that the watchdog has not seen: {', '.join(sorted(unseen))}")
    missing = [kind.value for kind in Noise if not soak.made.counts[kind]]
    if missing and soak.minutes >= SHORT_MINUTES:
        found.append(f"noise that was not made: {', '.join(missing)}")
    return found


def render(soak: Soak, load: float) -> Group:
    machine = Machine.here()
    made = Table("noise", "times", box=None)
    for kind in Noise:
        made.add_row(kind.value, str(soak.made.counts[kind]))
    verdicts = Table("verdict", "said", box=None)
    for verdict, count in sorted(soak.seen.verdicts.items()):
        verdicts.add_row(verdict, str(count))
    return Group(
        Text(
            f"{machine.cores} cores ({machine.processor}), Python {machine.python}; load average {load} at the start; "
            f"{soak.minutes:g} minutes, {RANKS} ranks, {STREAMS} streams of {TOKENS} tokens at once, seed {soak.seed}"
        ),
        made,
        Text(f"Xids: {', '.join(f'{code} x{count}' for code, count in sorted(soak.made.xids.items())) or 'none'}"),
        verdicts,
        Text(f"exclusions {sum(event.startswith('rank_excluded') for event in soak.seen.events)}, "
             f"verdicts that act {len(soak.seen.acted)}"),
        Text(f"requests {soak.load.requests}, lost {soak.load.lost}, changed {soak.load.changed}; "
             f"{soak.load.tokens} tokens, longest gap {soak.load.longest_gap_s * 1000:.0f} ms"),
        Text(f"longest stall made {soak.made.longest_stall_s * 1000:.0f} ms; worst lateness of this process's own "
             f"timers {soak.lateness_s * 1000:.0f} ms"),
        *(Text(f"not as it must be: {line}") for line in wrong(soak)),
    )  # fmt: skip


def as_json(soak: Soak) -> dict[str, Any]:
    made, seen, load = soak.made, soak.seen, soak.load
    return {
        "minutes": soak.minutes,
        "seed": soak.seed,
        "noise": {kind.value: made.counts[kind] for kind in Noise},
        "xids": {str(code): count for code, count in made.xids.items()},
        "verdicts": dict(seen.verdicts),
        "acted": seen.acted,
        "events": seen.events,
        "signals": sorted(seen.signals),
        "requests": load.requests,
        "tokens": load.tokens,
        "lost": load.lost,
        "changed": load.changed,
        "longest_gap_s": load.longest_gap_s,
        "longest_stall_s": made.longest_stall_s,
        "lateness_s": soak.lateness_s,
        "wrong": wrong(soak),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    check_json_path(parser(), options.json)
    soak, load = Soak(options.minutes, options.seed), load_average()
    try:
        asyncio.run(measure(soak))
    except (KeyboardInterrupt, asyncio.CancelledError):
        soak.problem = "stopped before the end"
    make_console().print(render(soak, load))
    write_json(options.json, as_json(soak))
    return 1 if wrong(soak) else 0


if __name__ == "__main__":
    sys.exit(main())
