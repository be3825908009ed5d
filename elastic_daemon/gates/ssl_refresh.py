"""Certificates that are renewed on disk, served without a reload: what vLLM's `--enable-ssl-refresh` does."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable

INTERVAL_S = 2.0

Stamp = tuple[int, int, int] | None
"""Inode, size and time of the last write: what changes when a file is written or replaced. None: it is not there."""


class Settled:
    """Says when something that is looked at now and then has changed and stands still again.

    A certificate and its key are two files, which are not replaced at once.
    """

    def __init__(self, used: object) -> None:
        self._used = self._seen = used

    def look(self, now: object) -> bool:
        """Whether it is not what was used before, and as it was at the last look; then it is what is used."""
        changed = now == self._seen and now != self._used
        if changed:
            self._used = now
        self._seen = now
        return changed


async def watch_files(paths: Iterable[str], changed: Callable[[], None], interval_s: float = INTERVAL_S) -> None:
    """Call `changed` when files are not as they were, and have stood still since the last look. Until cancelled."""
    watched = tuple(paths)
    settled = Settled(stamps(watched))
    while True:
        await asyncio.sleep(interval_s)
        if settled.look(stamps(watched)):
            changed()


def stamps(paths: Iterable[str]) -> tuple[Stamp, ...]:
    return tuple(_stamp(path) for path in paths)


def _stamp(path: str) -> Stamp:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
