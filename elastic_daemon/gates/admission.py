"""Whether a new request may join those that wait. Pure, but for the variable by which a request is known.

Requests leave the queue with their first token. A request is refused where it would join a queue that is full, or one
that, at the rate at which requests leave it, holds it longer than the deadline. While nothing is served nobody leaves,
and that says nothing about the rate: time counts while the group serves only, so a recovery makes requests wait and
refuses none of them, unless the queue is full. Few departures say something only where requests have waited all the
time: then the service is slow, else it had nothing to do.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

WINDOW_S = 60.0
"""Of serving time, over which the rate is measured."""

FEWEST = 16
"""Departures that say something about the rate, however long the queue has been there."""

LONGEST_RETRY_S = 600
UNKNOWN_RETRY_S = 5


@dataclass(frozen=True)
class Limits:
    """`max_waiting`: requests without a first token. `queue_timeout_s`: longest wait that is let happen."""

    max_waiting: int
    queue_timeout_s: float


def retry_after(waiting: int, rate: float | None, limits: Limits, *, serving: bool, coming: int = 1) -> int | None:
    """None: admit. Else after how many whole seconds to come again. `rate`: departures per second, None: unknown."""
    if (too_many := waiting + coming - limits.max_waiting) > 0:
        return _seconds(too_many / rate) if rate else UNKNOWN_RETRY_S
    if not rate or not serving:
        return None
    late = waiting / rate - limits.queue_timeout_s
    return _seconds(late) if late > 0 else None


def _seconds(wait: float) -> int:
    return min(max(1, math.ceil(wait)), LONGEST_RETRY_S)


class Departures:
    """The rate at which requests leave the queue, over time that counts while the group serves only."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()  # on a clock that stands still in pauses
        self._waited_since: float | None = None  # on that clock: since when somebody has waited all the time
        self._clock = 0.0
        self._last = 0.0
        self.is_serving = False

    def _advance(self, now: float) -> None:
        if self.is_serving:
            self._clock += max(0.0, now - self._last)
        self._last = max(self._last, now)
        while self._times and self._times[0] < self._clock - WINDOW_S:
            self._times.popleft()

    def serving(self, serving: bool, now: float) -> None:
        self._advance(now)
        self.is_serving = serving

    def left(self, now: float) -> None:
        self._advance(now)
        self._times.append(self._clock)

    def somebody_waits(self, now: float) -> None:
        self._advance(now)
        if self._waited_since is None:
            self._waited_since = self._clock

    def nobody_waits(self) -> None:
        self._waited_since = None

    def rate(self, now: float) -> float | None:
        """Per second; None while there is too little to tell by.

        What is told by few departures is rather too high: the next one may be just about to come.
        """
        self._advance(now)
        if len(self._times) >= FEWEST:
            return len(self._times) / max(self._clock - self._times[0], 1e-3)
        if self._waited_since is not None and self._clock - self._waited_since >= WINDOW_S:
            return (len(self._times) + 1) / WINDOW_S
        return None


def requests_in(body: bytes) -> int:
    """How many requests the engine gets of the body of an HTTP request: one for each choice of each prompt.

    A body that is no such thing counts as one: vLLM says what is wrong with it.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return 1
    if not isinstance(content, dict):
        return 1
    prompts = _batch(content.get("prompt")) + _batch(content.get("prompt_embeds"))
    try:
        choices = int(content.get("n") or 1)  # as vLLM takes it: a text may be a number
    except (ValueError, TypeError, OverflowError):
        choices = 1
    return max(1, prompts) * max(1, choices)


def _batch(prompt: Any) -> int:
    """A list of numbers is the tokens of one prompt."""
    if not isinstance(prompt, list):
        return int(prompt is not None)
    return len(prompt) if prompt and isinstance(prompt[0], str | list) else 1


@dataclass
class _Arrival:
    """An HTTP request, from its admission to its end."""

    on_the_way: int = 1
    """Requests in it that the engine's client does not have yet."""


_ARRIVAL: ContextVar[_Arrival | None] = ContextVar("arrival", default=None)
"""The HTTP request that this context handles."""


class Queue:
    """Who waits: HTTP requests that are on their way to the engine's client, and requests there without a token."""

    def __init__(self) -> None:
        self.departures = Departures()
        self.refused = 0
        self._arriving = 0
        self._unstarted: set[str] = set()

    @property
    def waiting(self) -> int:
        return self._arriving + len(self._unstarted)

    def retry_after(self, limits: Limits, now: float) -> int | None:
        """Of a request that comes now. None: it is admitted."""
        rate = self.departures.rate(now)
        seconds = retry_after(self.waiting, rate, limits, serving=self.departures.is_serving)
        if seconds is None:
            self.departures.somebody_waits(now)  # this one
        else:
            self.refused += 1
        return seconds

    def refusal(self, limits: Limits, now: float) -> str | None:
        """Why a request that came now would be refused. None: it would be admitted. Asking counts for nothing."""
        waiting, rate = self.waiting, self.departures.rate(now)
        if retry_after(waiting, rate, limits, serving=self.departures.is_serving) is None:
            return None
        if waiting >= limits.max_waiting or not rate:
            return f"{waiting} requests wait already, and no more may"
        return f"a request would wait {waiting / rate:.0f} s, and may for {limits.queue_timeout_s:g} s"

    def arrive(self) -> Callable[[], None]:
        """An HTTP request comes in. To be called at its end, at the latest."""
        self._arriving += 1
        _ARRIVAL.set(arrival := _Arrival())

        def over() -> None:
            self._arriving -= arrival.on_the_way
            arrival.on_the_way = 0
            self._fewer()

        return over

    def widen(self, requests: int, limits: Limits, now: float) -> int | None:
        """There are so many requests in the HTTP request of this context, which was admitted as one.

        Returns None if all of them may wait; else, as `retry_after`, when to come again.
        """
        arrival = _ARRIVAL.get()
        if arrival is None or requests <= arrival.on_the_way:
            return None
        others = self.waiting - arrival.on_the_way
        # The wait has been asked for at the door: what is left to ask for is room.
        seconds = retry_after(others, self.departures.rate(now), limits, serving=False, coming=requests)
        if seconds is None:
            self._arriving += requests - arrival.on_the_way
            arrival.on_the_way = requests
        else:
            self.refused += 1
        return seconds

    def join(self, request_id: str) -> None:
        self._unstarted.add(request_id)
        arrival = _ARRIVAL.get()
        if arrival is not None and arrival.on_the_way:
            arrival.on_the_way -= 1
            self._arriving -= 1

    def begin(self, request_id: str, now: float) -> None:
        """It has got tokens."""
        if request_id in self._unstarted:
            self._unstarted.remove(request_id)
            self.departures.left(now)
            self._fewer()

    def leave(self, request_ids: Iterable[str]) -> None:
        """They have ended, however far they got."""
        self._unstarted.difference_update(request_ids)
        self._fewer()

    def _fewer(self) -> None:
        if not self.waiting:
            self.departures.nobody_waits()
