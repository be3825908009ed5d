"""What happens to healthy machines all the time, done to a live daemon: none of it is a reason to give anything up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from elastic_daemon.drill.daemon import Daemon
from elastic_daemon.engine.zygote import die_with_parent
from watchdog.simulator import Simulator, Throttle

APPLICATION_XIDS = (13, 31, 32, 43, 45, 69)
"""What a program does wrong on a GPU that works (NVIDIA's Xid catalog), or what follows when it is killed."""
QUIET_XIDS = (43,)
"""That the watchdog's table ignores."""
BLIP_S = (0.5, 4.0)
STALL_S = 0.5
"""A machine that stalls for so long is no fault of a rank: docs/heartbeat.md."""
BURN_S = (4.0, 8.0)
BURNER = "while True: pass"

BLIPS = (Throttle.THERMAL, Throttle.POWER_BRAKE, Throttle.SW_THERMAL, Throttle.POWER_CAP)


class Noise(StrEnum):
    THROTTLE = "throttle blip"
    ECC = "corrected ECC errors"
    XID = "application Xid"
    STALL = "stalled rank"
    BURN = "competing process"


PAUSES_S = {
    Noise.THROTTLE: (1.0, 6.0),
    Noise.ECC: (2.0, 6.0),
    Noise.XID: (1.5, 5.0),
    Noise.STALL: (1.5, 5.0),
    Noise.BURN: (3.0, 8.0),
}
"""Between two of a kind, drawn evenly."""


@dataclass
class Made:
    """What was done so far. `expected`: signals that the watchdog must have on record for it."""

    counts: Counter[Noise] = field(default_factory=Counter)
    xids: Counter[int] = field(default_factory=Counter)
    expected: set[str] = field(default_factory=set)
    longest_stall_s: float = 0.0


class Disturber:
    def __init__(self, daemon: Daemon, seed: int) -> None:
        self.made = Made()
        self._daemon = daemon
        self._random = random.Random(seed)
        self._simulator = Simulator.open(daemon.control.runtime_dir)

    async def run(self) -> None:
        """Noise of all kinds until it is cancelled; then all is as it was."""
        kinds: dict[Noise, Callable[[dict[str, Any]], Awaitable[None]]] = {
            Noise.THROTTLE: self._throttle,
            Noise.ECC: self._corrected,
            Noise.XID: self._xid,
            Noise.STALL: self._stall,
            Noise.BURN: self._burn,
        }
        try:
            async with asyncio.TaskGroup() as tasks:
                for kind, act in kinds.items():
                    tasks.create_task(self._repeat(kind, act))
        finally:
            for gpu in self._simulator.list():
                self._simulator.heal(gpu.uuid)
            self._simulator.close()

    async def _repeat(self, kind: Noise, act: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(self._random.uniform(*PAUSES_S[kind]))
            rows = [row for row in (await self._daemon.health())["ranks"] if row["state"] in ("active", "suspect")]
            if rows:
                await act(self._random.choice(rows))
                self.made.counts[kind] += 1

    async def _throttle(self, row: dict[str, Any]) -> None:
        self._simulator.throttle(row["gpu"], self._random.choice(BLIPS))
        await asyncio.sleep(self._random.uniform(*BLIP_S))
        self._simulator.throttle(row["gpu"], Throttle.NONE)

    async def _corrected(self, row: dict[str, Any]) -> None:
        self._simulator.ecc(row["gpu"], self._random.randint(1, 20), corrected=True)
        self.made.expected.add("ecc_single_bit")

    async def _xid(self, row: dict[str, Any]) -> None:
        code = self._random.choice(APPLICATION_XIDS)
        self._simulator.xid(row["gpu"], code)
        self.made.xids[code] += 1
        if code not in QUIET_XIDS:
            self.made.expected.add(f"xid:{code}")

    async def _stall(self, row: dict[str, Any]) -> None:
        with contextlib.suppress(ProcessLookupError), _held(row["pids"][0]) as process:
            started = time.monotonic()
            signal.pidfd_send_signal(process, signal.SIGSTOP)
            try:
                await asyncio.sleep(STALL_S)
            finally:
                signal.pidfd_send_signal(process, signal.SIGCONT)
                self.made.longest_stall_s = max(self.made.longest_stall_s, time.monotonic() - started)

    async def _burn(self, _: dict[str, Any]) -> None:
        parent = os.getpid()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", BURNER, preexec_fn=lambda: die_with_parent(parent)
        )
        try:
            await asyncio.sleep(self._random.uniform(*BURN_S))
        finally:
            process.kill()
            await process.wait()


@contextlib.contextmanager
def _held(pid: int) -> Iterator[int]:
    """A descriptor of a process, so that no other can be hit by mistake. Raises ProcessLookupError."""
    process = os.pidfd_open(pid)
    try:
        yield process
    finally:
        os.close(process)
