"""Keeps the GPU of CUDA_VISIBLE_DEVICES busy, as a process that has lost its way onto it would.

Says a line once it does. Ends by itself after the seconds that it is given, or when whoever started it is gone.
"""

from __future__ import annotations

import os
import sys
import time

import torch

SIDE = 8192
"""A product takes 1.5 ms on an H100, about a time slice: there is always one that waits for its turn."""

IN_FLIGHT = 4


def main() -> None:
    until, parent = time.monotonic() + float(sys.argv[1]), os.getppid()
    left, right = (torch.rand(SIDE, SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = torch.empty_like(left)
    torch.mm(left, right, out=product)
    torch.cuda.synchronize()
    print("burning", flush=True)
    done = [torch.cuda.Event() for _ in range(IN_FLIGHT)]
    number = 0
    while time.monotonic() < until and os.getppid() == parent:
        event = done[number % IN_FLIGHT]
        event.synchronize()
        torch.mm(left, right, out=product)
        event.record()
        number += 1


if __name__ == "__main__":
    main()
