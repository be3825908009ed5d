"""A watchdog that is ready to be tried."""

from __future__ import annotations

import asyncio
from typing import Any

from elastic_daemon.drill.daemon import Daemon
from watchdog.status import read_status

POLL_S = 0.1


async def until_watched(daemon: Daemon, timeout_s: float) -> dict[str, Any]:
    """Wait until the watchdog lives, knows all ranks, and waits for events of all their GPUs: the driver keeps none for
    later. Returns `/health`; raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while True:
            health = await daemon.health()
            if health["watchdog"]["state"] == "alive":
                status = read_status(daemon.control.runtime_dir)
                bound = {row["gpu"] for row in health["ranks"] if row["state"] in ("active", "suspect")}
                if status["epoch"] == health["epoch"] and bound <= set(status["driver"]["listening"]):
                    return health
            await asyncio.sleep(POLL_S)
