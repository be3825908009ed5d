"""The rendezvous store, where ranks meet to build the groups of an epoch. It lives with the supervisor, so that no rank is
special."""

from __future__ import annotations

import socket
from datetime import timedelta

HOST = "127.0.0.1"


class RendezvousStore:
    """A torch TCPStore behind a listener of ours: torch's own would listen on all interfaces."""

    def __init__(self) -> None:
        from torch.distributed import TCPStore  # here, since importing torch takes a second

        listener = socket.create_server((HOST, 0), backlog=128)
        self.host, self.port = HOST, int(listener.getsockname()[1])
        self._store = TCPStore(
            self.host,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=10),
            master_listen_fd=listener.detach(),
        )
