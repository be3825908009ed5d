"""Driver calls under a deadline: children that call NVML, watched, killed and replaced.

    events            one child waits for the driver's events
    poll              one child reads all GPUs in turn
    poll --only GPU   one child for each GPU that is slow or does not answer, so that the others go on being read

A call that misses its deadline is evidence against the GPU it was made for (`driver_late`). The child is killed; the
GPU gets a child of its own. If that gets no answer either, the driver is wedged there (`driver_wedged`): two processes,
one finding. Nobody else touches a GPU with a child of its own. A child that survives SIGKILL is stuck in the kernel; it
is kept and counted, and nothing more is started for its GPU until it is gone. So a GPU has one, or two where it caught
those that wait for events and read at once. A child that is late because it had no processor is left alone for longer.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from watchdog.child import Call, Child, Message
from watchdog.killed import Killed
from watchdog.logs import log


@dataclass(frozen=True)
class ProbePolicy:
    """All in seconds but `max_isolated`. With these, a GPU that hangs is `driver_wedged` within 2 s."""

    interval: float = 0.25
    call_deadline: float = 0.65
    """Of a call for one GPU."""
    init_deadline: float = 15.0
    """Of a call for the driver as a whole: without persistence mode it takes seconds to wake GPUs up."""
    wait_deadline: float = 2.5
    """Of the wait for events, which returns by itself after 0.5 s."""
    starved_deadline: float = 5.0
    """Of a child that has no processor."""
    wedged_after: float = 1.25
    """How long a GPU must have answered nobody, two processes having asked."""
    second_call: float = 0.25
    """How long the second process must have been asking."""
    turn_deadline: float = 10.0
    """A child that makes no call and does not turn is replaced after this."""
    reap: float = 0.5
    """A child that is there so long after SIGKILL is stuck in the kernel."""
    retry: tuple[float, float] = (1.0, 30.0)
    """Pause before a child is started again: the first, doubled each time, and the longest."""
    slow_reading: float = 0.25
    """A GPU whose reading takes longer gets a child of its own."""
    settled: float = 10.0
    """After so long without a slow reading it goes back to the others."""
    stall: float = 0.5
    """A longer gap between two looks means that this machine stood still, and the children with it."""
    max_isolated: int = 8


class Sink(Protocol):
    """Who is told what the children found. Times are CLOCK_MONOTONIC seconds."""

    def listed(self, gpus: Mapping[str, Mapping[str, Any]], absent: Iterable[str], driver: str, now: float) -> None: ...
    def readings(self, readings: Mapping[str, Mapping[str, Any]], now: float) -> None: ...
    def event(self, gpu: str, signal: str, number: int, now: float) -> None: ...
    def condition(self, gpu: str, signal: str, holds: bool, now: float, detail: Mapping[str, Any]) -> None: ...
    def late(self, gpu: str, now: float, detail: Mapping[str, Any]) -> None: ...


@dataclass
class _Slot:
    """A place for one child, and when it may be started next."""

    child: Child | None = None
    due: float = 0.0
    pause: float = 0.0

    def put_off(self, now: float, policy: ProbePolicy) -> None:
        first, longest = policy.retry
        self.pause = min(longest, 2 * self.pause or first)
        self.due = now + self.pause


@dataclass
class _Isolated(_Slot):
    """A GPU with a child of its own."""

    unanswered: float | None = None
    """Since when it has answered nobody."""
    slow: float = 0.0
    """When a reading was last slow or late."""
    wedged: bool = False
    tried: int = 0
    """Children of its own that were started since it last answered."""


@dataclass
class Prober:
    environment: Mapping[str, str]
    sink: Sink
    policy: ProbePolicy = field(default_factory=ProbePolicy)
    known: set[str] = field(default_factory=set)
    """UUIDs that were ever seen; told to new children, who can then tell GPUs apart without touching all."""

    def __post_init__(self) -> None:
        self.main = _Slot()
        self.events = _Slot()
        self.isolated: dict[str, _Isolated] = {}
        self._killed = Killed(self.policy.reap, self.policy.starved_deadline)
        self.driver: str | None = None
        self.trouble: str | None = None
        """Why NVML as a whole does not answer."""
        self.expected: set[str] = set()
        """UUIDs that the driver should list: those it listed before, and those that ranks are bound to."""
        self._bound: frozenset[str] = frozenset()
        self.listed = False
        """The driver has said which GPUs there are."""
        self._present: dict[str, Mapping[str, Any]] = {}
        self._noted: set[tuple[str, str, tuple[str, ...]]] = set()
        self._closing = False
        self._now = 0.0
        self._trusted = 0.0
        """Until then deadlines are not enforced: this process, or the whole machine, did not run."""

    @property
    def stuck(self) -> dict[str, tuple[int, ...]]:
        """Children that survived SIGKILL: their pids by GPU or role."""
        return self._killed.stuck(self._now)

    @property
    def absent(self) -> set[str]:
        """GPUs that the driver should list and does not; empty until it has listed what it has."""
        return self.expected - self.present if self.listed else set()

    @property
    def present(self) -> set[str]:
        """GPUs that the driver lists, those that have a child of their own included."""
        return self._present.keys() | self.isolated.keys()

    @property
    def listening(self) -> frozenset[str]:
        """GPUs whose events are waited for now. What the driver reports of others meanwhile is lost: it keeps none."""
        return self.events.child.listening if self.events.child is not None else frozenset()

    @property
    def pids(self) -> dict[str, int]:
        slots = {"poll": self.main, "events": self.events, **self.isolated}
        return {name: slot.child.pid for name, slot in slots.items() if slot.child is not None}

    def expect(self, bound: Collection[str]) -> None:
        """Ranks are bound to these GPUs, so the driver should list them, even if it never has since this began."""
        self.expected |= set(bound)
        if self._bound != frozenset(bound):
            self._bound = frozenset(bound)
            self._tell_expected()

    def poll_now(self) -> None:
        """Do not wait for the next turn: something happened."""
        for slot in (self.main, *self.isolated.values()):
            if slot.child is not None:
                slot.child.tell("now")

    def tick(self, now: float) -> None:
        """Look after all children. To be called about ten times a second."""
        if now - self._now > self.policy.stall:
            self._trusted = now + self.policy.stall
        self._now = now
        self._look_after(self.main, now)
        self._look_after(self.events, now)
        for gpu, slot in list(self.isolated.items()):
            self._look_after(slot, now)
            self._look_after_isolated(gpu, slot, now)
        self._start_missing(now)

    def close(self) -> None:
        """End all children; those stuck in the kernel are left behind."""
        self._closing = True
        for slot in (self.main, self.events, *self.isolated.values()):
            if slot.child is not None:
                slot.child.kill(self._now)
                slot.child.close()
                slot.child = None
        self._killed.close()

    def _start_missing(self, now: float) -> None:
        killed = self._killed
        skip = ",".join(sorted(self.isolated))
        known = ",".join(sorted(self.known))
        if self.main.child is None and now >= self.main.due and "poll" not in killed:
            self._start(self.main, "poll", ["--known", known, "--skip", skip], now)
            self._tell_expected()
        if self.events.child is None and now >= self.events.due and "events" not in killed:
            self._start(self.events, "events", ["--known", known, "--skip", skip], now)
        running = sum(slot.child is not None for slot in self.isolated.values())
        others = [slot.child.call(now) for slot in (self.main, self.events) if slot.child is not None]
        taken = {call.gpu for call in others if call is not None}  # whoever is there has not been told yet to leave
        for gpu, slot in self.isolated.items():
            is_free = gpu not in killed and gpu not in taken
            if slot.child is None and now >= slot.due and is_free and running < self.policy.max_isolated:
                self._start(slot, "poll", ["--only", gpu], now)
                slot.tried += 1
                running += 1

    def _tell_expected(self) -> None:
        if self.main.child is not None and self._bound:
            self.main.child.tell(f"expect {','.join(sorted(self._bound))}")

    def _start(self, slot: _Slot, role: str, arguments: list[str], now: float) -> None:
        arguments = [*arguments, "--interval", str(self.policy.interval)] if role == "poll" else arguments
        try:
            slot.child = Child(role, arguments, self.environment, now, self._on_message, self._on_exit)
        except OSError as error:
            log.error("nvml_child_not_started", role=role, error=str(error))
            slot.put_off(now, self.policy)

    def _look_after(self, slot: _Slot, now: float) -> None:
        child = slot.child
        if child is None:
            return
        call = child.call(now)
        if call is None:
            if now - max(child.cycled, child.started) > self.policy.turn_deadline:
                log.warning("nvml_child_stalled", role=child.role, pid=child.pid)
                self._replace(slot, now)
            return
        seconds = now - call.started
        if now < self._trusted:
            return
        if seconds <= self._deadline(call) or (seconds <= self.policy.starved_deadline and child.starved()):
            return
        self._on_late(slot, child, call, now)

    def _deadline(self, call: Call) -> float:
        if call.gpu:
            return self.policy.call_deadline
        return self.policy.wait_deadline if call.name == "wait" else self.policy.init_deadline

    def _on_late(self, slot: _Slot, child: Child, call: Call, now: float) -> None:
        seconds = round(now - call.started, 3)
        log.warning("driver_call_late", gpu=call.gpu or None, call=call.name, seconds=seconds, role=child.role)
        is_new = bool(call.gpu) and call.gpu not in self.isolated
        if call.gpu:
            case = self._isolate(call.gpu, now)
            if case.unanswered is None:
                case.unanswered = call.started
            self.sink.late(call.gpu, now, {"call": call.name, "seconds": seconds})
        else:
            self.trouble = f"{call.name} has not returned for {seconds:g} s"
        self._replace(slot, now, key=call.gpu, put_off=isinstance(slot, _Isolated) or not call.gpu)
        if is_new:
            self._tell_skips()

    def _isolate(self, gpu: str, now: float) -> _Isolated:
        case = self.isolated.setdefault(gpu, _Isolated())
        case.slow = now
        return case

    def _replace(self, slot: _Slot, now: float, *, key: str = "", put_off: bool = False) -> None:
        """`key`: the GPU that it may be stuck at."""
        child, slot.child = slot.child, None
        assert child is not None
        key = key or next((gpu for gpu, case in self.isolated.items() if case is slot), child.role)
        child.kill(now)
        self._killed.add(key, child)
        if put_off:
            slot.put_off(now, self.policy)

    def _look_after_isolated(self, gpu: str, case: _Isolated, now: float) -> None:
        """The second opinion, and the way back."""
        stuck = gpu in self.stuck
        if stuck and case.unanswered is None:
            case.unanswered = now  # it cannot be asked any more
        if case.unanswered is not None and not case.wedged and now - case.unanswered >= self.policy.wedged_after:
            call = case.child.call(now) if case.child is not None else None
            asking = call is not None and now - call.started >= self.policy.second_call
            if (asking and case.child is not None and not case.child.starved()) or case.tried > 1 or stuck:
                case.wedged = True
                detail = {"seconds": round(now - case.unanswered, 3), "stuck_in_kernel": stuck or None}
                self.sink.condition(gpu, "driver_wedged", True, now, detail)
        if case.unanswered is None and now - case.slow >= self.policy.settled:
            self.sink.condition(gpu, "driver_slow", False, now, {})
            if case.child is not None:
                self._replace(case, now)
            elif gpu not in self._killed:
                del self.isolated[gpu]
                self._tell_skips()

    def _tell_skips(self) -> None:
        for slot in (self.main, self.events):
            if slot.child is not None:
                self._tell_skip(slot.child)

    def _tell_skip(self, child: Child) -> None:
        """It initialises NVML again by this, and so sees what came."""
        child.tell(f"skip {','.join(sorted(self.isolated))}")

    def _on_message(self, child: Child, message: Message) -> None:
        now = self._now = max(self._now, child_time(message, self._now))
        match message["t"]:
            case "opened":
                self._on_opened(child, message, now)
            case "poll":
                self._on_poll(child, message, now)
            case "event" if message["gpu"] is not None:
                self.sink.event(message["gpu"], message["signal"], message["data"], now)
            case "deaf":
                child.listening = frozenset()
            case "broken":
                log.info("nvml_events_broken", error=message["error"])
            case "failed":
                self.trouble = message["error"]
                log.warning("nvml_failed", role=child.role, error=message["error"])

    def _on_opened(self, child: Child, message: Message, now: float) -> None:
        self.driver = message["driver"]
        if child is self.main.child:
            self.main.pause = 0.0
            self.trouble = None
            gpus = {gpu["uuid"]: gpu for gpu in message["gpus"]}
            self.known |= gpus.keys()
            self.expected |= gpus.keys()
            changed = gpus.keys() != self._present.keys()
            self._present = gpus
            self.listed = True
            self.sink.listed(gpus, self.absent, message["driver"], now)
            if changed:
                log.info("gpus_listed", present=len(gpus), absent=sorted(self.absent), driver=self.driver)
            listener = self.events.child
            if listener is not None and listener.opened and listener.gpus != gpus.keys() - self.isolated.keys():
                self._tell_skip(listener)
        elif child is self.events.child:
            self.events.pause = 0.0
            child.gpus = frozenset(gpu["uuid"] for gpu in message["gpus"])
            child.listening = child.gpus - message["deaf"].keys()
            log.info("events_awaited", gpus=len(child.listening), deaf=message["deaf"] or None)
        for gpu in message["gpus"]:
            note = (gpu["uuid"], child.role, tuple(gpu["missing"]))
            if gpu["missing"] and note not in self._noted:
                self._noted.add(note)
                log.info("gpu_lacks_signals", gpu=gpu["uuid"], role=child.role, signals=gpu["missing"])

    def _on_poll(self, child: Child, message: Message, now: float) -> None:
        only = next((gpu for gpu, case in self.isolated.items() if case.child is child), None)
        if only is not None:
            self._answered(only, message["slow"].get(only, 0.0), now)
        if message["gpus"]:
            self.sink.readings(message["gpus"], now)
        if child is self.main.child:
            for gpu, seconds in message["slow"].items():
                if seconds > self.policy.slow_reading:
                    self._isolate(gpu, now)
                    self.sink.condition(gpu, "driver_slow", True, now, {"seconds": seconds})
                    self._tell_skips()

    def _answered(self, gpu: str, seconds: float, now: float) -> None:
        case = self.isolated[gpu]
        case.unanswered, case.tried, case.pause = None, 0, 0.0
        if seconds > self.policy.slow_reading:
            case.slow = now
            self.sink.condition(gpu, "driver_slow", True, now, {"seconds": seconds})
        if case.wedged:
            case.wedged = False
            self.sink.condition(gpu, "driver_wedged", False, now, {})

    def _on_exit(self, child: Child) -> None:
        child.close()
        if self._closing:
            return
        self._killed.remove(child)
        for slot in (self.main, self.events, *self.isolated.values()):
            if slot.child is child:
                slot.child = None
                slot.put_off(self._now, self.policy)
                log.warning("nvml_child_ended", role=child.role, pid=child.pid, status=child.ended)


def child_time(message: Message, now: float) -> float:
    """An event's own time where it has one: the two processes read the same clock."""
    return float(message.get("at", now))


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """What the children run with: this environment, and what the driver needs."""
    return {**os.environ, "PYTHONNOUSERSITE": "1", **extra}
