"""The supervisor's end of the control connections."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import structlog

from elastic_daemon.errors import ControlClosed
from elastic_daemon.processes.messages import MAX_LINE_BYTES, Message, decode, encode

log = structlog.get_logger(__name__)

CALL_TIMEOUT_S = 60.0


class Peer:
    """A connected child. `role` is "rank" or "frontend"; `incarnation` is that of a rank, 0 for a front end."""

    def __init__(self, hello: Message, writer: asyncio.StreamWriter) -> None:
        self.role: str = hello["role"]
        self.rank = int(hello.get("rank", -1))
        self.incarnation = int(hello.get("incarnation", 0))
        self.lifeline: str | None = hello.get("lifeline")
        self._writer = writer
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._ids = itertools.count(1)
        self._ended = False

    def send(self, type_: str, **fields: Any) -> None:
        """Queue a message. A child that is gone gets nothing, and its death is reported by the kernel."""
        if not self._writer.is_closing():
            self._writer.write(encode({"type": type_, **fields}))

    async def call(self, name: str) -> Any:
        """Run a call in a rank and return its result.

        Raises:
            ControlClosed: the rank has ended, or ends first.
            TimeoutError: no answer within `CALL_TIMEOUT_S`.
            RuntimeError: the call failed there.
        """
        if self._ended or self._writer.is_closing():
            raise self._closed_error()
        call_id = next(self._ids)
        future = self._calls[call_id] = asyncio.get_running_loop().create_future()
        self.send("call", id=call_id, name=name)
        try:
            return await asyncio.wait_for(future, CALL_TIMEOUT_S)
        finally:
            self._calls.pop(call_id, None)

    def reply(self, message: Message) -> None:
        future = self._calls.get(message["id"])
        if future is None or future.done():
            return
        if message["error"]:
            future.set_exception(RuntimeError(f"rank {self.rank}: {message['error']}"))
        else:
            future.set_result(message["result"])

    def closed(self) -> None:
        self._ended = True
        for future in self._calls.values():
            if not future.done():
                future.set_exception(self._closed_error())

    def _closed_error(self) -> ControlClosed:
        return ControlClosed(f"{self.role} {self.rank} ended before it answered")


class ControlServer:
    """Accepts children and hands on what they say."""

    def __init__(self, on_message: Callable[[Peer, Message], None], on_hello: Callable[[Peer], None]) -> None:
        self._on_message = on_message
        self._on_hello = on_hello
        self._server: asyncio.Server
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, path: str) -> None:
        self._server = await asyncio.start_unix_server(self._serve, path, limit=MAX_LINE_BYTES)
        os.chmod(path, 0o600)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer: Peer | None = None
        self._writers.add(writer)
        try:
            if _peer_uid(writer) != os.getuid():
                return
            while line := await reader.readline():
                message = decode(line)
                if peer is None:
                    peer = Peer(message, writer)
                    self._on_hello(peer)
                elif message["type"] == "reply":
                    peer.reply(message)
                else:
                    self._on_message(peer, message)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            if peer is not None:
                peer.closed()
            self._writers.discard(writer)
            writer.close()

    async def close(self) -> None:
        """Stop accepting, and end all connections."""
        self._server.close()
        for writer in tuple(self._writers):
            writer.close()
        while self._writers:
            await asyncio.sleep(0)


def _peer_uid(writer: asyncio.StreamWriter) -> int:
    connection = writer.get_extra_info("socket")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", credentials)[1]
    return uid
