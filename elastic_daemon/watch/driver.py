"""The GPUs of this host, found without calling the driver from here.

On CPU they are simulated, one for each rank: the watchdog, and nobody else, sees them through a simulated driver. On
CUDA the driver is asked in a child with a deadline: a call to it might never return.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path

from elastic_daemon.errors import StartError
from elastic_daemon.watch.gpus import Listing
from watchdog.errors import NotRunning
from watchdog.simulator import SimulatorError, build_libraries, create
from watchdog.status import read_status

LIST_TIMEOUT_S = 30.0
"""Without persistence mode the driver takes seconds to wake GPUs up."""
NEXT_TIMEOUT_S = 5.0
"""Once one has answered, the others do so within this time of each other, or hang."""
END_TIMEOUT_S = 1.0


class GpusUnknown(Exception):
    """The driver did not tell. The message says why."""


def simulate(runtime_dir: Path, ranks: int, ranks_per_gpu: int, spares: int) -> tuple[str, ...]:
    """Power up simulated GPUs, enough for `ranks`, and `spares` idle ones. Raises StartError."""
    bound = -(-ranks // ranks_per_gpu)
    try:
        build_libraries()
        with create(runtime_dir, bound, spares) as simulator:
            return tuple(gpu.uuid for gpu in simulator.list())
    except SimulatorError as error:
        raise StartError(f"the simulated GPUs: {error} (--watchdog off does without them)") from error


async def ask_driver(environment: Mapping[str, str] | None = None) -> Listing:
    """The GPUs of this host, those included that cannot be read. Raises GpusUnknown when none can.

    `environment`: of the child that asks; None: ours.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "watchdog.gpu_list"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None and process.stderr is not None
    listing = Listing()
    try:
        async with asyncio.timeout(LIST_TIMEOUT_S):
            while not listing.complete:
                async with asyncio.timeout(NEXT_TIMEOUT_S if listing.any_read else None):
                    line = await process.stdout.readline()
                if not line:
                    break
                listing.hear(line)
        if listing.any_read:
            return listing
        async with asyncio.timeout(END_TIMEOUT_S):
            errors = (await process.stderr.read()).decode(errors="replace").strip()[-300:]
    except TimeoutError as error:
        if listing.any_read:
            return listing  # whoever else is there hangs
        raise GpusUnknown(f"the driver has not listed the GPUs within {LIST_TIMEOUT_S:g} s") from error
    except (ValueError, KeyError, TypeError) as error:
        raise GpusUnknown(f"the list of GPUs cannot be read: {type(error).__name__}: {error}") from error
    finally:
        await _end(process)
    raise GpusUnknown("; ".join(sorted({*listing.unread.values()})) or errors or "the driver lists no GPU")


async def _end(process: asyncio.subprocess.Process) -> None:
    """It may be stuck in the kernel: not waited for without end."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_TIMEOUT_S):
            await process.wait()


def known_gpus(runtime_dir: Path) -> frozenset[str]:
    """UUIDs of all GPUs that the watchdog has seen, gone ones included; none while it has not begun to watch."""
    try:
        return frozenset(str(gpu["uuid"]) for gpu in read_status(runtime_dir)["gpus"])
    except (NotRunning, KeyError, TypeError):
        return frozenset()
