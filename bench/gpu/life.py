"""One life of a daemon that several parts share, and what is done to its ranks under load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.changes import QUIET_S, Change, Kind, around
from bench.clocks import clock_offset_s
from bench.command import say
from bench.deployment import POLL_S, Deployment, Event, Feed, rejoined
from bench.exposition import samples_of
from bench.gpu.broken_gpu import page_fault
from bench.gpu.tokens import Judged, token_change
from bench.load import Load, Traffic, Window
from elastic_daemon.config import admin_header
from elastic_daemon.drill.daemon import Daemon, Display, own_daemon, victims_of
from elastic_daemon.drill.load import prompts_of, run_streams
from elastic_daemon.drill.report import StreamResult
from elastic_daemon.drill.sampling import samplings_for
from elastic_daemon.errors import ElasticError, StartError
from watchdog.errors import NotRunning
from watchdog.status import read_status

START_TIMEOUT_S = {"cuda": 280.0, "cpu": 180.0}
RUN_TIMEOUT_S = 120.0
CALM_S = 5.0
LOG_LINES = 40

EXPERT_BYTES = "elastic_expert_load_bytes_total"
VERIFY_TIMEOUT_S = 60.0
WATCHED_TIMEOUT_S = 120.0
"""An event of the driver counts for a minute."""

ALWAYS = ("--watchdog-flags=--max-exclusions 100",)
"""One rank after the other is lost here within minutes: the watchdog's breaker would stop that, as it should."""

GPU_ENVIRONMENT = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
REFUSED_STATUS = "exit status 2 "


class Refused(Exception):
    """The daemon does not start with these flags, and says why."""


@dataclass(frozen=True)
class Setting:
    """What all lives of a run have in common. `trials`: instead of each part's own number. `sampling`: of `MODES`."""

    device: str = "cuda"
    ranks: int = 4
    ranks_per_gpu: int | None = None
    serve_args: tuple[str, ...] = ()
    model: str | None = None
    streams: int = 8
    tokens: int = 120
    logprobs: int | None = None
    sampling: str = "greedy"
    watch_minutes: float = 5.0
    trials: int | None = None

    @property
    def serve_options(self) -> tuple[str, ...]:
        per_gpu = self.ranks_per_gpu or (self.ranks if self.device == "cuda" else 1)
        options = ("--device", self.device, "--ranks-per-gpu", str(per_gpu), *ALWAYS)
        # The bundled model is served so that half of the ranks can hold all experts; any other one has to be told.
        return options if self.model is None else (*options, "--survive-losses", str(self.ranks - self.half))

    @property
    def half(self) -> int:
        return max(1, self.ranks // 2)


@dataclass
class Life:
    """`reference`: an undisturbed run. `calm`: what streams were like without any disturbance."""

    daemon: Daemon
    setting: Setting
    log: Path
    start_s: float
    model: str = ""
    reference: list[StreamResult] = field(default_factory=list)
    calm: dict[str, Any] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        assert self.daemon.process is not None
        return self.daemon.process.pid

    async def undisturbed(self) -> None:
        """Twice, since the first run compiles kernels. Whether the two agree says what a changed token means later."""
        self.model = (await self.daemon.health())["model"]
        runs = []
        for _ in range(2):
            async with asyncio.timeout(RUN_TIMEOUT_S):
                runs.append(await self._streams())
            if errors := [stream.error for stream in runs[-1] if stream.error is not None]:
                raise ElasticError(f"{len(errors)} streams failed in the undisturbed run already: {errors[0]}")
        first, self.reference = runs
        changes = [token_change(one, other) for one, other in zip(first, self.reference, strict=True)]
        seconds = max(stream.ended for stream in self.reference) - min(stream.started for stream in self.reference)
        self.calm = {
            "tokens_per_s": round(sum(stream.tokens for stream in self.reference) / seconds, 1),
            "streams_that_differ": sum(change is not None for change in changes),
            "differences": [str(change) for change in changes if change is not None][:3],
        }
        async with under_load(self) as (strikes, judged):
            await asyncio.sleep(QUIET_S)
            since = time.monotonic()
            await asyncio.sleep(CALM_S)
            window = Window(since, time.monotonic())
        self.calm |= {"longest_wait_s": strikes.traffic.longest_wait(window), "staggered": judged.to_json()}
        say(
            f"  undisturbed: {self.calm['tokens_per_s']:g} tokens/s at once, longest wait "
            f"{self.calm['longest_wait_s'] * 1000:.0f} ms; {self.calm['streams_that_differ']} of {len(changes)} "
            f"streams differ between two runs, {judged.changed} of {judged.streams} when staggered"
        )

    async def _streams(self) -> list[StreamResult]:
        """All at once, as the setting has them."""
        setting = self.setting
        samplings = samplings_for(setting.sampling, setting.streams, setting.tokens)
        prompts = prompts_of(samplings)
        return await run_streams(
            self.daemon.url, prompts, setting.tokens, logprobs=setting.logprobs, samplings=samplings
        )

    def tail(self, lines: int = LOG_LINES) -> str:
        return tail(self.log, lines)

    def logged(self, pattern: str) -> list[str]:
        """Lines of the daemon's log that match."""
        return [line for line in self.log.read_text(errors="replace").splitlines() if re.search(pattern, line)]

    def logged_events(self, name: str) -> list[dict[str, Any]]:
        """Events of the daemon's log. Processes share it, so that a line may have two of them."""
        text = self.log.read_text(errors="replace")
        found = re.findall(rf'\{{[^{{}}]*"event": "{name}"[^{{}}]*\}}', text)
        return [json.loads(one) for one in found]

    def page_fault(self, gpu: str) -> AbstractAsyncContextManager[Callable[[], None]]:
        """See `bench.gpu.broken_gpu.page_fault`."""
        simulated = self.setting.device == "cpu"
        return page_fault(gpu, self.daemon.control.runtime_dir if simulated else None)

    async def expert_bytes(self) -> dict[str, int]:
        """Of experts that ranks have taken in, by source: peer, host, checkpoint."""
        async with self.daemon.control.async_client() as client:
            text = (await client.get(f"{self.daemon.control.base_url}/metrics")).text
        return {sample.labels["source"]: int(sample.value) for sample in samples_of(text, EXPERT_BYTES)}

    async def wrong_slots(self) -> int:
        """Expert slots that do not hold what they should, as the ranks say after a look at all of them."""
        control = self.daemon.control
        async with control.async_client() as client:
            answer = await client.get(
                f"{control.base_url}/experts/verify", headers=admin_header(), timeout=VERIFY_TIMEOUT_S
            )
        body = answer.json()
        if answer.status_code != 200:
            raise ElasticError(f"/experts/verify: {answer.status_code}: {body}")
        wrong = sum(len(slots) for slots in body["wrong_slots"].values())
        return wrong if wrong or body["ok"] else -1


def tail(log: Path, lines: int = LOG_LINES) -> str:
    """The end of a log; long lines are cut."""
    try:
        return "\n".join(line[:400] for line in log.read_text(errors="replace").splitlines()[-lines:])
    except OSError as error:
        return f"(no log: {error})"


@contextlib.asynccontextmanager
async def lived(
    setting: Setting, flags: Sequence[str], log: Path, display: Display, limit_s: float
) -> AsyncIterator[Life]:
    """A daemon that serves, with an undisturbed run behind it. Raises Refused, ElasticError, TimeoutError."""
    os.environ["ELASTIC_LOG_FORMAT"] = "json"
    if setting.device == "cuda":
        for name, value in GPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # vLLM warns of kernels that are compiled while it serves, and tells of the graphs that it captures.
        os.environ["VLLM_LOGGING_LEVEL"] = "WARNING" if "--enforce-eager" in flags else "INFO"
    if setting.model is not None:
        os.environ["ELASTIC_MODEL"] = setting.model
    options = (*setting.serve_options, *flags)
    say(f"starting a daemon: {setting.ranks} ranks, {' '.join(options)}; log {log}")
    started = time.monotonic()
    timeout = min(limit_s, START_TIMEOUT_S[setting.device])
    try:
        async with own_daemon(setting.ranks, display, options, log, timeout) as daemon:
            life = Life(daemon, setting, log, time.monotonic() - started)
            say(f"  serves after {life.start_s:.1f} s")
            await life.undisturbed()
            yield life
    except StartError as error:
        if REFUSED_STATUS in str(error):
            raise Refused(_reason(log)) from error
        raise


def _reason(log: Path) -> str:
    said = [line for line in tail(log, 200).splitlines() if line.startswith("elastic-daemon: ")]
    return said[-1].removeprefix("elastic-daemon: ") if said else tail(log, 5)


@contextlib.asynccontextmanager
async def under_load(life: Life) -> AsyncIterator[tuple[Strikes, Judged]]:
    """Clients stream all the while; how that went is complete at the end."""
    judged, feed = Judged(), Feed(life.daemon)
    load = Load(life.daemon.url, life.reference, judged, life.setting.logprobs)
    known = max((event["id"] for event in await life.daemon.events()), default=0)
    async with feed.followed(), load:
        # The feed begins with all that ever happened: none of that belongs to what is done now.
        await feed.until("earlier events", 0, lambda events: max((one["id"] for one in events), default=0) >= known)
        yield Strikes(life, feed, load.traffic), judged


class Strikes(Deployment):
    """What is done to the ranks of a life under load, as trials of a part."""

    def __init__(self, life: Life, feed: Feed, traffic: Traffic) -> None:
        super().__init__(life.daemon, feed, life.setting.ranks)
        self.traffic = traffic
        self._life = life

    async def kill(self, rank: int) -> dict[str, Any]:
        """SIGKILL, and wait until the rank is back."""
        mark = self.feed.mark()
        return await self._trial(rank, "SIGKILL", mark, await self.rejoin(rank))

    async def stop(self, rank: int) -> dict[str, Any]:
        """SIGSTOP, and wait until the rank has been fenced, and another process has taken its place."""
        await self.until_watched()
        mark = self.feed.mark()

        async def act() -> float:
            with victims_of(await self.daemon.health(), [rank]) as victims:
                at = time.monotonic()
                for pid in victims[0].pids:
                    os.kill(pid, signal.SIGSTOP)
            return at

        change = await self._change(Kind.REJOIN, act, f"return of rank {rank}, stopped", rejoined(rank))
        events = self.feed.since(mark)
        named = [event for event in events if event["event"] == "verdict" and event.get("act")]
        trial = await self._trial(rank, "SIGSTOP", mark, change)
        return {**trial, "named": [event.get("rank") for event in named], "by": [one.get("signal") for one in named]}

    async def break_gpu(self, rank: int) -> dict[str, Any]:
        """Its GPU reports an error; wait until the rank is back on another one."""
        await self.until_watched()
        gpu, mark, clock_s = await self._gpu_of(rank), self.feed.mark(), clock_offset_s()
        async with self._life.page_fault(gpu) as break_it:

            async def act() -> float:
                at = time.monotonic()
                break_it()
                return at

            change = await self._change(Kind.SPARE, act, f"return of rank {rank}, off {gpu}", rejoined(rank))
        verdicts = [one for one in self.feed.since(mark) if one["event"] == "verdict" and one.get("act")]
        trial = await self._trial(rank, "Xid", mark, change)
        return {
            **trial,
            "verdict_s": verdicts[0]["time"] + clock_s - change.at if verdicts else None,
            "named": [event.get("gpu") for event in verdicts],
            "gpu": gpu,
            "gpu_after": await self._gpu_of(rank),
        }

    async def resize(self, ranks: int) -> dict[str, Any]:
        """Scale by order, and wait until so many serve."""
        kind = Kind.DOWN if ranks < self.ranks else Kind.UP
        change = await self.scale(kind, ranks)
        return {"to": ranks, "took_s": change.seconds, **pauses(change, self.traffic)}

    async def _trial(self, rank: int, how: str, mark: int, change: Change) -> dict[str, Any]:
        trial = strike_of(rank, change, self.feed.since(mark), clock_offset_s(), self.traffic)
        last = (await self.daemon.health())["last_shrink"] or {}
        return {"rank": rank, "how": how, **trial, "cause": last.get("cause"), "requests": last.get("requests")}

    async def until_watched(self) -> None:
        """The watchdog reads the page of every rank in this epoch, and has no complaint of any rank or GPU."""
        deadline, why = time.monotonic() + WATCHED_TIMEOUT_S, "no status"
        while time.monotonic() < deadline:
            with contextlib.suppress(NotRunning):
                status, health = read_status(self.daemon.control.runtime_dir), await self.daemon.health()
                findings = [rank["finding"] for rank in status["ranks"]]
                doubts = [gpu["uuid"] for gpu in status["gpus"] if gpu["verdict"] != "ok"]
                why = f"epoch {status['epoch']} of {health['epoch']}, findings {findings}, GPUs in doubt {doubts}"
                if status["epoch"] == health["epoch"] and findings == ["ok"] * self.ranks and not doubts:
                    return
            await asyncio.sleep(POLL_S)
        raise ElasticError(f"the watchdog does not see all well after {WATCHED_TIMEOUT_S:g} s: {why}")


def pauses(change: Change, traffic: Traffic) -> dict[str, Any]:
    """The longest wait of any client around each regroup."""
    losses, joins = change.of_kind("shrink"), change.of_kind("grow")
    others = [window for kind, window in zip(change.kinds, change.regroups, strict=True) if kind == "regroup"]
    return {
        "loss_pause_s": [traffic.longest_wait(around(window)) for window, _ in losses],
        "join_pause_s": [traffic.longest_wait(around(window)) for window, _ in joins],
        "other_pause_s": [traffic.longest_wait(around(window)) for window in others],
        "phases": [{"kind": kind, **part} for kind, part in zip(change.kinds, change.parts, strict=True)],
        "probe_s": change.delay,
    }


def strike_of(rank: int, change: Change, events: Sequence[Event], clock_s: float, traffic: Traffic) -> dict[str, Any]:
    """One rank that was struck, and came back. `clock_s`: monotonic time minus time of day. None: not seen.

    `first_token_s`: to the first token from a survivor; what arrives before the group resumes had been computed before.
    """
    gone = [event["time"] + clock_s for event in events if event["event"] == "rank_excluded" and event["rank"] == rank]
    shrinks = [event for event in events if event["event"] == "recovery_done" and event["kind"] == "shrink"]
    found: dict[str, Any] = {
        "detect_s": gone[0] - change.at if gone else None,
        "first_token_s": None,
        "back_s": change.seconds,
        "excluded": sorted({event["rank"] for event in events if event["event"] == "rank_excluded"}),
        **pauses(change, traffic),
    }
    if shrinks:
        seconds: Mapping[str, float] = shrinks[0]["seconds"]
        resumed_at = shrinks[0]["time"] - seconds.get("resume", 0.0) + clock_s
        after = bisect_right(traffic.ends, resumed_at)
        if after < len(traffic.ends):
            found["first_token_s"] = traffic.ends[after] - change.at
        found |= {f"{phase}_s": spent for phase, spent in seconds.items() if phase != "detect"}
    return found
