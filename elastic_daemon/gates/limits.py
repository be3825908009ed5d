"""How much a client may send, bodies (413) and headers (431), and how long it may say nothing.

For both processes that accept connections.
"""

from __future__ import annotations

import json
from typing import Any, cast

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 << 10
"""Of request line and headers together."""

MAX_HEADERS = 128

KEEP_ALIVE_S = 30
"""How long a connection stays open between two requests. Longer than clients keep one to use it again (httpx: 5 s, as
in the front end, which asks the supervisor): who sends a request just as this side closes gets no answer."""

HEADERS_TOO_LARGE = f"request line and headers may have {MAX_HEADER_BYTES} bytes and {MAX_HEADERS} lines at most"


def _error(code: int, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "code": code}}


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's parser, which would collect headers without end: a client that sends too many is told and cut off."""

    _head_bytes = 0
    _in_head = True
    _ended = False

    def data_received(self, data: bytes) -> None:
        self._ended = False
        super().data_received(data)
        if self._in_head and not self._ended:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
                self._refuse()

    def on_message_begin(self) -> None:
        self._head_bytes, self._in_head = 0, True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        # What follows the message in the same read, if anything, is not counted: one read is bounded anyway.
        self._head_bytes, self._in_head, self._ended = 0, True, True

    def _refuse(self) -> None:
        body = json.dumps(_error(431, HEADERS_TOO_LARGE)).encode()
        head = (
            "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


class SizeLimits:
    """ASGI middleware. It comes first: nothing reads more of a body than this lets through."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self.max_body_bytes = max_body_bytes
        """May be replaced while it serves."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if _head_is_too_large(scope):
            return await JSONResponse(_error(431, HEADERS_TOO_LARGE), 431)(scope, receive, send)
        limit = self.max_body_bytes
        too_large = JSONResponse(
            _error(413, f"the body is larger than {limit} bytes (see --max-body-size)"), 413, {"Connection": "close"}
        )
        if _declared(scope) > limit:
            return await too_large(scope, receive, send)
        await _Bounded(limit, too_large, receive, send).run(self._app, scope)


def _head_is_too_large(scope: Scope) -> bool:
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    size = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
    return len(headers) > MAX_HEADERS or size + sum(len(name) + len(value) for name, value in headers) > (
        MAX_HEADER_BYTES
    )


def _declared(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() and len(value) < 20 else 0
    return 0


class _TooLarge(Exception):
    pass


class _Bounded:
    """One request whose length is not known beforehand."""

    def __init__(self, limit: int, too_large: JSONResponse, receive: Receive, send: Send) -> None:
        self._left = limit
        self._too_large = too_large
        self._receive_more = receive
        self._send_on = send
        self._over = self._begun = False

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        try:
            await app(scope, self._receive, self._send)
        except Exception:
            if not self._over:
                raise
        if self._over and not self._begun:
            await self._too_large(scope, self._receive_more, self._send_on)

    async def _receive(self) -> Message:
        message = await self._receive_more()
        self._left -= len(cast(bytes, message.get("body") or b""))
        if self._left < 0:
            self._over = True
            raise _TooLarge
        return message

    async def _send(self, message: Message) -> None:
        if self._over and not self._begun:
            return  # what the application makes of a body that breaks off
        self._begun = True
        await self._send_on(message)
