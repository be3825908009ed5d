"""Wakes the thread of NCCL that waits for file descriptors of peers.

It looks up every 500 ms whether its communicator was aborted, and `ncclCommAbort` waits for it (NCCL 2.30, proxy.cc:
`ncclProxyServiceUDS`). A datagram ends its wait at once; of a communicator that was aborted it reads nothing.
"""

from __future__ import annotations

import contextlib
import re
import socket
from pathlib import Path

from bench.footprint import link_targets

NAME = re.compile(rb"@tmp/nccl-socket-\d+-[0-9a-f]+@*$")
"""As /proc/net/unix has it: abstract, with `@` for each zero byte, of which NCCL binds the ones at the end, too."""


def service_sockets() -> frozenset[bytes]:
    """Addresses of those that this process has open."""
    own = set(link_targets(Path("/proc/self/fd")))
    found = set()
    for line in Path("/proc/self/net/unix").read_bytes().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and f"socket:[{fields[6].decode()}]" in own and NAME.match(fields[7]):
            found.add(fields[7].replace(b"@", b"\0"))
    return frozenset(found)


def wake(sockets: frozenset[bytes]) -> None:
    """To be called when their communicators have been aborted."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        for address in sockets:
            with contextlib.suppress(OSError):  # it has gone, or has enough to read
                sender.sendto(b"\0", address)
