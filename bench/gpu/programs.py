"""Programs of nobody's that share the GPU of a rank."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from elastic_daemon.errors import ElasticError

START_S, END_S = 60.0, 10.0


@contextlib.asynccontextmanager
async def programs_on(
    gpu: str, script: Path, *arguments: str, says: str, count: int = 1
) -> AsyncIterator[list[asyncio.subprocess.Process]]:
    """So many processes of `script` that see the GPU with this UUID alone, and have begun: they said so, in a line.

    They are killed at the end. Raises ElasticError if one does not begin, TimeoutError if not in time.
    """
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    pipe = asyncio.subprocess.PIPE
    processes: list[asyncio.subprocess.Process] = []
    try:
        for _ in range(count):
            processes.append(
                await asyncio.create_subprocess_exec(
                    sys.executable, script, *arguments, env=environment, stdin=pipe, stdout=pipe
                )
            )
        for process in processes:
            assert process.stdout is not None
            async with asyncio.timeout(START_S):
                if await process.stdout.readline() != f"{says}\n".encode():
                    raise ElasticError(f"{script.name} on {gpu} ended with status {await process.wait()}")
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        for process in processes:
            await asyncio.wait_for(process.wait(), END_S)
