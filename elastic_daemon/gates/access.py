"""Who may ask what: API keys for what is served, the admin key for what changes the deployment.

One ASGI middleware for both processes that accept connections, the front end and, while there is none, the supervisor.
The supervisor's Unix socket is not guarded: its directory is private.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elastic_daemon.routes.control_routes import COSTLY_PATHS, is_control_path, is_page, needs_admin

OPEN_PATHS = frozenset({"/livez", "/readyz", "/metrics"})
"""For probes and scrapers, which have no key."""

STATUS_ONLY_PATH = "/health"
"""Without a key it tells the status and nothing else."""

ADMIN_HINT = "set $ELASTIC_ADMIN_KEY (or --admin-key) for the daemon, or use the Unix socket in its runtime directory"


class Refusal(NamedTuple):
    status: int
    reason: str


@dataclass(frozen=True)
class AccessRules:
    """`keys`: API keys. `admin_key`: opens everything. `loopback`: the socket is reachable from this machine only."""

    keys: tuple[str, ...] = field(repr=False)
    loopback: bool
    admin_key: str | None = field(default=None, repr=False)

    def to_message(self) -> dict[str, Any]:
        """For a process that accepts connections too. Secret."""
        return {"keys": self.keys, "loopback": self.loopback, "admin_key": self.admin_key}

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> AccessRules:
        return cls(tuple(message["keys"]), message["loopback"], message["admin_key"])

    def has_key(self, authorization: str | None) -> bool:
        """Whether it is an API key, or the admin key."""
        return _is_one_of(authorization, self.keys) | self.has_admin_key(authorization)

    def has_admin_key(self, authorization: str | None) -> bool:
        return self.admin_key is not None and _is_one_of(authorization, (self.admin_key,))

    def refusal(self, method: str, path: str, headers: Headers) -> Refusal | None:
        """Why to refuse a request, if at all."""
        if needs_admin(method, path):
            return self._order_refusal(headers, has_body=path not in COSTLY_PATHS)
        if path in OPEN_PATHS or path == STATUS_ONLY_PATH or is_page(path):
            return None
        if _is_preflight(method, headers) and not is_control_path(path):
            return None
        known = self.has_key(headers.get("authorization"))
        if self.keys:
            return None if known else Refusal(401, "a valid API key is required")
        if is_control_path(path) and not self.loopback and not known:
            return Refusal(403, "this route needs an API key on an address that others can reach; start with --api-key")
        return None

    def _order_refusal(self, headers: Headers, *, has_body: bool) -> Refusal | None:
        """Orders can take GPUs away: a web page that an operator looks at must not be able to give any."""
        if refusal := self._key_refusal(headers.get("authorization")):
            return refusal
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        # A page that was served under a name which now leads here (DNS rebinding) has no key, but has its own name.
        if not self.keys and self.admin_key is None and not (len(hosts) == 1 and _is_loopback_authority(hosts[0])):
            return Refusal(403, "without a key, control routes accept only localhost or a loopback address as Host")
        if any(_authority(origin) is None or [_authority(origin)] != _lowered(hosts) for origin in origins):
            return Refusal(403, "control routes accept no requests from pages of another origin")
        # A GET for an image, say, has no Origin. Browsers tell with all requests whose page they are for.
        if any(site.lower() not in ("same-origin", "none") for site in headers.getlist("sec-fetch-site")):
            return Refusal(403, "control routes accept no requests from pages of another origin")
        if has_body and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return Refusal(415, "control routes need Content-Type: application/json")
        return None

    def _key_refusal(self, authorization: str | None) -> Refusal | None:
        if self.admin_key is not None:
            if self.has_admin_key(authorization):
                return None
            if self.has_key(authorization):
                return Refusal(403, "an API key does not open control routes here: the admin key is required")
            return Refusal(401, "the admin key is required")
        if not self.loopback:
            return Refusal(403, f"control routes need an admin key on an address that others can reach: {ADMIN_HINT}")
        if self.keys and not self.has_key(authorization):
            return Refusal(401, "a valid API key is required")
        return None


def _is_preflight(method: str, headers: Headers) -> bool:
    """Whether a browser asks if a page may ask. It sends no credentials, and vLLM's CORS middleware answers."""
    return method == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers


def _is_one_of(authorization: str | None, keys: Sequence[str]) -> bool:
    scheme, _, given = (authorization or "").partition(" ")
    # All are compared, so that the time taken does not tell which one was nearly right.
    # Digests, since a comparison of different lengths is over at once.
    digest = _digest(given)
    matches = [hmac.compare_digest(digest, _digest(key)) for key in keys]
    return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_loopback_authority(authority: str) -> bool:
    """Of `localhost:8000`, `[::1]`, …"""
    try:
        name = urlsplit(f"//{authority}").hostname
    except ValueError:
        return False
    return "@" not in authority and name is not None and is_loopback(name)


def _authority(origin: str) -> str | None:
    """The `host:port` of an Origin; None for `null` and whatever else is no web page's."""
    scheme, separator, authority = origin.lower().partition("://")
    return authority if separator and scheme in ("http", "https") and authority else None


def _lowered(values: Sequence[str]) -> list[str]:
    return [value.lower() for value in values]


class AccessGuard:
    """ASGI middleware that applies `AccessRules`."""

    def __init__(self, app: ASGIApp, rules: AccessRules) -> None:
        self._app = app
        self.rules = rules
        """May be replaced while it serves."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        rules = self.rules
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        if refusal := rules.refusal(scope.get("method", "GET"), scope["path"], headers):
            status, reason = refusal
            type_ = "AuthenticationError" if status in (401, 403) else "BadRequestError"
            body = {"error": {"message": reason, "type": type_, "code": status}}
            return await JSONResponse(body, status)(scope, receive, send)
        if scope["path"] == STATUS_ONLY_PATH and rules.keys and not rules.has_key(headers.get("authorization")):
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
