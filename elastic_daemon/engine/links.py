"""The TCP connections of a communication library that has no way to end its own waits: another thread breaks them."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterable


class Links:
    """Connections that can be broken from any thread."""

    def __init__(self, sockets: Iterable[tuple[int, int]]) -> None:
        """Each by descriptor and inode; one that is gone by now needs no breaking."""
        self._sockets = []
        for fd, inode in sorted(sockets):
            with contextlib.suppress(OSError):
                link = socket.socket(fileno=os.dup(fd))
                if os.fstat(link.fileno()).st_ino == inode:
                    self._sockets.append(link)
                else:
                    link.close()

    def shutdown(self) -> int:
        """Break all; whoever waits at one gets an error at once. Returns how many were open."""
        broken = 0
        for link in self._sockets:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
                broken += 1
        return broken

    def close(self) -> None:
        for link in self._sockets:
            link.close()
        self._sockets = []


def connected_sockets() -> frozenset[tuple[int, int]]:
    """TCP sockets of this process that are connected: file descriptor and inode.

    The descriptor alone does not tell a socket: a library's threads may close one at any time, and the next gets its
    number.
    """
    found = set()
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            with socket.socket(fileno=os.dup(fd)) as probe:
                if probe.family in (socket.AF_INET, socket.AF_INET6) and probe.getpeername():
                    found.add((fd, os.fstat(probe.fileno()).st_ino))
        except OSError:
            continue
    return frozenset(found)
