"""How long a device computes between collectives and waits in them, measured in one step of a few.

CUDA events are put on the stream around collectives, and read in a later step, when they have passed: the host never
waits for them. What counts as work is what a healthy device does as fast as its peers do:

- The experts of a layer, from the end of its dispatch to its combine: they see the tokens of all ranks. The rest of a
  layer, attention above all, takes longer the more its rank has to do, and says nothing about the device.
- What a device that other processes share lets its host wait for when a step begins: it lost its turn while it had
  nothing to do. Attention of the first layer and sampling of the step before are in there too, up to `ORDINARY_NS`.

Between two kernels the device may wait for its host, which launches them one by one. That time is told apart
("starved"): it is none at all if the last kernel was on the stream before the device came to the first.

Collectives run eagerly, between the pieces of a model that are CUDA graphs, and no group exists while graphs are
captured: events are never part of a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic_ns
from typing import Any, NamedTuple, Protocol

from elastic_daemon.engine.leavable import never
from watchdog.heartbeat.layout import Collective

EVERY = 16
"""One step in so many is timed. An event costs its host 2 to 3 microseconds, so that a step with 60 expert layers, with
240 of them, takes a millisecond more: spread over 16 steps, far below 0.5 %."""

ORDINARY_NS = 1_000_000
"""A turn that is lost to another process is a time slice, of 2 ms by default."""

LONGEST_PAUSE_NS = 100_000_000
"""Between two steps. After a longer one, clocks of host and device do not compare to a millisecond any more."""


class Event(Protocol):
    """A `torch.cuda.Event` with timing."""

    def record(self) -> Any: ...
    def query(self) -> bool: ...
    def elapsed_time(self, end_event: Any) -> float: ...


class Times(NamedTuple):
    """In ns, as on the heartbeat page. `timed`: expert layers that `worked` is the sum of."""

    worked: int
    waited: int
    starved: int
    timed: int


class _Mark(NamedTuple):
    event: Event
    host_ns: int
    kind: Collective


@dataclass(frozen=True, slots=True)
class _Span:
    """`host_ns`: how long the host took to launch what is in it; 0 if the device was never ahead of that."""

    start: Event
    end: Event
    host_ns: int = 0

    def ns(self) -> int:
        return max(0, round(self.start.elapsed_time(self.end) * 1e6))


class DeviceTimes:
    """Of the collectives of one group, all from one thread. Events of a group that was aborted go with it, unread."""

    def __init__(
        self,
        make: Callable[[], Event],
        clock: Callable[[], int] = monotonic_ns,
        is_freeing: Callable[[], bool] = never,
    ) -> None:
        """`is_freeing`: whether memory of an older group is being freed. The driver may then not answer a query before
        the kernels of this one have ended, and torch asks with the GIL held: nothing is timed meanwhile."""
        self._make = make
        self._clock = clock
        self._is_freeing = is_freeing
        self._free: list[Event] = []
        self._used: list[Event] = []
        self._timing = False
        self._complete = False
        self._entered: Event | None = None
        self._last: _Mark | None = None
        self._landed_ns = 0
        self._experts: list[_Span] = []
        self._waits: list[_Span] = []
        self._turn: _Span | None = None

    def begin_step(self, number: int) -> Times | None:
        """A step is about to be launched. Returns what an earlier one took, once that is known."""
        if not self._used and self._is_freeing():
            return None
        times = self._read()
        # The step after a timed one is not timed: its first collective ends what is measured.
        self._timing = not self._used and number % EVERY == 0
        return times

    def landed(self, newest: bool) -> None:
        """The host has waited for the output of a step, and goes on. `newest`: it has launched none behind that.

        If it has, and the device is through with that as well, the host did not wait: it came late.
        """
        if self._last is not None and (newest or not self._last.event.query()):
            self._landed_ns = self._clock()

    def enter(self, kind: Collective) -> None:
        """A collective is about to be put on the stream."""
        last, self._last = self._last, None
        if not self._timing and last is None:
            return
        event = self._record()
        if last is not None:
            self._close(last, event, kind)
        self._complete = not self._timing
        self._entered = event if self._timing else None

    def complete(self, kind: Collective) -> None:
        """The stream waits for the collective that was put on it last."""
        if self._entered is None:
            return
        now = self._clock()
        event = self._record()
        self._waits.append(_Span(self._entered, event))
        self._last, self._entered = _Mark(event, now, kind), None

    def _close(self, last: _Mark, event: Event, kind: Collective) -> None:
        launched_before = not last.event.query()
        host_ns = 0 if launched_before else self._clock() - max(last.host_ns, self._landed_ns)
        span = _Span(last.event, event, host_ns)
        kinds = (last.kind, kind)
        if self._timing and kinds == (Collective.DISPATCH, Collective.COMBINE):
            self._experts.append(span)
        elif not self._timing and kinds == (Collective.COMBINE, Collective.DISPATCH):
            self._turn = span

    def _record(self) -> Event:
        event = self._free.pop() if self._free else self._make()
        event.record()
        self._used.append(event)
        return event

    def _read(self) -> Times | None:
        if not self._complete or not self._used[-1].query():
            return None
        worked = starved = 0
        for span in self._experts:
            took = span.ns()
            worked += took
            starved += min(took, span.host_ns)
        if self._turn is not None and self._turn.host_ns <= LONGEST_PAUSE_NS:
            worked += max(0, self._turn.ns() - self._turn.host_ns - ORDINARY_NS)
        times = Times(worked, sum(span.ns() for span in self._waits), starved, len(self._experts))
        self._free += self._used
        self._used, self._experts, self._waits, self._turn, self._complete = [], [], [], None, False
        return times
