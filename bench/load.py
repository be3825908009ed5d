"""Clients that keep asking for the same completions for as long as a benchmark changes the deployment beneath them."""

from __future__ import annotations

import asyncio
import time
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from elastic_daemon.drill.load import run_stream, stream_client
from elastic_daemon.drill.report import StreamResult, compare

STAGGER_S = 0.2
"""Between the first requests of the clients, so that their streams do not all end and begin together."""

PAUSE_AFTER_ERROR_S = 0.2
END_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Window:
    """A span of time. Monotonic seconds."""

    since: float
    until: float

    @property
    def seconds(self) -> float:
        return self.until - self.since


@dataclass
class Traffic:
    """What clients have received. Arrays of floats: tens of thousands of objects would make the garbage collector pause
    the process that measures pauses.

    Wait `n` of a client lasted from `begins[n]` to `ends[n]`, for the first token from its request on; `counts[n]`
    tokens came with its end. `ends` ascends.
    """

    begins: array[float] = field(default_factory=lambda: array("d"))
    ends: array[float] = field(default_factory=lambda: array("d"))
    counts: array[int] = field(default_factory=lambda: array("L"))

    def add(self, begin: float, end: float, count: int) -> None:
        self.begins.append(begin)
        self.ends.append(end)
        self.counts.append(count)

    def longest_wait(self, window: Window) -> float:
        """The longest of all waits that lie in the window, if only in part; 0 if there is none."""
        first = bisect_right(self.ends, window.since)
        waits = zip(self.begins[first:], self.ends[first:], strict=True)
        return max((end - begin for begin, end in waits if begin < window.until), default=0.0)

    def rate(self, window: Window) -> float:
        """Tokens per second of all clients together. Raises ValueError for a window without length."""
        if window.seconds <= 0:
            raise ValueError(f"a window of {window.seconds:g} s has no rate")
        first, end = bisect_right(self.ends, window.since), bisect_right(self.ends, window.until)
        return sum(self.counts[first:end]) / window.seconds

    def windows(self, window: Window, seconds: float) -> list[float]:
        """The longest wait in each part of `window` that is `seconds` long."""
        parts = int(window.seconds / seconds)
        starts = [window.since + number * seconds for number in range(parts)]
        return [self.longest_wait(Window(start, start + seconds)) for start in starts]


@dataclass
class Outcome:
    """How streams ended. `refused`: an HTTP error in place of a stream; `lost`: an error or an end on the way."""

    streams: int = 0
    lost: int = 0
    refused: int = 0
    changed: int = 0
    examples: list[str] = field(default_factory=list)

    def count(self, expected: StreamResult, actual: StreamResult) -> None:
        """One more, beside the undisturbed stream of the same prompt."""
        self.streams += 1
        comparison = compare([expected], [actual])
        if actual.error is not None:
            refused = not actual.arrivals and actual.error[:3].isdigit()
            self.refused += refused
            self.lost += not refused
            self.examples.append(actual.error)
        elif not comparison.same:
            self.changed += 1
            self.examples += map(str, comparison.differences)

    def add(self, other: Outcome) -> None:
        self.streams += other.streams
        self.lost += other.lost
        self.refused += other.refused
        self.changed += other.changed
        self.examples += other.examples


class Load:
    """`async with Load(...)`: meanwhile each client streams its prompt again and again.

    The end waits for the streams that still run, so that each is compared in full.
    """

    def __init__(
        self,
        url: str,
        reference: Sequence[StreamResult],
        outcome: Outcome | None = None,
        logprobs: int | None = None,
    ) -> None:
        """`reference`: an undisturbed run, one stream for each client, who samples as it did. `outcome`: where streams
        are counted."""
        self.traffic = Traffic()
        self.outcome = outcome if outcome is not None else Outcome()
        self._reference, self._logprobs = reference, logprobs
        self._client = stream_client(url)
        self._since = [0.0] * len(reference)
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._go_on(number)) for number in range(len(self._reference))]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopping = True
        if kind is None:
            await asyncio.wait(self._tasks, timeout=END_TIMEOUT_S)
        stuck = [task for task in self._tasks if not task.done()]
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()
        if kind is None:
            if stuck:
                raise TimeoutError(f"{len(stuck)} streams did not end within {END_TIMEOUT_S:g} s")
            for result in ended:
                if isinstance(result, BaseException):
                    raise result

    async def _go_on(self, number: int) -> None:
        await asyncio.sleep(number * STAGGER_S)
        expected = self._reference[number]
        while not self._stopping:
            self._since[number] = time.monotonic()
            result = await run_stream(
                self._client, expected.prompt, expected.tokens, number, self._token, self._logprobs, expected.sampling
            )
            self.outcome.count(expected, result)
            if result.error is not None:
                await asyncio.sleep(PAUSE_AFTER_ERROR_S)

    def _token(self, number: int, count: int) -> None:
        now = time.monotonic()
        self.traffic.add(self._since[number], now, count)
        self._since[number] = now
