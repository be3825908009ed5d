"""Who may ask what: API keys, and control routes that stay on this machine.

One ASGI middleware for both processes that accept connections, the front end and, while there is none, the supervisor.
The supervisor's Unix socket is not guarded: its directory is private.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = frozenset({"/livez", "/readyz", "/metrics"})
"""For probes and scrapers, which have no key."""

STATUS_ONLY_PATH = "/health"
"""Without a key it tells the status and nothing else."""

OPERATOR_PATHS = frozenset({"/events", "/experts", "/experts/verify"})
"""They tell how the deployment is built: not to strangers."""


@dataclass(frozen=True)
class AccessRules:
    """`keys`: any of them opens everything. `loopback`: the socket is reachable from this machine only."""

    keys: tuple[str, ...]
    loopback: bool

    def has_key(self, authorization: str | None) -> bool:
        scheme, _, given = (authorization or "").partition(" ")
        # All are compared, so that the time taken does not tell which one was nearly right.
        matches = [hmac.compare_digest(given.encode(), key.encode()) for key in self.keys]
        return scheme.lower() == "bearer" and any(matches)

    def refusal(self, path: str, authorization: str | None) -> tuple[int, str] | None:
        """Status and reason to refuse a request with, if any."""
        if path in OPEN_PATHS or path == STATUS_ONLY_PATH:
            return None
        if self.keys:
            return None if self.has_key(authorization) else (401, "a valid API key is required")
        if path in OPERATOR_PATHS and not self.loopback:
            return 403, "this route needs an API key on an address that others can reach; start with --api-key"
        return None


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class AccessGuard:
    """ASGI middleware that applies `AccessRules`."""

    def __init__(self, app: ASGIApp, rules: AccessRules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        authorization = Headers(scope=scope).get("authorization")
        if refusal := self._rules.refusal(scope["path"], authorization):
            status, reason = refusal
            body = {"error": {"message": reason, "type": "AuthenticationError", "code": status}}
            return await JSONResponse(body, status)(scope, receive, send)
        if scope["path"] == STATUS_ONLY_PATH and self._rules.keys and not self._rules.has_key(authorization):
            send = _StatusOnly(send)
        await self._app(scope, receive, send)


class _StatusOnly:
    """Passes a JSON response on with nothing but its `status`."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: MutableMapping[str, Any] = {}
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        told = json.loads(self._body or b"{}")  # HEAD has no body
        body = json.dumps({"status": told["status"]}).encode() if "status" in told else b""
        headers: Sequence[tuple[bytes, bytes]] = self._start["headers"]
        kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
        await self._send({**self._start, "headers": [*kept, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})
