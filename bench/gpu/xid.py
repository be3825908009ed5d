"""Makes the driver report an error of a program (Xid 31, a page fault): writes where nothing is.

Says "ready" when it has the first visible GPU, and does it when a line comes on its standard input. No other process on
the GPU is harmed. Exit status 0 if CUDA then refused to go on, 1 if not.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl

UNMAPPED = 1 << 45


@triton.jit
def _store(address):  # type: ignore[no-untyped-def]
    tl.store(address.to(tl.pointer_type(tl.int32)), 1)


def main() -> int:
    mapped = torch.zeros(1, dtype=torch.int32, device="cuda")
    _store[(1,)](mapped.data_ptr())
    torch.cuda.synchronize()
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        _store[(1,)](UNMAPPED)
        torch.cuda.synchronize()
    except RuntimeError:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
