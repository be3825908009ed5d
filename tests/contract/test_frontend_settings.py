"""The real front end, told of new settings: it goes by them, and then says so."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest

from elastic_daemon.config import Settings
from elastic_daemon.engine.configure import Deployment
from elastic_daemon.frontend import Frontend
from elastic_daemon.gates.access import AccessRules
from elastic_daemon.processes.frontend_link import frontend_settings
from elastic_daemon.processes.messages import decode, encode


class Front(Frontend):
    """A front end without engines and without a server."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        super().__init__(cast(Deployment, None), {})
        parts: Any = self
        parts._guard, parts._gate, parts._sizes = SimpleNamespace(), SimpleNamespace(), SimpleNamespace()
        parts._batches = SimpleNamespace()
        parts._client, parts._server, parts._tls = SimpleNamespace(), SimpleNamespace(), None
        self._writer = writer

    async def follow(self, reader: asyncio.StreamReader) -> None:
        await self._follow(reader)


async def test_new_settings_hold_before_they_are_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[str] = []
    monkeypatch.setattr("elastic_daemon.frontend.configure_logging", levels.append)
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    their_reader, their_writer = await asyncio.open_connection(sock=theirs)
    front = Front(writer)
    following = asyncio.create_task(front.follow(reader))
    settings = Settings(
        api_key=("one",), log_level="debug", hold_timeout=7.0, max_waiting=3, queue_timeout=4.0, max_body_size=2048
    )
    their_writer.write(encode({"type": "settings", **frontend_settings(settings)}))
    assert decode(await asyncio.wait_for(their_reader.readline(), 10)) == {"type": "adopted"}
    assert front._guard.rules == AccessRules(("one",), loopback=True)
    assert front._client.hold_timeout_s == 7.0
    assert front._batches.limits == front._gate.limits
    assert (front._gate.limits.max_waiting, front._gate.limits.queue_timeout_s) == (3, 4.0)
    assert (front._sizes.max_body_bytes, levels) == (2048, ["debug"])
    their_writer.close()
    await asyncio.wait_for(following, 10)
    assert front._server.should_exit, "a supervisor that is gone ends it"
    writer.close()
