"""Writes down what the controller wants remembered over restarts."""

from __future__ import annotations

import asyncio

import structlog

from elastic_daemon import protocol as p
from elastic_daemon.config import Settings
from elastic_daemon.state.barred_store import barred_path, store_barred
from elastic_daemon.state.target_store import store_target, target_path

log = structlog.get_logger(__name__)


class StateWriter:
    """One thing after the other, off the event loop: a disk can be slow."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._turn = asyncio.Lock()

    async def store(self, order: p.StoreTarget | p.StoreBarred) -> None:
        """A disk that fails costs no more than the memory of it: what was decided stands."""
        async with self._turn:
            match order:
                case p.StoreTarget():
                    await self._store_target(order.target)
                case p.StoreBarred():
                    await self._store_barred(order)

    async def _store_target(self, target: int) -> None:
        try:
            await asyncio.to_thread(store_target, self._settings, target)
        except OSError as error:
            path = str(target_path(self._settings))
            log.error("target_not_stored", target=target, file=path, error=error.strerror)

    async def _store_barred(self, order: p.StoreBarred) -> None:
        try:
            await asyncio.to_thread(store_barred, self._settings, order.barred)
        except OSError as error:
            path = str(barred_path(self._settings))
            log.error("barred_gpus_not_stored", gpus=list(order.barred), file=path, error=error.strerror)
