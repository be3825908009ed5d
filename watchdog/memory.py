"""Memory that was needed once and is kept by the allocator, given back to the kernel."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """To be called when a process has started. Compiling pynvml alone, where no compiled copy could be kept on disk,
    leaves more behind than the rest of a child takes. Nothing where the C library has no `malloc_trim` (not glibc)."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
