"""Part `straggler`: other processes compute on the GPU of one rank, which is to be named for as long, and kept."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from bench.command import say
from bench.gpu.drills import disturbed, victims
from bench.gpu.life import Life, Strikes
from bench.gpu.programs import START_S, programs_on
from bench.gpu.results import Bar, Findings
from watchdog.errors import NotRunning
from watchdog.heartbeat.layout import Snapshot
from watchdog.heartbeat.reader import PageDirectory
from watchdog.status import read_status

NAMED_BAR_S, CLEARED_BAR_S = 60.0, 30.0
BURNERS = 3
"""Processes that take turns with the rank, each about 1 GiB. So it has a quarter of its GPU while it computes."""

CALM_S, NAMED_FOR_S, LOOK_S = 12.0, 6.0, 0.2
BURN_S = START_S + NAMED_BAR_S + NAMED_FOR_S + 30.0
BURNER = Path(__file__).with_name("burner.py")

Slow = Mapping[int, float | None]
"""Ranks that the watchdog calls stragglers, with their slowdown."""


async def straggler(life: Life, findings: Findings, trials: int) -> None:
    gpus = {row["rank"]: row["gpu"] for row in (await life.daemon.health())["ranks"]}
    if life.setting.device != "cuda" or None in gpus.values() or len(set(gpus.values())) < len(gpus):
        findings.refused = (
            "each rank needs a GPU of its own (--ranks-per-gpu 1): ranks that take turns on one are not compared; "
            "CPU ranks: python -m bench.straggler"
        )
        return
    async with disturbed(life, findings) as strikes:
        mark = strikes.feed.mark()
        for rank in victims(life, trials):
            findings.trials.append(trial := await _trial(life, strikes, rank, gpus[rank]))
            say(f"  {BURNERS} burners beside rank {rank}: {_line(trial)}")
        events = strikes.feed.since(mark)
    findings.figures["GPUs of ranks"] = len(set(gpus.values()))
    alone = sum(trial["named"] == [trial["rank"]] for trial in findings.trials)
    findings.bars += [
        Bar("the slow rank alone was named", "==", trials, alone),
        Bar("named before anything was done", "==", 0, sum(len(trial["named_before"]) for trial in findings.trials)),
        Bar("burn to name, s", "<=", NAMED_BAR_S, _worst(findings, "named")),
        Bar("end of burn to no name, s", "<=", CLEARED_BAR_S, _worst(findings, "cleared")),
        Bar("exclusions", "==", 0, sum(event["event"] == "rank_excluded" for event in events)),
    ]


def _worst(findings: Findings, name: str) -> float | None:
    """None if it did not come to that in some trial."""
    worst = findings.spread(name)
    return None if any(trial[f"{name}_s"] is None for trial in findings.trials) else worst


def _line(trial: Mapping[str, Any]) -> str:
    def of(name: str) -> str:
        return "never" if trial[name] is None else f"after {trial[name]:.1f} s"

    lines = [f"named {trial['named']} {of('named_s')}, slowdown {trial['slowdown']}, no more {of('cleared_s')}"]
    for name in ("calm", "burning", "after"):
        lines.append(f"    {name:8} {trial[name]}")
    return "\n".join(lines)


async def _trial(life: Life, strikes: Strikes, rank: int, gpu: str) -> dict[str, Any]:
    await strikes.until_watched()
    runtime_dir = life.daemon.control.runtime_dir
    named: set[int] = set()
    with contextlib.closing(Pages(runtime_dir)) as pages:
        await until(runtime_dir, CALM_S, named, lambda _: False)
        before, named, calm = sorted(named), set(), pages.since_last()
        async with burning(gpu):
            pages.since_last()
            named_s = await until(runtime_dir, NAMED_BAR_S, named, lambda slow: rank in slow)
            if named_s is not None:
                await until(runtime_dir, NAMED_FOR_S, named, lambda _: False)
            slowdown, busy = slow_ranks(runtime_dir).get(rank), pages.since_last()
        cleared_s = await until(runtime_dir, CLEARED_BAR_S, named, lambda slow: not slow)
        pages.since_last()
        await asyncio.sleep(CALM_S / 4)
        after = pages.since_last()
    return {
        "rank": rank,
        "named": sorted(named),
        "named_before": before,
        "named_s": named_s,
        "cleared_s": cleared_s,
        "slowdown": slowdown,
        "calm": calm,
        "burning": busy,
        "after": after,
    }


def burning(gpu: str) -> AbstractAsyncContextManager[object]:
    """Meanwhile the GPU computes for others. Raises ElasticError if that does not come about."""
    return programs_on(gpu, BURNER, str(BURN_S), says="burning", count=BURNERS)


async def until(runtime_dir: Path, seconds: float, named: set[int], true: Callable[[Slow], bool]) -> float | None:
    """Time until `true` of the ranks that are called slow; None: not within `seconds`. All go to `named`."""
    started = time.monotonic()
    while (spent := time.monotonic() - started) < seconds:
        slow = slow_ranks(runtime_dir)
        named.update(slow)
        if true(slow):
            return spent
        await asyncio.sleep(LOOK_S)
    return None


def slow_ranks(runtime_dir: Path) -> Slow:
    with contextlib.suppress(NotRunning):
        return {
            one["rank"]: _slowdown(one) for one in read_status(runtime_dir)["ranks"] if one["finding"] == "straggler"
        }
    return {}


def _slowdown(rank: Mapping[str, Any]) -> float | None:
    for evidence in rank["evidence"]:
        if evidence["signal"] == "straggler":
            slowdown: float | None = evidence["detail"].get("slowdown")
            return slowdown
    return None


class Pages:
    """What the ranks' pages say of a stretch of time, for whoever chooses thresholds."""

    def __init__(self, runtime_dir: Path) -> None:
        self._pages = PageDirectory(runtime_dir)
        self._last: dict[int, Snapshot] = {}
        self._at = time.monotonic()
        self.since_last()

    def close(self) -> None:
        self._pages.close()

    def since_last(self) -> list[dict[str, Any]]:
        """By rank: microseconds per timed collective, timed collectives, steps and milliseconds per step."""
        pages = {page.rank: page for page in self._pages.read()[0]}
        last, self._last = self._last, pages
        before, self._at = self._at, time.monotonic()
        pairs = ((last[rank], page) for rank, page in sorted(pages.items()) if rank in last)
        return [stretch(old, new, self._at - before) for old, new in pairs]


def stretch(old: Snapshot, new: Snapshot, seconds: float) -> dict[str, Any]:
    timed, steps = new.timed - old.timed, new.step - old.step

    def each(name: str) -> float | None:
        return round((getattr(new, name) - getattr(old, name)) / 1e3 / timed, 1) if timed > 0 else None

    return {
        "rank": new.rank,
        "worked us": each("worked_ns"),
        "starved us": each("starved_ns"),
        "waited us": each("waited_ns"),
        "timed": timed,
        "steps": steps,
        "step ms": round(seconds * 1e3 / steps, 2) if steps > 0 else None,
    }
