"""The GPUs of this host, found without calling the driver from here.

On CPU they are simulated, one for each rank: the watchdog, and nobody else, sees them through a simulated driver. On
CUDA the driver is asked in a child with a deadline: a call to it might never return.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from elastic_daemon.errors import StartError
from elastic_daemon.watch.gpus import Gpus, visible
from watchdog.errors import NotRunning
from watchdog.simulator import SimulatorError, build_libraries, create
from watchdog.status import read_status

LIST_TIMEOUT_S = 30.0
"""Without persistence mode the driver takes seconds to wake GPUs up."""


class GpusUnknown(Exception):
    """The driver did not tell. The message says why."""


def simulate(runtime_dir: Path, ranks: int, ranks_per_gpu: int, spares: int) -> Gpus:
    """Power up simulated GPUs, enough for `ranks`, and `spares` idle ones. Raises StartError."""
    bound = -(-ranks // ranks_per_gpu)
    try:
        build_libraries()
        with create(runtime_dir, bound, spares) as simulator:
            return Gpus(tuple(gpu.uuid for gpu in simulator.list()[:bound]), ranks_per_gpu)
    except SimulatorError as error:
        raise StartError(f"the simulated GPUs: {error} (--watchdog off does without them)") from error


async def ask_driver(ranks_per_gpu: int) -> Gpus:
    """The GPUs that CUDA shows to ranks. Raises GpusUnknown."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "watchdog.gpu_list"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(LIST_TIMEOUT_S):
            out, errors = await process.communicate()
    except TimeoutError as error:
        process.kill()  # and not waited for: it may be stuck in the kernel
        raise GpusUnknown(f"the driver has not listed the GPUs within {LIST_TIMEOUT_S:g} s") from error
    if process.returncode:
        raise GpusUnknown(errors.decode(errors="replace").strip()[-300:] or f"exit status {process.returncode}")
    uuids = [gpu["uuid"] for gpu in sorted(json.loads(out), key=lambda gpu: gpu["index"])]
    return Gpus(visible(uuids, os.environ.get("CUDA_VISIBLE_DEVICES")), ranks_per_gpu)


def known_gpus(runtime_dir: Path) -> frozenset[str]:
    """UUIDs of all GPUs that the watchdog has seen, gone ones included; none while it has not begun to watch."""
    try:
        return frozenset(str(gpu["uuid"]) for gpu in read_status(runtime_dir)["gpus"])
    except (NotRunning, KeyError, TypeError):
        return frozenset()
