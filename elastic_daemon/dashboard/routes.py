"""The page and its files, as they lie in `static/`: no build, nothing from another host."""

from __future__ import annotations

import hashlib
from importlib import resources

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from elastic_daemon.routes.http_errors import error_response

PAGE = "index.html"

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""Nothing inline, nothing from elsewhere, no frame around it, no text that becomes code."""

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # ask each time: the daemon may be another version by now
}


class _File:
    def __init__(self, name: str, content: bytes) -> None:
        self.content = content
        self.type = TYPES[name[name.rindex(".") :]]
        self.etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'


def load_files() -> dict[str, _File]:
    """All of `static/`, by name."""
    folder = resources.files("elastic_daemon.dashboard") / "static"
    return {entry.name: _File(entry.name, entry.read_bytes()) for entry in folder.iterdir() if entry.is_file()}


def make_dashboard_router() -> APIRouter:
    router = APIRouter()
    files = load_files()

    @router.api_route("/dashboard", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return _answer(files[PAGE], request)

    @router.api_route("/dashboard/{file}", methods=["GET", "HEAD"])
    async def part(file: str, request: Request) -> Response:
        """A script, a style sheet, the icon."""
        if file not in files or file == PAGE:
            return _missing(file)
        return _answer(files[file], request)

    return router


def _answer(file: _File, request: Request) -> Response:
    headers = {**HEADERS, "ETag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers={**headers, "Content-Type": file.type})


def _missing(file: str) -> JSONResponse:
    return error_response(404, "NotFoundError", f"the dashboard has no file {file}")
