"""What a rank says about itself on its heartbeat page, for the watchdog. `docs/heartbeat.md` describes the page.

All of it but NCCL's error comes from the main thread, the one that starts the collectives: an idle rank beats between
two looks into its queue, a waiting one between two looks at its collective, a parked one between two instructions.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import structlog
from vllm.v1.core.sched.output import SchedulerOutput

from elastic_daemon.messages import Message
from watchdog.heartbeat.errors import PageNotCreated
from watchdog.heartbeat.layout import Collective, Granularity, Phase
from watchdog.heartbeat.page import HeartbeatWriter

log = structlog.get_logger(__name__)

BEAT_S = 0.1
"""How often a main thread that waits for work beats. The watchdog's limits are made for at most 0.2 s."""

T = TypeVar("T")


class Page(Protocol):
    """A rank's page, `watchdog.heartbeat.page.HeartbeatWriter` or `NoPage`; the former says when to call what."""

    def begin_epoch(self, epoch: int, phase: Phase = Phase.IDLE) -> None: ...
    def set_phase(self, phase: Phase) -> None: ...
    def beat(self) -> None: ...
    def start_step(self, step: int, phase: Phase) -> None: ...
    def enter(self, kind: int) -> None: ...
    def complete(self, kind: int) -> None: ...
    def report_async_error(self, code: int) -> None: ...
    def close(self) -> None: ...


class NoPage:
    """For a rank that nobody watches."""

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

    def report_async_error(self, code: int) -> None:
        pass

    def close(self) -> None:
        pass


def open_page(spec: Message, per_step: bool) -> Page:
    """The page of this process, in `spec["heartbeat_dir"]`; without that field, none.

    `per_step`: collectives run on a device, behind the host's back. A page that cannot be made is an error in the log,
    and no reason to serve with one rank less.
    """
    if (directory := spec.get("heartbeat_dir")) is None:
        return NoPage()
    granularity = Granularity.STEP if per_step else Granularity.COLLECTIVE
    try:
        return HeartbeatWriter(Path(directory), spec["rank"], spec["incarnation"], granularity)
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

    def __init__(self, page: Page, per_step: bool) -> None:
        """`per_step`: each step counts as one collective, which ends when its output has come back to the host."""
        self._page = page
        self._per_step = per_step
        self._count = 0
        self._under_way = False

    def begin_epoch(self, epoch: int) -> None:
        self._count = 0
        self._under_way = False
        self._page.begin_epoch(epoch)

    def begin(self, phase: Phase) -> None:
        self._count += 1
        self._page.start_step(self._count, phase)
        if self._per_step:
            self._under_way = True
            self._page.enter(Collective.STEP)

    def end(self) -> None:
        """The host has what the step came to. Nothing if no step is under way."""
        if self._under_way:
            self._under_way = False
            self._page.complete(Collective.STEP)
