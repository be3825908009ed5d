"""The watchdog's process: started, watched by its signs of life, started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from elastic_daemon.processes.launcher import Child, reap_adopted
from elastic_daemon.telemetry.events import EventLog
from elastic_daemon.watch.upkeep import Deed, Upkeep, WatchMode, WatchState
from watchdog.status import status_path

LOOK_S = 0.25
STOP_TIMEOUT_S = 2.0


class WatchdogProcess:
    """One at a time, or in mode `external` somebody else's, whose signs of life are watched all the same."""

    def __init__(
        self, mode: WatchMode, runtime_dir: Path, options: Sequence[str], events: EventLog, kin: Collection[int]
    ) -> None:
        """`options`: further arguments of `elastic-watchdog run`. `kin`: our other children, which others wait for."""
        self._status = status_path(runtime_dir)
        command = (sys.executable, "-m", "watchdog.cli", "run", "--runtime-dir", str(runtime_dir))
        self._command = (*command, "--parent", str(os.getpid()), *options)
        self._events = events
        self._kin = kin
        self._upkeep = Upkeep(mode, time.monotonic())
        self._process: subprocess.Popen[bytes] | None = None
        self._child: Child | None = None
        self._wake = asyncio.Event()
        self._closing = False
        self._said = self._upkeep.state

    @property
    def state(self) -> WatchState:
        return self._upkeep.state

    @property
    def trouble(self) -> str | None:
        return self._upkeep.trouble

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None else None

    async def run(self) -> None:
        """Look after it until `close`."""
        while not self._closing:
            match self._upkeep.look(time.monotonic(), self._sign()):
                case Deed.START:
                    self._start()
                case Deed.KILL if self._child is not None:
                    self._child.kill()
            self._tell()
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._wake.wait()

    async def close(self) -> None:
        """End it, in order if it does so in time."""
        self._closing = True
        self._wake.set()
        for number in (signal.SIGTERM, signal.SIGKILL):
            if (child := self._child) is not None:
                child.signal(number)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(STOP_TIMEOUT_S):
                        await child.exited.wait()

    def _sign(self) -> tuple[int, int] | None:
        try:
            found = self._status.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino

    def _start(self) -> None:
        reap_adopted(self._kin)  # what its predecessor has left
        try:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            self._upkeep.ended(time.monotonic(), f"cannot be started: {error.strerror}")
            return
        self._child = Child(self._process.pid, self._ended)
        self._events.record("watchdog_spawned", {"pid": self._process.pid})

    def _ended(self, child: Child) -> None:
        assert self._process is not None
        code = self._process.wait()
        child.close()
        self._child = None
        if not self._closing:
            how = f"ended with exit status {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
            self._upkeep.ended(time.monotonic(), how)
            self._tell()
            self._wake.set()

    def _tell(self) -> None:
        """Say what has changed."""
        state, said = self.state, self._said
        if state is said:
            return
        self._said = state
        if state is WatchState.ALIVE:
            self._events.record("watchdog_alive", {})
        elif state in (WatchState.DOWN, WatchState.GIVEN_UP):
            self._events.record("watchdog_down", {"reason": self.trouble, "final": state is WatchState.GIVEN_UP})
