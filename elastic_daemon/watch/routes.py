"""The watchdog's routes, for the Unix socket only: docs/watchdog.md.

    GET /watchdog/bindings    PUT /watchdog/verdicts/{id}    PUT /watchdog/gpus

Whoever can give a verdict can take ranks away. The socket's directory is private; no TCP port has these routes.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.types import ASGIApp

from elastic_daemon.watch.desk import GpusBody, Refused, VerdictBody, WatchdogDesk


def with_watchdog_routes(control: ASGIApp, desk: WatchdogDesk | None) -> FastAPI:
    """The control application, and these routes before it. Without a desk (`--watchdog off`) they answer 404."""
    app = FastAPI(title="elastic-daemon", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/watchdog/bindings")
    async def bindings() -> JSONResponse:
        """Who runs where, and what a verdict must know."""
        return _off() if desk is None else JSONResponse(desk.bindings())

    @app.put("/watchdog/verdicts/{id_}")
    async def verdict(id_: str, request: Request) -> Response:
        """Take a verdict in; the same one again changes nothing."""

        async def take(desk: WatchdogDesk) -> None:
            body = VerdictBody.model_validate(await _json(request))
            if body.id != id_:
                raise Refused(422, f"the id in the path is {id_}, in the body {body.id}")
            desk.take(body)

        return await _answer(desk, take)

    @app.put("/watchdog/gpus")
    async def gpus(request: Request) -> Response:
        """Learn which GPUs there are, and which of them a rank may be put on."""

        async def take(desk: WatchdogDesk) -> None:
            desk.see_gpus(GpusBody.model_validate(await _json(request)))

        return await _answer(desk, take)

    app.mount("/", control)
    return app


async def _answer(desk: WatchdogDesk | None, take: Callable[[WatchdogDesk], Awaitable[None]]) -> Response:
    """204 when it is taken in."""
    if desk is None:
        return _off()
    try:
        await take(desk)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return _error(422, f"{where}: {first['msg']}" if where else first["msg"])
    except Refused as error:
        return _error(error.status, str(error))
    return Response(status_code=204)


async def _json(request: Request) -> Any:
    try:
        return await request.json()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refused(400, f"the body is no JSON: {error}") from error


def _off() -> JSONResponse:
    return _error(404, "this daemon was started with --watchdog off")


def _error(code: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "WatchdogError", "code": code}}, code)
