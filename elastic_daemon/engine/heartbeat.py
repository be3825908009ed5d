"""What a rank says about itself on its heartbeat page, for the watchdog. `docs/heartbeat.md` describes the page.

All of it but NCCL's error comes from the main thread, the one that starts the collectives: an idle rank beats between
two looks into its queue, a waiting one between two looks at its collective, a parked one between two instructions.
"""

from __future__ import annotations

import mmap
import queue
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import structlog
from vllm.v1.core.sched.output import SchedulerOutput

from elastic_daemon.engine.stream_counters import StreamCounters
from elastic_daemon.processes.messages import Message
from watchdog.heartbeat.errors import PageNotCreated
from watchdog.heartbeat.layout import Collective, Granularity, Phase
from watchdog.heartbeat.page import HeartbeatWriter

log = structlog.get_logger(__name__)

BEAT_S = 0.1
"""How often a main thread that waits for work beats. The watchdog's limits are made for at most 0.2 s."""

T = TypeVar("T")


class Page(Protocol):
    """A rank's page, `watchdog.heartbeat.page.HeartbeatWriter` or `NoPage`; the former says when to call what."""

    granularity: Granularity

    def begin_epoch(self, epoch: int, phase: Phase = Phase.IDLE) -> None: ...
    def set_phase(self, phase: Phase) -> None: ...
    def beat(self) -> None: ...
    def start_step(self, step: int, phase: Phase) -> None: ...
    def enter(self, kind: int) -> None: ...
    def complete(self, kind: int) -> None: ...
    def add_times(self, worked: int, waited: int, starved: int, timed: int) -> None: ...
    def report_async_error(self, code: int) -> None: ...
    def close(self) -> None: ...


class NoPage:
    """For a rank that nobody watches."""

    granularity = Granularity.COLLECTIVE

    def begin_epoch(self, epoch: int, phase: Phase = Phase.IDLE) -> None:
        pass

    def set_phase(self, phase: Phase) -> None:
        pass

    def beat(self) -> None:
        pass

    def start_step(self, step: int, phase: Phase) -> None:
        pass

    def enter(self, kind: int) -> None:
        pass

    def complete(self, kind: int) -> None:
        pass

    def add_times(self, worked: int, waited: int, starved: int, timed: int) -> None:
        pass

    def report_async_error(self, code: int) -> None:
        pass

    def close(self) -> None:
        pass


def open_page(spec: Message, prepare: Callable[[mmap.mmap], Granularity] | None = None) -> Page:
    """The page of this process, in `spec["heartbeat_dir"]`; without that field, none.

    `prepare`: maps the page for a device, if collectives run on one, behind the host's back, and says what is counted.
    A page that cannot be made is an error in the log, and no reason to serve with one rank less.
    """
    if (directory := spec.get("heartbeat_dir")) is None:
        return NoPage()
    place = (Path(directory), spec["rank"], spec["incarnation"])
    try:
        return HeartbeatWriter(*place) if prepare is None else HeartbeatWriter(*place, prepare)
    except PageNotCreated as error:
        log.error("heartbeat_page_failed", rank=spec["rank"], error=str(error))
        return NoPage()


def get_beating(source: queue.Queue[T] | queue.SimpleQueue[T], beat: Callable[[], None]) -> T:
    """The next item of a queue, however long it takes; `beat` is called meanwhile."""
    while True:
        try:
            return source.get(timeout=BEAT_S)
        except queue.Empty:
            beat()


class BeatingQueue(queue.Queue[T]):
    """A queue whose reader beats while it waits: vLLM's idle main loop blocks in a `get` without timeout."""

    def __init__(self, beat: Callable[[], None]) -> None:
        super().__init__()
        self._beat = beat

    def get(self, block: bool = True, timeout: float | None = None) -> T:
        if block and timeout is None:
            return get_beating(self, self._beat)
        return super().get(block, timeout)


def step_phase(scheduled: SchedulerOutput) -> Phase:
    """PREFILL if the step computes a prompt, or anew what a request has had; DECODE if each goes on by a token."""
    drafted = sum(map(len, scheduled.scheduled_spec_decode_tokens.values()))
    one_each = len(scheduled.num_scheduled_tokens) + drafted
    prefill = scheduled.scheduled_new_reqs or scheduled.total_num_scheduled_tokens > one_each
    return Phase.PREFILL if prefill else Phase.DECODE


class Steps:
    """Steps of the current epoch on a page. All members of an epoch step together, so all count alike."""

    def __init__(self, page: Page, counters: StreamCounters | None = None) -> None:
        """Where the page counts steps, each is one collective, which ends when its output has come back to the host.

        `counters`: what collectives are counted and timed with, if that is done on a device.
        """
        self._page = page
        self._counters = counters
        self._per_step = page.granularity is Granularity.STEP
        self._count = 0
        self._in_flight: deque[bool] = deque()

    def begin_epoch(self, epoch: int) -> None:
        self._count = 0
        self._in_flight.clear()
        self._page.begin_epoch(epoch)

    def begin(self, phase: Phase) -> None:
        """A step begins whose end the host waits for."""
        self._count += 1
        self._page.start_step(self._count, phase)
        if self._counters is not None and (times := self._counters.begin_step(self._count)) is not None:
            self._page.add_times(*times)
        if self._per_step:
            self._page.enter(Collective.STEP)

    def end(self) -> None:
        """The step that began last is complete."""
        if self._counters is not None:
            self._counters.landed(newest=not self._in_flight)
        if self._per_step:
            self._page.complete(Collective.STEP)

    def launch(self, scheduled: SchedulerOutput) -> None:
        """A step begins whose output is asked for later, when others may have been launched behind it.

        One with nothing to compute has no collectives, and does not count.
        """
        counts = scheduled.total_num_scheduled_tokens > 0
        self._in_flight.append(counts)
        if counts:
            self.begin(step_phase(scheduled))

    def land(self) -> None:
        """The output of the oldest step in flight is there. Nothing if the epoch that launched it is over."""
        if self._in_flight and self._in_flight.popleft():
            self.end()
