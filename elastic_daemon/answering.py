"""The public listening socket, and the supervisor's HTTP servers.

They answer on a socket of its own always, and on the public one while no front end accepts there.
"""

from __future__ import annotations

import contextlib
import socket

import uvicorn
from starlette.types import ASGIApp

from elastic_daemon.access import AccessGuard, AccessRules
from elastic_daemon.errors import StartError
from elastic_daemon.tasks import Tasks


def bind(host: str, port: int) -> socket.socket:
    """The listening socket. Raises StartError with the reason when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error


class Answering:
    """`app` for the public, `internal` for this user. `listener`: the public socket, shared with the front end."""

    def __init__(
        self, app: ASGIApp, internal: ASGIApp, listener: socket.socket, rules: AccessRules, tasks: Tasks
    ) -> None:
        self._guard = AccessGuard(app, rules)
        self._internal_app = internal
        self._listener = listener
        self._tasks = tasks
        self._internal: uvicorn.Server | None = None
        self._public: uvicorn.Server | None = None

    def open_internal(self, path: str) -> None:
        """Answer on the Unix socket at `path`, which only this user can reach: without keys."""
        self._internal = self._serve(self._internal_app, uds=path)

    def open_public(self) -> None:
        """Accept on the public socket too, until `close_public`."""
        if self._public is None:
            self._public = self._serve(self._guard, sockets=[self._listener.dup()])

    def adopt(self, rules: AccessRules) -> None:
        self._guard.rules = rules

    def close_public(self) -> None:
        if self._public is not None:
            self._public.should_exit = True
            self._public = None

    def close(self) -> None:
        self.close_public()
        if self._internal is not None:
            self._internal.should_exit = True

    def _serve(
        self, app: ASGIApp, uds: str | None = None, sockets: list[socket.socket] | None = None
    ) -> uvicorn.Server:
        config = uvicorn.Config(
            app, uds=uds, lifespan="off", log_level="warning", access_log=False, timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
        self._tasks.spawn(server.serve(sockets=sockets))
        return server
