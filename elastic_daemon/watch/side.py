"""The daemon's whole side of the watchdog, as the supervisor uses it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Collection
from pathlib import Path

from starlette.types import ASGIApp

from elastic_daemon.config import Device, Settings
from elastic_daemon.routes.health import WatchdogView
from elastic_daemon.state.barred_store import FILE_NAME as BARRED_FILE_NAME
from elastic_daemon.state.barred_store import load_barred
from elastic_daemon.watch.desk import Deployment, WatchdogDesk
from elastic_daemon.watch.driver import GpusUnknown, ask_driver, known_gpus, simulate
from elastic_daemon.watch.gpus import AllowList
from elastic_daemon.watch.process import WatchdogProcess
from elastic_daemon.watch.routes import with_watchdog_routes
from elastic_daemon.watch.upkeep import WatchMode
from watchdog.heartbeat.layout import DIRECTORY_NAME
from watchdog.heartbeat.page import page_path
from watchdog.state import FILE_NAME as STATE_FILE_NAME


class WatchdogSide:
    """Knows the GPUs once `prepare` is through; looks after the watchdog in `run`."""

    def __init__(self, settings: Settings, deployment: Deployment, kin: Collection[int]) -> None:
        """`kin`: children of this process that others wait for."""
        self._settings = settings
        self._deployment = deployment
        self._runtime_dir = settings.runtime_dir
        self.uuids: tuple[str, ...] | None = None
        """Of the GPUs to begin with, by the index that ranks would use, spares last. None: they are not known."""
        self.barred: dict[str, str] = {}
        """GPUs that were barred in an earlier life, and why."""
        self._on = settings.watchdog is not WatchMode.OFF
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") if settings.device is Device.CUDA else None
        self._allowed = AllowList(visible)
        self._desk = WatchdogDesk(deployment, settings.runtime_dir, self._allowed)
        self._process = WatchdogProcess(
            settings.watchdog, settings.runtime_dir, settings.watchdog_options, deployment.events, kin
        )
        self._remove_pages()

    @property
    def view(self) -> WatchdogView:
        process = self._process
        return WatchdogView(self._settings.watchdog.value, process.state.value, process.pid, process.trouble)

    def routes_before(self, control: ASGIApp) -> ASGIApp:
        """The application for the Unix socket."""
        return with_watchdog_routes(control, self._desk if self._on else None)

    async def prepare(self) -> None:
        """Find the GPUs. Raises StartError where they should be simulated and cannot be."""
        settings = self._settings
        if not self._on:
            return
        if settings.device is Device.CPU:
            self._forget_simulated()
        self.barred = await asyncio.to_thread(load_barred, settings)
        if self.barred:
            self._deployment.events.record("gpus_still_barred", {"gpus": self.barred})
        if settings.device is Device.CPU:
            self.uuids = await asyncio.to_thread(
                simulate,
                self._runtime_dir,
                settings.data_parallel_size,
                settings.ranks_per_gpu,
                settings.spare_gpus,
            )
            return
        try:
            listing = await ask_driver()
        except GpusUnknown as error:
            self._deployment.events.record("gpus_unknown", {"reason": str(error)})
            return
        self.uuids = self._allowed.begin(listing.gpus)
        if listing.unread:
            self._deployment.events.record("gpus_unread", {"gpus": listing.unread})

    async def run(self) -> None:
        """Have somebody watch until `close`."""
        await self._process.run()

    async def close(self) -> None:
        await self._process.close()
        self._remove_pages()
        with contextlib.suppress(OSError):
            (self._runtime_dir / DIRECTORY_NAME).rmdir()

    def release_gpu(self, uuid: str) -> None:
        """Out of quarantine. Raises LookupError, with the reason, where nobody knows this GPU."""
        if not self._on:
            raise LookupError("this daemon was started with --watchdog off: no GPU is in quarantine")
        known = {*(self.uuids or ()), *self.barred, *known_gpus(self._runtime_dir)}
        if uuid not in known:
            raise LookupError(f"no GPU {uuid} is known; known are {', '.join(sorted(known)) or 'none'}")
        self._desk.release_gpu(uuid)

    def remove_page(self, incarnation: int) -> None:
        """The heartbeat page of a rank that has ended."""
        page_path(self._runtime_dir, incarnation).unlink(missing_ok=True)

    def _forget_simulated(self) -> None:
        """Simulated GPUs are healthy after a start; what was remembered of them goes, unless it is kept elsewhere."""
        if self._settings.state_dir is None:
            for name in (STATE_FILE_NAME, BARRED_FILE_NAME):
                (self._settings.simulated_state_dir / name).unlink(missing_ok=True)

    def _remove_pages(self) -> None:
        for page in Path(self._runtime_dir, DIRECTORY_NAME).glob("rank-*"):
            with contextlib.suppress(OSError):
                page.unlink()
