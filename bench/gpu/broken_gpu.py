"""What breaks on a GPU: a real Xid of a real driver, or a simulated one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from elastic_daemon.errors import ElasticError
from watchdog.simulator.simulator import Simulator

PAGE_FAULT = 31
READY_TIMEOUT_S = 90.0
END_TIMEOUT_S = 20.0


@contextlib.asynccontextmanager
async def page_fault(gpu: str, simulated_in: Path | None) -> AsyncIterator[Callable[[], None]]:
    """Calling what it yields makes the GPU with this UUID report Xid 31. `simulated_in`: the runtime folder of a
    daemon whose GPUs are simulated; None: a process of its own fails on the real one. Raises ElasticError."""
    if simulated_in is not None:
        with Simulator.open(simulated_in) as simulator:
            yield lambda: simulator.xid(gpu, PAGE_FAULT)
        return
    command = (sys.executable, "-m", "bench.gpu.xid")
    pipe = asyncio.subprocess.PIPE
    visible = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, env=visible)
    assert process.stdin is not None and process.stdout is not None
    stdin = process.stdin
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            if await process.stdout.readline() != b"ready\n":
                raise ElasticError(f"{' '.join(command)} ended before it had {gpu}")
        yield lambda: stdin.write(b"now\n")
        async with asyncio.timeout(END_TIMEOUT_S):
            if status := await process.wait():
                raise ElasticError(f"{' '.join(command)}: exit status {status}: nothing broke on {gpu}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
