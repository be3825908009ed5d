"""Runs commands against a plane's real HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from elastic_daemon.app import make_control_app
from elastic_daemon.cli import main
from elastic_daemon.gates.access import AccessGuard, AccessRules
from elastic_daemon.processes.runtime_dir import http_socket
from tests.certificates import Issued
from tests.unit.operator_plane import OperatorPlane


class Server:
    """Serves a plane's control routes in a thread: on a runtime directory's socket, or guarded on a TCP port.

    `tls`: what it is to prove itself with there. `clients`: the authority whose certificates its clients must have.
    """

    def __init__(
        self, plane: OperatorPlane, where: Path | AccessRules, tls: Issued | None = None, clients: Path | None = None
    ) -> None:
        app, guarded = make_control_app(plane), isinstance(where, AccessRules)
        self._listener = socket.create_server(("127.0.0.1", 0)) if guarded else None
        config = uvicorn.Config(
            AccessGuard(app, where) if isinstance(where, AccessRules) else app,
            uds=http_socket(where) if isinstance(where, Path) else None,
            log_level="warning",
            timeout_graceful_shutdown=1,
            ssl_certfile=tls.cert if tls is not None else None,
            ssl_keyfile=tls.key if tls is not None else None,
            ssl_ca_certs=str(clients) if clients is not None else None,
            ssl_cert_reqs=ssl.CERT_REQUIRED if clients is not None else ssl.CERT_NONE,
        )
        self._origin = "http://127.0.0.1" if tls is None else "https://localhost"
        self._plane, self._server = plane, uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    @property
    def url(self) -> str:
        assert self._listener is not None
        return f"{self._origin}:{self._listener.getsockname()[1]}"

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await self._server.serve(sockets=[self._listener] if self._listener is not None else None)

        asyncio.run(serve())

    def record(self, name: str, **fields: Any) -> None:
        self.call(self._plane.events.record, name, fields)

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call it in the server's thread, soon."""
        self._loop.call_soon_threadsafe(function, *arguments)

    def stop(self) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def serving(
    plane: OperatorPlane, where: Path | AccessRules, tls: Issued | None = None, clients: Path | None = None
) -> Iterator[Server]:
    server = Server(plane, where, tls, clients)
    try:
        yield server
    finally:
        server.stop()


def run(*command_line: str) -> int:
    """The exit status of `elastic-daemon` with these arguments."""
    with pytest.raises(SystemExit) as ended:
        main(command_line)
    assert isinstance(ended.value.code, int)
    return ended.value.code
