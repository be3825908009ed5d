"""Whether a device computes what it should, before a rank trusts it: allocate, compute, compare."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import structlog
import torch

from elastic_daemon.errors import StartError

log = structlog.get_logger(__name__)

SIZE = 256
"""Of the square matrices. Entries up to 6 keep every sum below 2^24, so that float32 (and TF32) is exact."""

PATTERN_BYTES = 8 << 20
DEADLINE_S = 20.0
"""The first use of a GPU makes its context, which takes seconds on a busy host."""

Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def probe(device: torch.device, multiply: Multiply = torch.matmul, deadline_s: float = DEADLINE_S) -> None:
    """Raises StartError when a result is wrong.

    Ends the process with SIGALRM when the device does not answer within `deadline_s`: a call into a driver that hangs
    returns to nobody who could raise.
    """
    started = time.monotonic()
    previous = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, deadline_s)
    try:
        _memory_holds(device)
        _products_are_right(device, multiply)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    log.info("device_probed", device=str(device), seconds=round(time.monotonic() - started, 4))


def _memory_holds(device: torch.device) -> None:
    for value in (0x55, 0xAA):
        written = torch.full((PATTERN_BYTES,), value, dtype=torch.uint8, device=device)
        if wrong := int(torch.count_nonzero(written != value)):
            raise StartError(f"{device} does not hold what is written to it: {wrong} of {PATTERN_BYTES} bytes differ")


def _products_are_right(device: torch.device, multiply: Multiply) -> None:
    index = torch.arange(SIZE * SIZE, dtype=torch.float64).reshape(SIZE, SIZE)
    left, right = index % 7, (index * 3 + 1) % 5
    expected = left @ right  # float64 on the host: exact too, by other instructions
    product = multiply(left.to(device, torch.float32), right.to(device, torch.float32)).to("cpu", torch.float64)
    if wrong := int((product != expected).sum()):
        raise StartError(f"{device} computes wrongly: {wrong} of {SIZE * SIZE} products differ")
