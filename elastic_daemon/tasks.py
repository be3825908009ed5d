"""An owner for tasks that nobody awaits: none is lost, and none fails unheard."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

log = structlog.get_logger(__name__)


class Tasks:
    """`on_error` is called with "ErrorType: message" when a task fails."""

    def __init__(self, on_error: Callable[[str], None]) -> None:
        self._on_error = on_error
        self._running: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._done)

    async def settle(self, timeout_s: float) -> None:
        """Let all finish within `timeout_s`; what is left then is cancelled."""
        if self._running:
            _, unfinished = await asyncio.wait(self._running, timeout=timeout_s)
            for task in unfinished:
                task.cancel()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            described = f"{type(error).__name__}: {error}"
            log.error("task_failed", error=described)
            self._on_error(described)
