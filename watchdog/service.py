"""The watchdog process: children that ask the driver, heartbeats, judgement, the daemon.

One event loop and four tasks: the watch (ten times a second: deadlines, heartbeats, judgement), the daemon's bindings
(once a second), delivery of rulings, and the state file. What a child reports is judged when it comes, so an Xid needs
no turn of any loop. If a task fails, the process ends: something that watches must not be half alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from watchdog.bindings import Bindings
from watchdog.daemon_client import DaemonClient
from watchdog.delivery import Delivery
from watchdog.docket import Docket, Mode, Present, Ruling, Target
from watchdog.errors import DaemonError, StartError, StateError
from watchdog.fitness import Fitness, Hearing, Occupancy, judge_fitness
from watchdog.heartbeats import Heartbeats
from watchdog.logs import log
from watchdog.memory import give_back
from watchdog.notify import Notifier, Supervision
from watchdog.probe import ProbePolicy, Prober, child_environment
from watchdog.signals import SignalTable
from watchdog.state import State
from watchdog.status import WRITE_S, describe, status_path, write_status
from watchdog.verdict import Policy, Verdict, as_json

WATCH_S = 0.1
DRIVER_S = 10.0
"""A driver that has said nothing for so long does not keep the ranks from being watched: it counts as started."""

STOP_S = 15.0
"""An orderly end takes less."""

BINDINGS_S = 1.0
LOCK_NAME = "watchdog.lock"


@dataclass(frozen=True)
class Settings:
    runtime_dir: Path
    state_dir: Path
    table: SignalTable
    mode: Mode = Mode.ACT
    policy: Policy = field(default_factory=Policy)
    probe: ProbePolicy = field(default_factory=ProbePolicy)
    driver_environment: Mapping[str, str] = field(default_factory=dict)
    """Of the NVML children only."""


class Service:
    """One watchdog. `run` returns when SIGTERM or SIGINT comes."""

    def __init__(self, settings: Settings) -> None:
        """Raises StartError and StateError."""
        self._settings = settings
        self._lock = _lock(settings.runtime_dir)
        self._state = State.load(settings.state_dir)
        self._docket = Docket(settings.table, settings.policy, settings.mode, self._state)
        self._heartbeats = Heartbeats()
        self._prober = Prober(
            child_environment(settings.driver_environment), self, settings.probe, set(self._state.gpus)
        )
        self._client = DaemonClient(settings.runtime_dir)
        self._started = time.time()
        self._delivery = Delivery(self._client, self)
        self._notifier = Notifier(Supervision.take())
        self._hearing = Hearing()
        self._occupancy = Occupancy()
        self._fitness: tuple[Fitness, ...] | None = None
        self._read_bindings = asyncio.Event()
        self._asked_for: tuple[str | None, int] | None = None
        self._daemon_error: str | None = "not asked yet"
        self._stop = asyncio.Event()
        self._written = 0.0
        self._sentence = ""

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        log.info(
            "watchdog_started",
            pid=os.getpid(),
            mode=self._settings.mode.value,
            runtime_dir=str(self._settings.runtime_dir),
        )
        give_back()
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(task)
                    for task in (self._watch(), self._bind(), self._delivery.run(), self._keep_state())
                ]
                await self._stop.wait()
                self._notifier.stopping(STOP_S)
                for task in running:
                    task.cancel()
        finally:
            self._prober.close()
            self._heartbeats.close()
            if self._state.dirty:
                self._state.save()
            status_path(self._settings.runtime_dir).unlink(missing_ok=True)
            log.info("watchdog_stopped")

    # What the children found (probe.Sink):

    def listed(self, gpus: Mapping[str, Mapping[str, Any]], absent: Iterable[str], driver: str, now: float) -> None:
        present = {
            uuid: Present(gpu["index"], gpu["name"], tuple(gpu["missing"]), gpu["slot"]) for uuid, gpu in gpus.items()
        }
        self._docket.see_gpus(present, absent, now)
        for uuid in gpus:
            self._state.see(uuid, time.time())
        self._review()

    def readings(self, readings: Mapping[str, Mapping[str, Any]], now: float) -> None:
        for gpu, reading in readings.items():
            self._docket.gpu(gpu).observer.observe(reading, now)
        self._review()

    def event(self, gpu: str, signal: str, number: int, now: float) -> None:
        log.info("driver_event", gpu=gpu, signal=signal, number=number if signal == "xid" else None)
        if self._docket.see_event(gpu, signal, number, now):
            self._prober.poll_now()
        self._review()

    def condition(self, gpu: str, signal: str, holds: bool, now: float, detail: Mapping[str, Any]) -> None:
        if self._docket.gpu(gpu).log.hold(signal, holds, now, **detail):
            log.info("driver_condition", gpu=gpu, signal=signal, holds=holds, **detail)
        self._review()

    def late(self, gpu: str, now: float, detail: Mapping[str, Any]) -> None:
        self._docket.gpu(gpu).log.occur("driver_late", now, **detail)
        self._review()

    # What the delivery asks (delivery.Sender):

    def fitness(self) -> tuple[Fitness, ...] | None:
        now = time.monotonic()
        heard = self._hearing.heard(now)
        if heard is None or not self._prober.listed:
            return None
        return judge_fitness(self._docket, self._prober.present, heard, self._occupancy.occupied(now))

    def judge_again(self, target: Target, bindings: Bindings) -> None:
        self._docket.say_again([target])
        self._docket.bind(bindings)
        self._review()

    async def _watch(self) -> None:
        begin = time.monotonic()
        while True:
            now = time.monotonic()
            self._prober.tick(now)
            self._hearing.note(self._prober.listening, self._prober.present, now)
            self._note_processes(now)
            self._heartbeats.observe(self._docket.bindings, self._docket, now)
            self._follow_epoch()
            self._review()
            if now - self._written >= WRITE_S:
                self._written = now
                status = self._status()
                write_status(self._settings.runtime_dir, status)
                self._sentence = describe(status)
            heard = self._prober.listed or self._prober.trouble is not None
            self._notifier.turn(lambda: self._sentence, serving=heard or now - begin > DRIVER_S)
            await asyncio.sleep(max(0.0, now + WATCH_S - time.monotonic()))

    async def _bind(self) -> None:
        """Follow the daemon's bindings. It may come later, go, and come back: that is waited for without end."""
        while True:
            try:
                self._rebind(await self._client.bindings())
            except DaemonError as error:
                self.lose_daemon(str(error))
            self._read_bindings.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BINDINGS_S):
                    await self._read_bindings.wait()

    def _follow_epoch(self) -> None:
        """Ranks are in a newer epoch than the bindings: read them now. Asked once for each, should they disagree."""
        newest = (self._docket.bindings.instance, self._heartbeats.newest_epoch)
        if newest[1] > self._docket.bindings.epoch and newest != self._asked_for:
            self._asked_for = newest
            self._read_bindings.set()

    def _rebind(self, bindings: Bindings) -> None:
        known = self._docket.bindings
        if self._daemon_error is not None or bindings.instance != known.instance or bindings.epoch < known.epoch:
            log.info("daemon_reached", epoch=bindings.epoch, ranks=len(bindings.ranks))
            self._daemon_error = None
            self._docket.say_again()  # whoever answers may be another one, which knows nothing
            self._delivery.put_gpus()
        if bindings != self._docket.bindings:
            self._docket.bind(bindings)
            self._prober.expect({one.gpu for one in bindings.ranks if one.gpu})
            self._docket.see_gpus({}, self._prober.absent, time.monotonic())
        self._review()

    def lose_daemon(self, error: str) -> None:
        if self._daemon_error in (None, "not asked yet"):
            log.warning("daemon_unreachable", error=error)
        self._daemon_error = error

    async def _keep_state(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            if self._state.dirty:
                try:
                    await asyncio.to_thread(self._state.save, self._state.snapshot())
                except StateError as error:
                    log.error("state_not_saved", error=str(error))
                    await asyncio.sleep(5.0)

    def _review(self) -> None:
        for ruling in self._docket.review(time.monotonic(), time.time()):
            self._say(ruling)
            self._delivery.put(ruling)
        self._note_fitness()

    def _note_processes(self, now: float) -> None:
        if self._daemon_error is None:  # else nobody says which of them are ranks
            readings = {uuid: case.observer.reading for uuid, case in self._docket.gpus.items()}
            processes = {uuid: reading.get("processes", ()) for uuid, reading in readings.items()}
            self._occupancy.note(processes, self._docket.bindings, now)

    def _note_fitness(self) -> None:
        fitness = self.fitness()
        known = [gpu.key for gpu in self._fitness or ()]
        if fitness is not None and (self._fitness is None or [gpu.key for gpu in fitness] != known):
            self._fitness = fitness
            self._delivery.put_gpus()

    def _say(self, ruling: Ruling) -> None:
        say = log.warning if ruling.verdict.acts else log.info
        say("verdict", **ruling.for_log())

    def _status(self) -> dict[str, Any]:
        now, wall = time.monotonic(), time.time()
        docket, prober = self._docket, self._prober
        bound = docket.bound(now)
        policy = self._settings.policy
        return {
            "pid": os.getpid(),
            "started": round(self._started, 3),
            "written": round(wall, 3),
            "mode": self._settings.mode.value,
            "epoch": docket.bindings.epoch,
            "daemon": {
                "reachable": self._daemon_error is None,
                "error": self._daemon_error,
                "pending": self._delivery.pending,
            },
            "driver": {
                "version": prober.driver,
                "trouble": prober.trouble,
                "children": prober.pids,
                "stuck": prober.stuck,
                "isolated": sorted(prober.isolated),
                "listening": sorted(prober.listening),
            },
            "breaker": {
                "exclusions": len(bound.exclusions),
                "restarts": len(bound.restarts),
                "max": policy.max_exclusions,
                "window_s": policy.exclusion_window_s,
                "min_ranks": policy.min_ranks if bound.min_ranks is None else bound.min_ranks,
            },
            "gpus": [self._gpu_status(uuid, now, wall) for uuid in sorted(docket.gpus, key=self._gpu_order)],
            "ranks": self._rank_status(now, wall),
        }

    def _gpu_order(self, uuid: str) -> tuple[bool, int, str]:
        index = self._docket.gpus[uuid].index
        return index is None, index or 0, uuid

    def _gpu_status(self, uuid: str, now: float, wall: float) -> dict[str, Any]:
        case = self._docket.gpus[uuid]
        history = self._state.record(uuid).history
        return {
            "uuid": uuid,
            "index": case.index,
            "name": case.name,
            "present": uuid in self._prober.present,
            "listening": uuid in self._prober.listening,
            "ranks": [one.rank for one in self._docket.bindings.on_gpu(uuid)],
            "verdict": case.judgement.verdict.value,
            "signal": case.judgement.signal,
            "reason": case.judgement.reason,
            "held": case.ruling.held if case.ruling else None,
            "since": round(case.since, 3),
            "evidence": [as_json(one, now, wall) for one in case.judgement.evidence],
            "celsius": case.observer.reading.get("celsius"),
            "reading": dict(case.observer.reading),
            "unsupported": list(case.unsupported),
            "used_by": sorted(self._occupancy.occupied(now).get(uuid, ())),
            "failures": len(history.failures),
            "quarantined": history.quarantined,
        }

    def _rank_status(self, now: float, wall: float) -> list[dict[str, Any]]:
        found = []
        for state in self._heartbeats.states:
            case = self._docket.ranks.get((state.rank, state.incarnation))
            judgement = case.judgement if case else None
            found.append(
                {
                    **asdict(state),
                    "verdict": judgement.verdict.value if judgement else Verdict.OK.value,
                    "reason": judgement.reason if judgement and judgement.reason else state.reason,
                    "held": case.ruling.held if case and case.ruling else None,
                    "evidence": [as_json(one, now, wall) for one in judgement.evidence] if judgement else [],
                }
            )
        return found


def _lock(runtime_dir: Path) -> int:
    """One watchdog per runtime directory; the kernel frees the lock when the process ends, however it ends."""
    try:
        runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(runtime_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError(f"runtime directory {runtime_dir}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StartError(f"a watchdog already runs in {runtime_dir}; see `elastic-watchdog status`") from None
    return fd
