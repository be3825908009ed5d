"""A simulated group of ranks and what a reader sees on their pages, at any time. Times in seconds."""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Iterator, Set
from dataclasses import dataclass, field, replace
from enum import StrEnum

from watchdog.heartbeat.culprit import HeartbeatJudge
from watchdog.heartbeat.findings import Finding
from watchdog.heartbeat.layout import WORD_MASK, Collective, Phase, ProcessState, Snapshot

LATENCY_S = 0.0005
IDLE_BEAT_S = 0.2
LOOK_UP_S = 0.05
KINDS = (Collective.DISPATCH, Collective.COMBINE)


class Where(StrEnum):
    COMPUTING = "computing"
    INSIDE = "inside"
    IDLE = "idle"


@dataclass(frozen=True)
class Hang:
    """From collective number `at` on, this rank does nothing any more. `stopped`: the kernel says so (SIGSTOP)."""

    rank: int
    at: int
    where: Where = Where.COMPUTING
    stopped: bool = False


@dataclass
class World:
    """`stalls`: per rank, when its process does not run (start, length). `idle`: before which collectives the group is
    idle, and for how long. `first`: what the counters start from, to have them wrap around."""

    seed: int
    ranks: int = 4
    work_s: float = 0.01
    slowdown: dict[int, float] = field(default_factory=dict)
    stalls: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    idle: dict[int, float] = field(default_factory=dict)
    hangs: tuple[Hang, ...] = ()
    look_up: bool = True
    first: int = 0
    end_s: float = 10.0
    epoch: int = 3

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self.hung_at: dict[int, float] = {}
        self._pages: list[list[Snapshot]] = []
        self._times: list[list[float]] = []
        for rank in range(self.ranks):
            page = Snapshot(rank, 10 + rank, 100 + rank, epoch=self.epoch, phase=Phase.IDLE)
            self._pages.append([replace(page, entered=(self.first, 0, 0, 0), completed=(self.first, 0, 0, 0))])
            self._times.append([0.0])
        self._simulate()

    def see(self, now_s: float) -> list[Snapshot]:
        seen = []
        for rank in range(self.ranks):
            page = self._pages[rank][bisect.bisect_right(self._times[rank], now_s) - 1]
            hang = next((hang for hang in self.hangs if hang.rank == rank), None)
            stopped = hang is not None and hang.stopped and now_s >= self.hung_at.get(rank, math.inf)
            stopped |= any(start <= now_s < start + length for start, length in self.stalls.get(rank, ()))
            seen.append(replace(page, process=ProcessState.STOPPED if stopped else ProcessState.RUNNING))
        return seen

    def _simulate(self) -> None:
        free = [0.0] * self.ranks
        number = 0
        while max(free) < self.end_s:
            idle_hang = self._idle(number, free)
            kind = KINDS[number % 2]
            entered = [self._enter(rank, number, kind, free[rank]) for rank in range(self.ranks)]
            done = max(entered)
            inside = self._hang(number, Where.INSIDE)
            for hang in inside:
                self.hung_at[hang.rank] = entered[hang.rank]
            if idle_hang or inside or math.isinf(done):
                self._wait(entered, self.end_s + 10.0, skip={hang.rank for hang in self.hangs})
                return
            self._wait(entered, done)
            free = [self._complete(rank, kind, done) for rank in range(self.ranks)]
            number += 1

    def _idle(self, number: int, free: list[float]) -> bool:
        hanging = {hang.rank for hang in self._hang(number, Where.IDLE)}
        until = max(free) + (10.0 if hanging else self.idle.get(number, 0.0))
        if number not in self.idle and not hanging:
            return False
        for rank in range(self.ranks):
            now = free[rank]
            self._write(rank, now, phase=Phase.IDLE)
            if rank in hanging:
                self.hung_at[rank] = now
                free[rank] = math.inf
                continue
            while (now := self._run(rank, now, IDLE_BEAT_S)) < until:
                self._write(rank, now)
            free[rank] = self._run(rank, until, 0.0)
        return bool(hanging)

    def _enter(self, rank: int, number: int, kind: Collective, free: float) -> float:
        if math.isinf(free):
            return math.inf
        self._write(rank, free, step=number, phase=Phase.DECODE)
        if any(hang.rank == rank for hang in self._hang(number, Where.COMPUTING)):
            self.hung_at[rank] = free
            return math.inf
        work = self.work_s * self.slowdown.get(rank, 1.0) * self._random.uniform(0.7, 1.3)
        now = self._run(rank, free, work)
        page = self._pages[rank][-1]
        worked_ns = page.worked_ns + int(1e9 * (now - free))
        self._write(rank, now, entered=_more(page.entered, kind), worked_ns=worked_ns)
        return now

    def _complete(self, rank: int, kind: Collective, done: float) -> float:
        now = self._run(rank, max(done, self._times[rank][-1]), LATENCY_S)
        page = self._pages[rank][-1]
        self._write(rank, now, completed=_more(page.completed, kind), timed=page.timed + 1)
        return now

    def _wait(self, entered: list[float], until: float, skip: Set[int] = frozenset()) -> None:
        for rank in range(self.ranks):
            if rank in skip or not self.look_up or math.isinf(entered[rank]):
                continue
            now = entered[rank]
            while (now := self._run(rank, now, LOOK_UP_S)) < until:
                self._write(rank, now)

    def _run(self, rank: int, now: float, seconds: float) -> float:
        """When a rank that needs this long gets it done, its stalls included."""
        for start, length in self.stalls.get(rank, ()):
            if start + length <= now:
                continue
            if start > now + seconds:
                break
            seconds -= max(start - now, 0.0)
            now = start + length
        return now + seconds

    def _hang(self, number: int, where: Where) -> list[Hang]:
        return [hang for hang in self.hangs if hang.at == number and hang.where is where]

    def _write(self, rank: int, now: float, **changes: object) -> None:
        page = self._pages[rank][-1]
        self._pages[rank].append(replace(page, sequence=page.sequence + 2, **changes))  # type: ignore[arg-type]
        self._times[rank].append(now)


def _more(counters: tuple[int, int, int, int], kind: Collective) -> tuple[int, int, int, int]:
    values = list(counters)
    values[kind] = (values[kind] + 1) & WORD_MASK
    return values[0], values[1], values[2], values[3]


def watch(
    world: World, judge: HeartbeatJudge, period_s: float = 0.1, reader_stalls: list[tuple[float, float]] | None = None
) -> Iterator[tuple[float, list[Finding]]]:
    """What the judge finds at each observation, until the end. The reader may stall, its schedule jitters."""
    jitter = random.Random(world.seed + 1)
    now = 0.0
    while now < world.end_s + 4.0:
        now += period_s * jitter.uniform(0.9, 1.3)
        for start, length in reader_stalls or ():
            if start <= now < start + length:
                now = start + length
        yield now, judge.observe(1000.0 + now, world.see(now), world.epoch)
