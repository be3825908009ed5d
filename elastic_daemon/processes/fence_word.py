"""The newest fence, as one word of shared memory: a group is fenced by one store, before any of its ranks is told.

Messages reach ranks one after the other, and the first rank that is told breaks its connections. What its peers make of
that differs: gloo fails, but NCCL lets an aborted kernel hand on what it has, and a peer could take that for the result
of its collective. With the word no rank counts a step that ends after the first break: it was fenced before.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path


class FenceWord:
    """An epoch, 0 at first: all steps of epochs before it are void. The supervisor writes, ranks read.

    It is aligned and of eight bytes, so that a reader never sees half of it.
    """

    def __init__(self, path: Path, *, writer: bool = False) -> None:
        """Map the word; a `writer` makes the file. Raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL if writer else os.O_RDONLY
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        try:
            if writer:
                os.posix_fallocate(fd, 0, mmap.PAGESIZE)
            page = mmap.mmap(fd, mmap.PAGESIZE, access=mmap.ACCESS_WRITE if writer else mmap.ACCESS_READ)
        finally:
            os.close(fd)
        self._words = memoryview(page).cast("Q")

    @property
    def epoch(self) -> int:
        return self._words[0]

    def fence(self, epoch: int) -> None:
        """Void all epochs before this one. For good: an older fence that comes later changes nothing."""
        self._words[0] = max(self._words[0], epoch)
