"""The supervisor's HTTP routes. They answer whether or not a front end lives."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from elastic_daemon.control_routes import is_control_path
from elastic_daemon.errors import ControlClosed
from elastic_daemon.events import EventLog
from elastic_daemon.health import HealthView
from elastic_daemon.membership import Status
from elastic_daemon.metrics import Metrics

PROBE = ["GET", "HEAD"]
"""Methods of the routes that load balancers probe."""


class ControlPlane(Protocol):
    """What the routes need of the supervisor."""

    events: EventLog
    metrics: Metrics

    @property
    def is_turning(self) -> bool: ...

    def health(self) -> HealthView: ...

    async def ask_ranks(self, question: str) -> dict[int, Any]: ...


def make_control_app(plane: ControlPlane) -> FastAPI:
    # No schema: /openapi.json is that of vLLM's routes, for the front end to serve.
    app = FastAPI(title="elastic-daemon control", docs_url=None, redoc_url=None, openapi_url=None)

    @app.api_route("/health", methods=PROBE)
    async def health() -> JSONResponse:
        view = plane.health()
        return JSONResponse(view.to_json(), view.http_status)

    @app.api_route("/livez", methods=PROBE)
    async def livez() -> JSONResponse:
        """Whether the control loop turns."""
        return JSONResponse({"turning": plane.is_turning}, 200 if plane.is_turning else 503)

    @app.api_route("/readyz", methods=PROBE)
    async def readyz() -> JSONResponse:
        """Whether a request that comes now would be served, if need be after a recovery."""
        status = plane.health().status
        ready = status in (Status.OK, Status.DEGRADED, Status.RECOVERING)
        return JSONResponse({"ready": ready, "status": status.value}, 200 if ready else 503)

    @app.api_route("/metrics", methods=PROBE)
    async def metrics() -> Response:
        return Response(plane.metrics.render(plane.health()), media_type="text/plain; version=0.0.4")

    @app.get("/events")
    async def events(request: Request, since: int = 0) -> Response:
        """Events after id `since`: a JSON list, or a stream for `Accept: text/event-stream`."""
        if "text/event-stream" in request.headers.get("accept", ""):
            try:
                since = int(request.headers.get("last-event-id", since))
            except ValueError:
                return _error(400, "BadRequestError", "Last-Event-ID: expected the id of an event, a number")
            return StreamingResponse(_stream(plane.events, since), media_type="text/event-stream")
        return JSONResponse(json.loads(json.dumps(plane.events.since(since), default=str)))

    @app.get("/experts")
    async def experts() -> JSONResponse:
        """Which expert each slot of each active rank holds now: rank -> [layers][slots]."""
        return await asked("column", lambda columns: {"ranks": columns})

    @app.get("/experts/verify")
    async def verify_experts() -> JSONResponse:
        """Compare every expert slot of every active rank with a fresh load from the checkpoint."""
        return await asked("wrong_slots", lambda wrong: {"ok": not any(wrong.values()), "wrong_slots": wrong})

    async def asked(question: str, body: Callable[[dict[int, Any]], dict[str, Any]]) -> JSONResponse:
        try:
            return JSONResponse(body(await plane.ask_ranks(question)))
        except TimeoutError:
            return _unavailable("a rank did not answer in time")
        except (ControlClosed, RuntimeError) as error:
            return _unavailable(str(error))

    @app.api_route("/{path:path}", methods=["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
    async def not_served(request: Request, path: str) -> JSONResponse:
        """Anything else is for the front end; who comes here found none."""
        if is_control_path(request.url.path):
            return _error(405, "MethodNotAllowedError", f"{request.method} is not for {request.url.path}", Allow="GET")
        reason = plane.health().to_json()["reason"] or "the front end is starting"
        return _unavailable(f"not serving: {reason}")

    return app


def _error(code: int, type_: str, message: str, **headers: str) -> JSONResponse:
    """In the form of vLLM's errors."""
    return JSONResponse({"error": {"message": message, "type": type_, "code": code}}, code, headers)


def _unavailable(message: str) -> JSONResponse:
    return _error(503, "ServiceUnavailableError", message, **{"Retry-After": "5"})


async def _stream(events: EventLog, since: int) -> AsyncIterator[str]:
    async for event in events.follow(since):
        yield f"id: {event['id']}\nevent: {event['event']}\ndata: {json.dumps(event, default=str)}\n\n"
