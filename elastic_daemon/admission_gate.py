"""The door of the front end: requests for inference that would wait too long get 503 before they wait at all."""

from __future__ import annotations

import time

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from elastic_daemon.admission import Limits, Queue


class AdmissionGate:
    """ASGI middleware that refuses requests for inference which would wait too long, before they wait at all."""

    def __init__(self, app: ASGIApp, queue: Queue, limits: Limits) -> None:
        self._app = app
        self._queue = queue
        self.limits = limits
        """May be replaced while it serves."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        seconds = self._queue.retry_after(self.limits, time.monotonic())
        if seconds is not None:
            message = f"{self._queue.waiting} requests wait already: come again in {seconds} s"
            body = {"error": {"message": message, "type": "ServiceUnavailableError", "code": 503}}
            return await JSONResponse(body, 503, {"Retry-After": str(seconds)})(scope, receive, send)
        arrived = self._queue.arrive()
        try:
            await self._app(scope, receive, send)
        finally:
            arrived()
