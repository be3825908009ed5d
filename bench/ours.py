"""Kills ranks of our daemon under load, two per life, and takes down what clients and daemon say about it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.measure import FaultResult, Kill, Undisturbed, judge
from bench.plan import RANKS, Fault, Phase
from elastic_daemon.commands.operator_commands import make_console
from elastic_daemon.drill.daemon import Daemon, Display, Victim, own_daemon, victims_of
from elastic_daemon.drill.load import prompts_for, run_streams, scheduling_probe
from elastic_daemon.drill.report import StreamResult
from elastic_daemon.errors import DaemonUnreachable, ElasticError

EARLY, MIDDLE, LATE = 0.1, 0.4, 0.75
"""Share of all tokens that have arrived at the kill."""

OPTIONS = ("--restore", "off")
"""What comes back would be there for the next kill of the same life, and its return would fall into it."""

START_TIMEOUT_S = 330.0
RUN_TIMEOUT_S = 120.0
SETTLE_TIMEOUT_S = 30.0
SETTLE_POLL_S = 0.1
REST_S = 0.5
"""Before each run, so that engines are idle and what the last run left to do does not count for the next."""

WARM_UP_TOKENS = 16


@dataclass
class Ours:
    """All raw results. `reference`: of the last life. `problems`: what kept a life from being lived to its end."""

    undisturbed: list[Undisturbed] = field(default_factory=list)
    faults: list[FaultResult] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    model: str = ""
    reference: list[StreamResult] = field(default_factory=list)


class Striker:
    """Sends the signals of one fault when their moments have come."""

    def __init__(self, fault: Fault, victims: Sequence[Victim], daemon: Daemon, tokens: int, prefill_s: float) -> None:
        self.kills: list[Kill] = []
        self._fault, self._daemon, self._prefill_s = fault, daemon, prefill_s
        self._victims = sorted(victims, key=lambda victim: fault.ranks.index(victim.rank))
        share = {Phase.EARLY: EARLY, Phase.LATE: LATE, Phase.BOTH: MIDDLE, Phase.DURING: MIDDLE}.get(fault.phase)
        self._left = None if share is None else max(1, round(share * tokens))
        self._at_once = len(self._victims) if fault.phase is not Phase.DURING else 1

    def token(self, _stream: int, count: int) -> None:
        """To be called with what clients receive."""
        if self._left is not None and not self.kills:
            self._left -= count
            if self._left <= 0:
                self.strike(self._at_once)

    def strike(self, victims: int) -> None:
        for victim in self._victims[len(self.kills) : len(self.kills) + victims]:
            kill = Kill(victim.rank, time.monotonic(), time.time())
            victim.kill()
            self.kills.append(kill)

    async def follow(self, since: int) -> None:
        """What has to happen beside the streams."""
        if self._fault.phase is Phase.PREFILL:
            await asyncio.sleep(self._prefill_s)
            self.strike(1)
        elif self._fault.phase is Phase.DURING:
            await self._recovery_started(since)
            await asyncio.sleep(self._fault.delay_s)
            self.strike(1)

    async def _recovery_started(self, since: int) -> None:
        control = self._daemon.control
        async with control.async_client() as client:
            headers = {"Accept": "text/event-stream"}
            url = f"{control.base_url}/events?since={since}"
            timeout = httpx.Timeout(RUN_TIMEOUT_S)
            async with client.stream("GET", url, headers=headers, timeout=timeout) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: ") and json.loads(line[6:])["event"] == "recovery_started":
                        return


class Life:
    """One daemon, from a reference run to its last fault."""

    def __init__(self, number: int, daemon: Daemon, streams: int, tokens: int) -> None:
        self._number, self._daemon, self._tokens = number, daemon, tokens
        self._prompts = prompts_for(streams)
        self.streams: list[StreamResult] = []

    async def reference(self) -> Undisturbed:
        await asyncio.wait_for(run_streams(self._daemon.url, self._prompts, WARM_UP_TOKENS), RUN_TIMEOUT_S)
        await asyncio.sleep(REST_S)
        async with scheduling_probe() as delays, asyncio.timeout(RUN_TIMEOUT_S):
            self.streams = await run_streams(self._daemon.url, self._prompts, self._tokens)
        return Undisturbed.of(self.streams, delays)

    async def suffer(self, fault: Fault) -> FaultResult:
        before = await self._daemon.health()
        since = max((event["id"] for event in await self._daemon.events()), default=0)
        await asyncio.sleep(REST_S)
        with victims_of(before, fault.ranks) as victims:
            striker = Striker(fault, victims, self._daemon, len(self._prompts) * self._tokens, self._prefill_s())
            async with scheduling_probe() as delays, asyncio.timeout(RUN_TIMEOUT_S):
                streams = await self._run(fault, striker, since)
        if not striker.kills:
            raise ElasticError("the streams ended before the first signal was due")
        events, reports = await self._settle(since, before["epoch"], [kill.rank for kill in striker.kills])
        return judge(self._number, fault, striker.kills, self.streams, streams, delays, events, reports)

    def _prefill_s(self) -> float:
        """When requests have reached the engines and none has its first token."""
        return min(stream.arrivals[0] - stream.started for stream in self.streams) / 2

    async def _run(self, fault: Fault, striker: Striker, since: int) -> list[StreamResult]:
        beside = asyncio.create_task(striker.follow(since))
        try:
            await asyncio.sleep(0)
            if fault.phase is Phase.IDLE:
                striker.strike(len(fault.ranks))
                await asyncio.sleep(fault.delay_s)
            streams = await run_streams(self._daemon.url, self._prompts, self._tokens, striker.token)
            if beside.done():
                beside.result()
            return streams
        finally:
            beside.cancel()
            with contextlib.suppress(asyncio.CancelledError, httpx.HTTPError):
                await beside

    async def _settle(
        self, since: int, epoch: int, killed: Sequence[int]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The events since the fault and the reports of its recoveries, once all is quiet again."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while True:
            health, events = await self._daemon.health(), await self._daemon.events(since)
            gone = {event["rank"] for event in events if event["event"] == "rank_excluded"}
            reports = {event["epoch"]: event for event in events if event["event"] == "recovery_done"}
            if (last := health.get("last_recovery")) and last["epoch"] > epoch:
                reports[last["epoch"]] = last
            if (gone.issuperset(killed) and reports and health["status"] in ("ok", "degraded")) or (
                time.monotonic() > deadline
            ):
                return events, [reports[number] for number in sorted(reports)]
            await asyncio.sleep(SETTLE_POLL_S)


async def run_ours(lives: Sequence[Sequence[Fault]], streams: int, tokens: int, say: Callable[[str], None]) -> Ours:
    """Live all `lives`. A life that cannot go on is recorded as a problem, and the next one begins."""
    ours = Ours()
    with Display(make_console(stderr=True)) as display:
        for number, faults in enumerate(lives, 1):
            say(f"ours, life {number} of {len(lives)}: {', '.join(fault.phase.value for fault in faults)}")
            limit = START_TIMEOUT_S + (len(faults) + 2) * (RUN_TIMEOUT_S + SETTLE_TIMEOUT_S)
            try:
                async with asyncio.timeout(limit), own_daemon(RANKS, display, OPTIONS) as daemon:
                    await _live(ours, Life(number, daemon, streams, tokens), faults, daemon, say)
            except (ElasticError, DaemonUnreachable, TimeoutError) as error:
                ours.problems.append(f"life {number}: {type(error).__name__}: {error}")
                say(f"  {ours.problems[-1]}")
    return ours


async def _live(ours: Ours, life: Life, faults: Sequence[Fault], daemon: Daemon, say: Callable[[str], None]) -> None:
    daemon.keep_log = True
    ours.model = (await daemon.health())["model"]
    reference = await life.reference()
    ours.undisturbed.append(reference)
    ours.reference = life.streams
    if reference.errors:
        raise ElasticError(f"{reference.errors} streams failed in the undisturbed run already")
    good = True
    for fault in faults:
        result = await life.suffer(fault)
        ours.faults.append(result)
        good = good and not (result.lost or result.changed or result.problems)
        say("  " + describe(result))
    daemon.keep_log = not good


def describe(result: FaultResult) -> str:
    """One line of progress."""
    ranks = " and ".join(map(str, result.fault.ranks))
    detected = ", ".join("never" if one is None else f"{one * 1000:.0f} ms" for one in result.detections_s)
    outage = "" if result.outage_s is None else f", outage {result.outage_s * 1000:.0f} ms"
    return (
        f"rank {ranks}, {result.fault.phase.value}: {result.lost} lost, {result.changed} changed, longest wait "
        f"{result.gap_s * 1000:.0f} ms (probe {result.probe.max * 1000:.0f} ms), detected {detected}{outage}"
        + "".join(f"; {problem}" for problem in (*result.problems, *result.differences)[:3])
    )
