"""The supervisor's HTTP routes. They answer whether or not a front end lives."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from elastic_daemon.events import EventLog
from elastic_daemon.health import HealthView
from elastic_daemon.membership import Status
from elastic_daemon.metrics import Metrics


class ControlPlane(Protocol):
    """What the routes need of the supervisor."""

    events: EventLog
    metrics: Metrics

    @property
    def is_turning(self) -> bool: ...

    def health(self) -> HealthView: ...

    async def ask_ranks(self, question: str) -> dict[int, Any]: ...


def make_control_app(plane: ControlPlane) -> FastAPI:
    app = FastAPI(title="elastic-daemon control", docs_url=None, redoc_url=None)

    @app.get("/health")
    async def health() -> JSONResponse:
        view = plane.health()
        return JSONResponse(view.to_json(), view.http_status)

    @app.get("/livez")
    async def livez() -> JSONResponse:
        """Whether the control loop turns."""
        return JSONResponse({"turning": plane.is_turning}, 200 if plane.is_turning else 503)

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """Whether a request that comes now would be served, if need be after a recovery."""
        status = plane.health().status
        ready = status in (Status.OK, Status.DEGRADED, Status.RECOVERING)
        return JSONResponse({"ready": ready, "status": status.value}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(plane.metrics.render(plane.health()), media_type="text/plain; version=0.0.4")

    @app.get("/events")
    async def events(request: Request, since: int = 0) -> Response:
        """Events after id `since`: a JSON list, or a stream for `Accept: text/event-stream`."""
        if "text/event-stream" in request.headers.get("accept", ""):
            since = int(request.headers.get("last-event-id", since))
            return StreamingResponse(_stream(plane.events, since), media_type="text/event-stream")
        return JSONResponse(json.loads(json.dumps(plane.events.since(since), default=str)))

    @app.get("/experts")
    async def experts() -> JSONResponse:
        """Which expert each slot of each active rank holds now: rank -> [layers][slots]."""
        return JSONResponse({"ranks": await plane.ask_ranks("column")})

    @app.get("/experts/verify")
    async def verify_experts() -> JSONResponse:
        """Compare every expert slot of every active rank with a fresh load from the checkpoint."""
        wrong = await plane.ask_ranks("wrong_slots")
        return JSONResponse({"ok": not any(wrong.values()), "wrong_slots": wrong})

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE", "PATCH"])
    async def not_served(path: str) -> JSONResponse:
        """Anything else is for the front end; who comes here found none."""
        view = plane.health()
        reason = view.to_json()["reason"] or "the front end is starting"
        error = {"message": f"not serving: {reason}", "type": "ServiceUnavailableError", "code": 503}
        return JSONResponse({"error": error}, 503, headers={"Retry-After": "5"})

    return app


async def _stream(events: EventLog, since: int) -> AsyncIterator[str]:
    async for event in events.follow(since):
        yield f"id: {event['id']}\nevent: {event['event']}\ndata: {json.dumps(event, default=str)}\n\n"
