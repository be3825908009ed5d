"""The door of the front end: requests for inference that would wait too long get 503 before they wait at all."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elastic_daemon.gates.admission import Limits, Queue, requests_in
from elastic_daemon.routes.http_errors import bad_request, unavailable


class AdmissionGate:
    """ASGI middleware that refuses requests for inference which would wait too long, before they wait at all."""

    def __init__(self, app: ASGIApp, queue: Queue, limits: Limits) -> None:
        self._app = app
        self._queue = queue
        self.limits = limits
        """May be replaced while it serves."""

    def refusal(self) -> str | None:
        """Why a request for inference that came now would be refused here."""
        return self._queue.refusal(self.limits, time.monotonic())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        seconds = self._queue.retry_after(self.limits, time.monotonic())
        if seconds is not None:
            message = f"{self._queue.waiting} requests wait already: come again in {seconds} s"
            return await unavailable(message, seconds)(scope, receive, send)
        over = self._queue.arrive()
        try:
            await self._app(scope, receive, send)
        finally:
            over()


class BatchGate:
    """ASGI middleware, within the gate, that refuses an HTTP request whose prompts and choices would not all find room.

    It reads the body, so it stands behind whatever holds requests back: what is held should not fill the memory.
    """

    def __init__(self, app: ASGIApp, queue: Queue, limits: Limits) -> None:
        self._app = app
        self._queue = queue
        self.limits = limits
        """May be replaced while it serves."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        messages = await _messages_of_body(receive)
        requests = requests_in(b"".join(message.get("body", b"") for message in messages))
        if requests > (most := self.limits.max_waiting):
            message = f"this makes {requests} requests, one for each choice of each prompt: at most {most} can wait"
            return await bad_request(message)(scope, receive, send)
        seconds = self._queue.widen(requests, self.limits, time.monotonic())
        if seconds is not None:
            others = self._queue.waiting - 1
            message = f"{others} requests wait already, and this makes {requests}: come again in {seconds} s"
            return await unavailable(message, seconds)(scope, receive, send)
        messages.reverse()

        async def again() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, again, send)


async def _messages_of_body(receive: Receive) -> list[Message]:
    """Up to the end of the body, or of the connection."""
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
        messages.append(await receive())
    return messages
