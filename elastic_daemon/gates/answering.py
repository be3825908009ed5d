"""The public listening socket, and the supervisor's HTTP servers.

They answer on a socket of its own always, and on the public one while no front end accepts there.
"""

from __future__ import annotations

import contextlib
import os
import socket

import uvicorn
from starlette.types import ASGIApp

from elastic_daemon.config import Settings
from elastic_daemon.errors import StartError
from elastic_daemon.gates.access import AccessGuard
from elastic_daemon.gates.limits import KEEP_ALIVE_S, BoundedHttp, SizeLimits
from elastic_daemon.gates.tls import Tls
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
        self, app: ASGIApp, internal: ASGIApp, listener: socket.socket, settings: Settings, tasks: Tasks
    ) -> None:
        self._guard = AccessGuard(app, settings.access)
        self._limits = SizeLimits(self._guard, settings.max_body_size)
        self._tls = settings.tls
        self._internal_app = internal
        self._listener = listener
        self._tasks = tasks
        self._internal: uvicorn.Server | None = None
        self._public: uvicorn.Server | None = None

    def open_internal(self, path: str) -> None:
        """Answer on the Unix socket at `path`, which only this user can reach: without keys."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        os.chmod(path, 0o600)  # uvicorn would open it to everybody
        listener.listen(2048)
        self._internal = self._serve(self._internal_app, listener)

    def open_public(self) -> None:
        """Accept on the public socket too, until `close_public`."""
        if self._public is None:
            self._public = self._serve(self._limits, self._listener.dup(), self._tls)

    def adopt(self, settings: Settings) -> None:
        """Raises ConfigError when the certificate cannot be read any more."""
        if self._tls is not None and self._public is not None and (context := self._public.config.ssl) is not None:
            self._tls.load_into(context)
        self._guard.rules = settings.access
        self._limits.max_body_bytes = settings.max_body_size

    def close_public(self) -> None:
        """Accept nothing more at once, and end when what was accepted is answered."""
        if self._public is not None:
            for server in getattr(self._public, "servers", ()):  # there are none before it has started
                server.close()  # it would go on accepting for a tenth of a second
            self._public.should_exit = True
            self._public = None

    def close(self) -> None:
        self.close_public()
        if self._internal is not None:
            self._internal.should_exit = True

    def _serve(self, app: ASGIApp, listener: socket.socket, tls: Tls | None = None) -> uvicorn.Server:
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=1,
            timeout_keep_alive=KEEP_ALIVE_S,
            http=BoundedHttp,
            **(tls.uvicorn_options if tls is not None else {}),
        )
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
        self._tasks.spawn(server.serve(sockets=[listener]))
        return server
