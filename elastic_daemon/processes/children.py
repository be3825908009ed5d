"""The processes of a deployment, as the supervisor handles them: forked, given up, seen to end, reaped."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from elastic_daemon.errors import ControlClosed
from elastic_daemon.processes.launcher import Child, Zygote
from elastic_daemon.processes.lifeline import follow
from elastic_daemon.protocol import Identity
from elastic_daemon.tasks import Tasks
from elastic_daemon.telemetry.events import EventLog

log = structlog.get_logger(__name__)

STACKS_DELAY_S = 0.05
"""From the request for a rank's stacks to its SIGKILL."""


class Processes:
    """Ranks by identity, and the front end. Ends are told before anything is reaped: recovery waits for no books.

    `on_rank_exit(identity)` is called once, when a rank ends or has begun to end (see `lifeline`), `on_frontend_gone()`
    at the end of a front end, and `on_frontend_exit(status)` when it is known how that came about.
    """

    def __init__(
        self,
        zygote: Zygote,
        tasks: Tasks,
        events: EventLog,
        on_rank_exit: Callable[[Identity], None],
        on_frontend_gone: Callable[[], None],
        on_frontend_exit: Callable[[str], None],
    ) -> None:
        self._zygote = zygote
        self._tasks = tasks
        self._events = events
        self._on_rank_exit = on_rank_exit
        self._on_frontend_gone = on_frontend_gone
        self._on_frontend_exit = on_frontend_exit
        self._ranks: dict[Identity, Child] = {}
        self._doomed: set[Identity] = set()
        self._dying: set[Identity] = set()
        self._frontend: Child | None = None

    @property
    def rank_pids(self) -> dict[Identity, int]:
        return {identity: child.pid for identity, child in self._ranks.items()}

    async def fork_rank(self, identity: Identity, **spec: Any) -> None:
        """Raises ElasticError when the zygote cannot."""
        rank, incarnation = identity
        child = await self._zygote.fork(
            "rank",
            f"rank {rank}",
            lambda child: self._tasks.spawn(self._rank_exited(identity, child)),
            rank=rank,
            incarnation=incarnation,
            **spec,
        )
        self._ranks[identity] = child
        if identity in self._doomed:
            child.kill()

    def kill_rank(self, identity: Identity, doubtful: bool) -> None:
        """`doubtful`: ask for its stacks first."""
        self._doomed.add(identity)  # its fork may still be under way
        child = self._ranks.get(identity)
        if child is not None and not doubtful:
            child.kill()
        elif child is not None:
            child.signal(signal.SIGUSR1)  # its stacks, for the log: what was it doing?
            asyncio.get_running_loop().call_later(STACKS_DELAY_S, child.kill)

    def follow_rank(self, identity: Identity, lifeline: str) -> None:
        """Be told of its end by what it holds there."""
        loop = asyncio.get_running_loop()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # this process has ended its loop first
                loop.call_soon_threadsafe(self._rank_dying, identity)

        try:
            follow(Path(lifeline), tell)
        except OSError as error:
            log.warning("lifeline_missing", file=lifeline, error=str(error))

    async def fork_frontend(self, **spec: Any) -> None:
        """Raises ElasticError when the zygote cannot."""
        self._frontend = await self._zygote.fork(
            "frontend", "front end", lambda child: self._tasks.spawn(self._frontend_exited(child)), **spec
        )

    def kill_frontend(self) -> None:
        if self._frontend is not None:
            self._frontend.kill()

    def kill_all(self) -> None:
        for child in self._children:
            child.kill()

    async def wait_all(self, timeout_s: float) -> None:
        """Until all have ended, or the time is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(child.exited.wait() for child in self._children)), timeout_s)

    @property
    def _children(self) -> tuple[Child, ...]:
        return (*self._ranks.values(), *((self._frontend,) if self._frontend is not None else ()))

    def _rank_dying(self, identity: Identity) -> None:
        if identity in self._ranks:
            self._dying.add(identity)
            self._on_rank_exit(identity)

    async def _rank_exited(self, identity: Identity, child: Child) -> None:
        if identity not in self._dying:
            self._on_rank_exit(identity)
        self._dying.discard(identity)
        self._ranks.pop(identity, None)
        self._doomed.discard(identity)
        with contextlib.suppress(ControlClosed):
            status = await self._zygote.reap(child)
            self._events.record("rank_reaped", {"rank": identity[0], "pid": child.pid, "status": status})

    async def _frontend_exited(self, child: Child) -> None:
        self._frontend = None
        self._on_frontend_gone()
        try:
            status = await self._zygote.reap(child)
        except ControlClosed as error:
            status = str(error)
        self._on_frontend_exit(status)
