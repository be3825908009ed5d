"""What breaks on a GPU: a real Xid of a real driver, or a simulated one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from bench.gpu.programs import programs_on
from elastic_daemon.errors import ElasticError
from watchdog.simulator.simulator import Simulator

PAGE_FAULT = 31
XID = Path(__file__).with_name("xid.py")
END_TIMEOUT_S = 20.0


@contextlib.asynccontextmanager
async def page_fault(gpu: str, simulated_in: Path | None) -> AsyncIterator[Callable[[], None]]:
    """Calling what it yields makes the GPU with this UUID report Xid 31. `simulated_in`: the runtime folder of a
    daemon whose GPUs are simulated; None: a process of its own fails on the real one. Raises ElasticError."""
    if simulated_in is not None:
        with Simulator.open(simulated_in) as simulator:
            yield lambda: simulator.xid(gpu, PAGE_FAULT)
        return
    async with programs_on(gpu, XID, says="ready") as [process]:
        assert process.stdin is not None
        stdin = process.stdin
        yield lambda: stdin.write(b"now\n")
        async with asyncio.timeout(END_TIMEOUT_S):
            if status := await process.wait():
                raise ElasticError(f"{XID.name}: exit status {status}: nothing broke on {gpu}")
