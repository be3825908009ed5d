"""What the daemon is told, in order: rulings first, the gravest before the others; then which GPUs are fit.

A ruling waits until the daemon has taken it in; a later one on the same GPU or rank replaces it. The list of GPUs is
made when it is sent, so that it is never older than a verdict that the daemon has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from watchdog.bindings import Bindings
from watchdog.daemon_client import DaemonClient
from watchdog.docket import Ruling, Target
from watchdog.errors import DaemonError, DaemonNotReady, DaemonUnreachable, StaleEpoch
from watchdog.fitness import Fitness
from watchdog.logs import log

PAUSE_S = (0.05, 2.0)
"""Before the first and the last of many attempts; doubled in between."""
BEHIND_S = 0.1
"""Pause when the daemon's bindings are behind its own epoch."""


class Sender(Protocol):
    def fitness(self) -> Sequence[Fitness] | None:
        """Of all GPUs now; None while it is not known which there are."""

    def lose_daemon(self, error: str) -> None: ...

    def judge_again(self, target: Target, bindings: Bindings) -> None:
        """By these bindings: what was said is of an epoch that is over."""


class Delivery:
    def __init__(self, client: DaemonClient, sender: Sender) -> None:
        self._client = client
        self._sender = sender
        self._pending: dict[Target, Ruling] = {}
        self._gpus_due = False
        self._work = asyncio.Event()

    @property
    def pending(self) -> int:
        """Rulings that the daemon has not taken in."""
        return len(self._pending)

    def put(self, ruling: Ruling) -> None:
        self._pending[ruling.target] = ruling
        self._work.set()

    def put_gpus(self) -> None:
        """What is known of GPUs has changed, or the daemon may not know it."""
        self._gpus_due = True
        self._work.set()

    async def run(self) -> None:
        """Deliver without end."""
        first, longest = PAUSE_S
        pause = first
        while True:
            await self._work.wait()
            self._work.clear()
            try:
                await self._deliver_all()
                pause = first
            except DaemonUnreachable as error:
                self._sender.lose_daemon(str(error))
                self._work.set()
            except DaemonNotReady:
                self._work.set()
            if self._work.is_set():
                await asyncio.sleep(pause)
                pause = min(longest, 2 * pause)

    async def _deliver_all(self) -> None:
        """Raises DaemonUnreachable and DaemonNotReady; what is left stays so."""
        while self._pending or self._gpus_due:
            if self._pending:
                await self._deliver_gravest()
            else:
                await self._deliver_gpus()

    async def _deliver_gravest(self) -> None:
        target, ruling = min(self._pending.items(), key=lambda item: -item[1].verdict.severity)
        try:
            await self._client.put_verdict(ruling)
        except StaleEpoch:
            await self._catch_up(target, ruling)
            return
        except (DaemonUnreachable, DaemonNotReady):
            raise
        except DaemonError as error:
            log.error("verdict_refused", id=ruling.id, error=str(error))
        if self._pending.get(target) is ruling:
            del self._pending[target]

    async def _deliver_gpus(self) -> None:
        self._gpus_due = False
        if (gpus := self._sender.fitness()) is None:
            return  # it is said when it is known
        try:
            await self._client.put_gpus(gpus)
        except (DaemonUnreachable, DaemonNotReady):
            self._gpus_due = True
            raise
        except DaemonError as error:
            log.error("gpus_refused", error=str(error))

    async def _catch_up(self, target: Target, ruling: Ruling) -> None:
        """Judge again by the daemon's present bindings. Raises DaemonUnreachable and DaemonNotReady."""
        log.info("verdict_stale", id=ruling.id, epoch=ruling.epoch)
        if self._pending.get(target) is ruling:
            del self._pending[target]
        try:
            bindings = await self._client.bindings()
        except (DaemonUnreachable, DaemonNotReady):
            self._pending.setdefault(target, ruling)
            raise
        except DaemonError as error:
            log.error("bindings_unreadable", error=str(error))
            return
        if bindings.epoch <= ruling.epoch:
            await asyncio.sleep(BEHIND_S)  # ask again, not at once
        self._sender.judge_again(target, bindings)
