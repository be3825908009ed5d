"""What each part does, and what it makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from bench.command import say
from bench.gpu import driver
from bench.gpu.life import Life, Strikes, under_load
from bench.gpu.repeats import repeated
from bench.gpu.results import Bar, Findings, ms
from bench.gpu.resumed import changes_of, taken_up
from bench.gpu.tokens import Judged
from elastic_daemon.errors import ElasticError
from watchdog.errors import NotRunning
from watchdog.status import read_status

FIRST_TOKEN_BAR_S, JOIN_BAR_S = 2.0, 2.0
HANG_BAR_S = 5.0
VERDICT_BAR_S = 0.25
"""From the wrong write: a driver takes 0.15 s to tell of it."""

FAULT_S = 8.0
REPEATED = 2
"""Streams that changed are asked for again, so many of a part."""
LEAK_BAR_MIB = 64.0
REST_S = 3.0
SHOWN = 5
REARRANGE_TIMEOUT_S = 60.0
LOOK_S = 2.0

COMPILED = r"JIT compilation during inference: (\w+)"
"""vLLM's warning; once in a process for each kernel."""
CAPTURED = r"(?i)graph captur\w+ finished|captur\w+ (cuda ?)?graphs?\b|CUDA graph pool memory"


@contextlib.asynccontextmanager
async def disturbed(life: Life, findings: Findings) -> AsyncIterator[Strikes]:
    """Under load; then all streams are judged, and all experts looked at."""
    compiled, before = len(life.logged(COMPILED)), await life.expert_bytes()
    async with under_load(life) as (strikes, judged):
        try:
            yield strikes
        finally:
            findings.figures["streams"] = counts(judged)  # all that is known where the part ends here
    wrong = await life.wrong_slots()
    findings.figures["streams"] = counts(judged)
    taken_in = {source: now - before.get(source, 0) for source, now in (await life.expert_bytes()).items()}
    findings.figures["bytes of experts by source"] = {source: taken for source, taken in taken_in.items() if taken}
    if meanwhile := life.logged(COMPILED)[compiled:]:
        names = Counter(re.findall(COMPILED, "\n".join(meanwhile)))
        findings.figures["kernels compiled meanwhile"] = dict(names)
        say(f"  kernels that were compiled meanwhile: {dict(names)}")
    findings.figures |= {"changes": judged.to_json()["changes"]} if judged.changes else {}
    findings.problems += [str(change) for change in judged.changes[:3]]
    findings.problems += [] if judged.changed else judged.examples[:3]
    findings.bars += [
        Bar("streams", ">=", 1, judged.streams),
        Bar("lost", "==", 0, judged.lost + judged.refused),
        Bar("changed", "==", 0, judged.changed),
        Bar("wrong expert slots", "==", 0, wrong),
    ]
    for change in judged.changes[:REPEATED]:
        findings.problems.append(str(await repeated(life, change)))
    if judged.changed and life.calm.get("staggered", {}).get("changed"):
        findings.problems.append("undisturbed streams of this life differ too")


def counts(judged: Judged) -> dict[str, Any]:
    body = judged.to_json()
    return {name: body[name] for name in ("streams", "lost", "refused", "changed", "near_ties")}


def victims(life: Life, trials: int) -> list[int]:
    """Rank 0 is the second of them, and any other than the first."""
    ranks = life.setting.ranks
    order = [ranks - 1, 0, *range(1, ranks - 1)] if ranks > 1 else [0]
    return [order[number % len(order)] for number in range(trials)]


async def _kills(life: Life, findings: Findings, strikes: Strikes, trials: int) -> None:
    for rank in victims(life, trials):
        trial = await strikes.kill(rank)
        findings.trials.append(trial)
        say(f"  SIGKILL of rank {rank}: {_line(trial)}")


def _ms(trial: dict[str, Any], name: str) -> str:
    return "-" if trial.get(name) is None else f"{ms(trial[name]):g}"


def _line(trial: dict[str, Any]) -> str:
    of = functools.partial(_ms, trial)
    joins = ", ".join(f"{ms(pause):g}" for pause in trial["join_pause_s"]) or "-"
    return (
        f"detected {of('detect_s')}, fence {of('fence_s')}, regroup {of('regroup_s')}, repair {of('repair_s')}, total "
        f"{of('total_s')}, first token {of('first_token_s')}, pause at join {joins}, back after {of('back_s')} ms"
    )


def strike_figures(findings: Findings) -> dict[str, float | None]:
    names = ("detect", "fence", "regroup", "repair", "resume", "total", "first_token", "back")
    worst = {name: findings.spread(name) for name in names}
    worst |= {name: findings.spread(name) for name in ("loss_pause", "join_pause")}
    return worst


async def kill(life: Life, findings: Findings, trials: int) -> None:
    async with disturbed(life, findings) as strikes:
        await _kills(life, findings, strikes, trials)
    worst = strike_figures(findings)
    findings.bars.append(Bar("kill to first token, s", "<=", FIRST_TOKEN_BAR_S, worst["first_token"]))


async def hang(life: Life, findings: Findings, trials: int) -> None:
    async with disturbed(life, findings) as strikes:
        for rank in victims(life, trials):
            trial = await strikes.stop(rank)
            findings.trials.append(trial)
            say(f"  SIGSTOP of rank {rank}: named {trial['named']}, {_line(trial)}")
    worst = strike_figures(findings)
    named = sum(trial["named"] == [trial["rank"]] == trial["excluded"] for trial in findings.trials)
    findings.bars += [
        Bar("hung rank alone named and excluded", "==", len(findings.trials), named),
        Bar("stop to exclusion, s", "<=", HANG_BAR_S, worst["detect"]),
    ]


async def xid(life: Life, findings: Findings, trials: int) -> None:
    """The signals file of this part makes an error of a program one of the GPU."""
    seen = driver.ask()
    if seen is not None and len(seen.gpus) <= life.setting.ranks:
        raise ElasticError(f"{life.setting.ranks} ranks on {len(seen.gpus)} GPUs: there is no spare one")
    async with disturbed(life, findings) as strikes:
        for rank in victims(life, trials):
            trial = await strikes.break_gpu(rank)
            findings.trials.append(trial)
            say(f"  Xid on the GPU of rank {rank}: verdict {_ms(trial, 'verdict_s')}, {_line(trial)}")
    worst = strike_figures(findings) | {"verdict": findings.spread("verdict")}
    right = sum(
        trial["named"] == [trial["gpu"]] and trial["excluded"] == [trial["rank"]] and trial["gpu_after"] != trial["gpu"]
        for trial in findings.trials
    )
    findings.bars += [
        Bar("the GPU alone named, its rank alone moved to another", "==", len(findings.trials), right),
        Bar("Xid to verdict, s", "<=", VERDICT_BAR_S, worst["verdict"]),
        Bar("Xid to first token, s", "<=", FIRST_TOKEN_BAR_S, worst["first_token"]),
    ]


async def rejoin(life: Life, findings: Findings, trials: int) -> None:
    async with disturbed(life, findings) as strikes:
        await _kills(life, findings, strikes, trials)
    worst = strike_figures(findings)
    findings.bars.append(Bar("pause at rejoin, s", "<=", JOIN_BAR_S, worst["join_pause"]))


async def scale(life: Life, findings: Findings, trials: int) -> None:
    ranks = life.setting.ranks
    async with disturbed(life, findings) as strikes:
        for _ in range(trials):
            for size in (life.setting.half, ranks):
                trial = await strikes.resize(size)
                findings.trials.append(trial)
                say(f"  to {size} ranks: {trial['took_s']:.1f} s, pauses {_pauses(trial)} ms")
    for name in ("took", "loss_pause", "other_pause"):
        findings.spread(name)
    findings.bars.append(Bar("pause at join, s", "<=", JOIN_BAR_S, findings.spread("join_pause")))


def _pauses(trial: dict[str, Any]) -> list[float]:
    return [ms(pause) for name in ("loss_pause_s", "join_pause_s", "other_pause_s") for pause in trial[name]]


async def eplb(life: Life, findings: Findings, trials: int) -> None:
    """Kills while experts are rearranged every few steps."""
    async with disturbed(life, findings) as strikes:
        await _rearranged(life, 1)
        for rank in victims(life, trials):
            before = len(_rearrangements(life))
            trial = await strikes.kill(rank)
            await _rearranged(life, len(_rearrangements(life)) + 1)
            trial["rearrangements"] = len(_rearrangements(life)) - before
            findings.trials.append(trial)
            say(f"  {trial['rearrangements']} rearrangements, SIGKILL of rank {rank}: {_line(trial)}")
    worst = strike_figures(findings)
    done = _rearrangements(life)
    findings.figures["rearrangements"] = len(done)
    # Synchronous balancing counts experts, balancing in the background bytes.
    for name in ("moved", "bytes"):
        findings.figures[f"in all {name}"] = sum(event.get(name, 0) for event in done)
    real = sum(bool(event.get("moved") or event.get("bytes")) for event in done)
    findings.figures["rearrangement ms, worst"] = max((ms(event["seconds"]) for event in done), default=None)
    findings.bars += [
        Bar("kill to first token, s", "<=", FIRST_TOKEN_BAR_S, worst["first_token"]),
        Bar("rearrangements that moved experts", ">=", 1, real),
    ]


def _rearrangements(life: Life) -> list[dict[str, Any]]:
    """As one rank after the other tells of them."""
    return life.logged_events("experts_rearranged")


async def _rearranged(life: Life, times: int) -> None:
    deadline = time.monotonic() + REARRANGE_TIMEOUT_S
    while len(_rearrangements(life)) < times:
        if time.monotonic() > deadline:
            raise ElasticError(f"no rearrangement of experts within {REARRANGE_TIMEOUT_S:g} s of load")
        await asyncio.sleep(0.2)


async def graphs(life: Life, findings: Findings, trials: int) -> None:
    await kill(life, findings, trials)
    if life.setting.device == "cuda":
        captured = life.logged(CAPTURED)
        findings.figures["lines of the log on captured graphs"] = len(captured)
        if captured:
            say(f"  {captured[-1][:300]}")
        else:
            findings.problems.append("the log does not tell that graphs were captured: were steps eager?")


async def fp8(life: Life, findings: Findings, trials: int) -> None:
    await kill(life, findings, trials)
    health = await life.daemon.health()
    findings.figures["model"] = f"{health['model']}, {life.setting.model}"


async def checkpoint(life: Life, findings: Findings, trials: int) -> None:
    """Kills of ranks that alone have some of the experts."""
    await kill(life, findings, trials)
    read = findings.figures["bytes of experts by source"].get("checkpoint", 0)
    findings.bars.append(Bar("bytes of experts from the checkpoint", ">=", 1, read))


async def ties(life: Life, findings: Findings, _: int) -> None:
    """How often a stream changes that is taken up elsewhere, without any fault."""
    found = [one for stream in life.reference for one in await taken_up(life, stream, life.setting.tokens)]
    others = changes_of(found)
    places = sorted({str(one.change) for one in others})
    findings.figures |= {"taken up": len(found), "with another token": len(others), "places": places}
    findings.bars.append(Bar("streams taken up from their middle", ">=", 1, len(found)))
    say(f"  {len(others)} of {len(found)} streams that were taken up from their middle have another token")
    for one in others[:SHOWN]:
        say(f"  {one}")


async def leak(life: Life, findings: Findings, trials: int) -> None:
    unit = "GPU MiB" if driver.ask() is not None else "PSS MiB (no GPU)"
    gpus = {str(row["gpu"]) for row in (await life.daemon.health())["ranks"]}
    await asyncio.sleep(REST_S)
    memory = [driver.memory_mib(gpus, life.pid)]
    say(f"  {unit}: {memory[0]:.0f}")
    for rank in victims(life, trials):
        async with under_load(life) as (strikes, judged):
            trial = await strikes.kill(rank)
        await asyncio.sleep(REST_S)
        memory.append(driver.memory_mib(gpus, life.pid))
        trial |= {"memory_mib": memory[-1], "lost": judged.lost + judged.refused, "changed": judged.changed}
        findings.trials.append(trial)
        findings.problems += [str(change) for change in judged.changes]
        say(f"  SIGKILL of rank {rank}, and back: {unit} {memory[-1]:.0f}")
    findings.figures[unit] = [round(one, 1) for one in memory]
    findings.figures["growth MiB"] = {"in all": memory[-1] - memory[0], "after the first cycle": memory[-1] - memory[1]}
    findings.bars += [
        Bar("lost", "==", 0, sum(trial["lost"] for trial in findings.trials)),
        Bar("changed", "==", 0, sum(trial["changed"] for trial in findings.trials)),
        Bar("growth after the first cycle, MiB", "<=", LEAK_BAR_MIB, memory[-1] - memory[1]),
    ]


async def nvml(life: Life, findings: Findings, _: int) -> None:
    runtime_dir = life.daemon.control.runtime_dir
    command = [sys.executable, "-m", "watchdog.cli", "status", "--runtime-dir", str(runtime_dir)]
    said = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=30, check=False)
    say("  " + said.stdout.strip().replace("\n", "\n  "))
    if said.returncode:
        findings.problems.append(f"elastic-watchdog status: {said.returncode}: {said.stderr.strip()[:300]}")
    await _bound(life, findings)
    verdicts: Counter[str] = Counter()
    async with disturbed(life, findings) as strikes:
        mark, until, next_word = strikes.feed.mark(), time.monotonic() + life.setting.watch_minutes * 60, 0.0
        while (left := until - time.monotonic()) > 0:
            with contextlib.suppress(NotRunning):
                status = read_status(runtime_dir)
                bad = [*status["gpus"], *status["ranks"]]
                verdicts.update(f"{one['verdict']}: {one['reason']}" for one in bad if one["verdict"] != "ok")
                findings.trials = [{"status": status}]
            if time.monotonic() >= next_word:
                next_word = time.monotonic() + 30
                say(f"  watched, {left:.0f} s left; verdicts so far: {dict(verdicts) or 'none'}")
            await asyncio.sleep(min(left, LOOK_S))
        events = strikes.feed.since(mark)
    acted = [event for event in events if event["event"] in ("verdict", "rank_excluded", "watchdog_down")]
    findings.figures |= {"minutes watched": life.setting.watch_minutes, "verdicts": dict(verdicts) or "none but ok"}
    findings.bars += [
        Bar("looks with a verdict", "==", 0, sum(verdicts.values())),
        Bar("verdicts sent, exclusions, deaths of the watchdog", "==", 0, len(acted)),
    ]
    findings.problems += [str(event)[:300] for event in acted[:2]]
    _answers(findings)
    await _error_of_a_program(life, findings)


async def _error_of_a_program(life: Life, findings: Findings) -> None:
    """Of one that is not ours, on the GPU of a rank that goes on working: heard, and nothing is done."""
    gpu = (await life.daemon.health())["ranks"][0]["gpu"]
    async with under_load(life) as (strikes, judged), life.page_fault(gpu) as break_it:
        mark = strikes.feed.mark()
        break_it()
        await asyncio.sleep(FAULT_S)
        events = strikes.feed.since(mark)
    heard = [event["number"] for event in life.logged_events("driver_event") if event["gpu"] == gpu]
    findings.figures["errors of another program heard"] = heard
    findings.figures["streams beside them"] = counts(judged)
    findings.problems += [str(change) for change in judged.changes[:3]] + judged.examples[:3]
    acted = [event for event in events if event["event"] == "rank_excluded" or event.get("act")]
    findings.bars += [
        Bar("errors of another program heard", ">=", 1, len(heard)),
        Bar("acts on them", "==", 0, len(acted)),
        Bar("streams beside them lost or changed", "==", 0, judged.lost + judged.refused + judged.changed),
    ]
    findings.problems += [str(event)[:300] for event in acted[:2]]


async def _bound(life: Life, findings: Findings) -> None:
    """Ranks are on the GPUs that the driver knows, and their processes are those that it sees."""
    health, seen = await life.daemon.health(), driver.ask()
    bound = {row["rank"]: row["gpu"] for row in health["ranks"]}
    findings.figures["GPUs of ranks"] = ", ".join(sorted({str(gpu) for gpu in bound.values()}))
    if seen is None:
        findings.figures["processes"] = "no real driver to ask"
        return
    mapping = driver.Mapping(
        {row["rank"]: pid for row in health["ranks"] for pid in row["pids"]},
        {pid: used for gpu in seen.gpus for pid, used in gpu.processes.items()},
    )
    findings.figures["processes"] = mapping.verdict
    say(f"  processes: {mapping.verdict}")
    known = {gpu.uuid for gpu in seen.gpus}
    findings.bars += [
        Bar("ranks bound to a GPU of the driver", "==", len(bound), sum(gpu in known for gpu in bound.values())),
        Bar("processes of the driver contradict ours", "==", False, not mapping.agrees),
    ]


def _answers(findings: Findings) -> None:
    """Which signals the driver gave a value for, in the last look."""
    gpus = findings.trials[-1]["status"]["gpus"] if findings.trials else []
    for gpu in gpus[:1]:
        readings = gpu["reading"]
        findings.figures["signals answered"] = sorted(name for name, value in readings.items() if value is not None)
        findings.figures["not supported"] = gpu["unsupported"]
        findings.figures["events heard"] = gpu["listening"]
    if not gpus:
        findings.problems.append("the watchdog saw no GPU")
