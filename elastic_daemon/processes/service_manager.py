"""What the supervisor's control loop tells systemd, and whether that loop turns."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

from elastic_daemon.config import Settings
from elastic_daemon.membership import Status
from watchdog.notify import Notifier, Supervision

LOOP_STALE_S = 5.0
"""`/livez` fails when the control loop has not turned for this long."""

PREPARE_TURN_S = 1.0

END_S = 20.0
"""From the end of the drain to that of the last process, at the most."""

SERVING = (Status.OK, Status.DEGRADED)


class Described(Protocol):
    """The controller, as far as it is told of."""

    @property
    def status(self) -> Status: ...
    @property
    def reason(self) -> str: ...
    def describe(self) -> str: ...


class ServiceManager:
    """`turn` belongs to the control loop, `reloading` to whoever reads the configuration anew."""

    def __init__(self, settings: Settings) -> None:
        self.notifier = Notifier(Supervision.take())
        self._prepare_s = settings.start_timeout
        self._last_turn = time.monotonic()

    @property
    def is_turning(self) -> bool:
        return time.monotonic() - self._last_turn < LOOP_STALE_S

    async def prepare(self, either: Collection[asyncio.Future[Any]]) -> None:
        """Wait for the first of `either`, before there is anything to control.

        More time is asked for as long as a rank would get to start: an import that hangs must not hang for ever.
        """
        until = time.monotonic() + self._prepare_s
        while not any(future.done() for future in either):
            self._last_turn = time.monotonic()
            if self._last_turn < until:
                self.notifier.turn(lambda: "starting: reading the model's configuration", serving=False)
            await asyncio.wait(either, timeout=PREPARE_TURN_S, return_when=asyncio.FIRST_COMPLETED)

    def turn(self, controller: Described | None) -> None:
        self._last_turn = time.monotonic()
        if controller is not None:
            self.notifier.turn(lambda: sentence(controller), serving=controller.status in SERVING)

    @contextlib.contextmanager
    def reloading(self, when_adopted: Callable[[Callable[[], None]], None]) -> Iterator[None]:
        """Around a reload, which is over however it went.

        `when_adopted` is given what to call once all processes go by what was read.
        """
        self.notifier.reloading()
        try:
            yield
        finally:
            when_adopted(self.notifier.ready)

    def stopping(self, drain_s: float) -> None:
        """An orderly end begins. `drain_s`: what running requests get."""
        self.notifier.stopping(drain_s + END_S)


def sentence(controller: Described) -> str:
    """The controller's, and what is wrong although it serves."""
    doing, reason = controller.describe(), controller.reason
    return f"{doing} ({reason})" if reason and reason not in doing else doing
