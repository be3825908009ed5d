"""One HTTP request to a server on a Unix socket, with the standard library only.

A client library would double the watchdog's memory (`docs/watchdog.md`) for two kinds of small requests a second to a
server of our own. The request is HTTP/1.0: its answer ends with the connection, so nothing has to be taken apart.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")


async def request(socket: Path, method: str, path: str, body: Any = None, timeout_s: float = 2.0) -> Answer:
    """Send `body` as JSON and return the answer.

    Raises OSError, TimeoutError when the answer is not complete in time, ValueError when it is no HTTP.
    """
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.0\r\nHost: daemon\r\nContent-Length: {len(content)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_unix_connection(socket)
        try:
            writer.write(head.encode() + content)
            await writer.drain()
            return parse(await reader.read())
        finally:
            writer.close()


def parse(answer: bytes) -> Answer:
    """Raises ValueError when it is no HTTP, or less than its server meant to send."""
    head, found, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    version, _, rest = first.partition(b" ")
    if not found or not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
        raise ValueError(f"no HTTP answer: {answer[:80]!r}")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    if (length := headers.get(b"content-length")) is not None and int(length) != len(body):
        raise ValueError(f"{len(body)} bytes of an answer of {int(length)}")
    return Answer(int(rest[:3]), body)
