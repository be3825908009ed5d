"""The rendezvous store, where ranks meet to build the groups of an epoch. It lives with the supervisor, not a rank."""

from __future__ import annotations

import secrets
import socket
from datetime import timedelta

from elastic_daemon.errors import engine_missing

HOST = "127.0.0.1"


class RendezvousStore:
    """A torch TCPStore behind a listener of ours: torch's own would listen on all interfaces."""

    def __init__(self) -> None:
        """Raises ConfigError when torch is not installed."""
        try:
            from torch.distributed import TCPStore  # here, since importing torch takes a second
        except ImportError as error:
            raise engine_missing(error) from error

        listener = socket.create_server((HOST, 0), backlog=128)
        self.host, self.port = HOST, int(listener.getsockname()[1])
        # Keeps names of one run apart from what strays in from another, whose store had the same port. It is no secret:
        # any local user can connect, and the store lists all its names to whoever asks.
        self.prefix = secrets.token_hex(16)
        self._store = TCPStore(
            self.host,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=10),
            master_listen_fd=listener.detach(),
        )
