"""The supervisor's HTTP routes. They answer whether or not a front end lives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from elastic_daemon.dashboard import make_dashboard_router
from elastic_daemon.errors import ControlClosed
from elastic_daemon.routes.control_routes import is_control_path
from elastic_daemon.routes.event_stream import MAX_STREAMS, EventStreams, Patience
from elastic_daemon.routes.http_errors import error_response, unavailable
from elastic_daemon.routes.operator_routes import OperatorPlane, make_operator_router
from elastic_daemon.routes.placement_routes import GroupPlane, make_group_router
from elastic_daemon.telemetry.events import KEPT, EventLog
from elastic_daemon.telemetry.metrics import METRICS_TYPE, Metrics

PROBE = ["GET", "HEAD"]
"""Methods of the routes that load balancers probe."""


class ControlPlane(OperatorPlane, GroupPlane, Protocol):
    """What the routes need of the supervisor."""

    events: EventLog
    metrics: Metrics

    @property
    def is_turning(self) -> bool: ...

    async def ask_ranks(self, question: str) -> dict[int, Any]: ...


def make_control_app(plane: ControlPlane, patience: Patience | None = None) -> FastAPI:
    """`patience`: with readers of events."""
    # No route for the schema: the front end serves it together with that of vLLM's routes.
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
        view = plane.health()
        reason = view.unready
        body = {"ready": reason is None, "status": view.status.value, "reason": reason}
        return JSONResponse(body, 200 if reason is None else 503)

    @app.api_route("/metrics", methods=PROBE)
    async def metrics() -> Response:
        return Response(plane.metrics.render(plane.health()), media_type=METRICS_TYPE)

    @app.get("/totals")
    async def totals() -> JSONResponse:
        """What became of requests, and the gaps that clients saw, since the daemon started."""
        return JSONResponse(plane.metrics.totals())

    streams = EventStreams(plane, patience)

    @app.get("/events")
    async def events(
        request: Request, since: int = 0, last: Annotated[int | None, Query(ge=1, le=KEPT)] = None
    ) -> Response:
        """Events after id `since`, at most the `last` ones: a JSON list. For `Accept: text/event-stream` a stream."""
        if "text/event-stream" in request.headers.get("accept", ""):
            try:
                since = int(request.headers.get("last-event-id", since))
            except ValueError:
                return error_response(400, "BadRequestError", "Last-Event-ID: expected the id of an event, a number")
            if streams.is_full:
                return unavailable(f"{MAX_STREAMS} readers follow the events already")
            return streams.open(since)
        found = list(plane.events.after(since))
        listed = ",".join(event.text for event in (found[-last:] if last else found))
        return Response(f"[{listed}]", media_type="application/json")

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
            return unavailable("a rank did not answer in time")
        except (ControlClosed, RuntimeError) as error:
            return unavailable(str(error))

    app.include_router(make_operator_router(plane))
    app.include_router(make_group_router(plane))
    app.include_router(make_dashboard_router())

    @app.api_route(
        "/{path:path}", include_in_schema=False, methods=["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]
    )
    async def not_served(request: Request, path: str) -> JSONResponse:
        """Anything else is for the front end; who comes here found none."""
        if is_control_path(request.url.path):
            return _no_such_control_route(app.routes, request.scope)
        reason = plane.health().to_json()["reason"] or "the front end is starting"
        return unavailable(f"not serving: {reason}")

    return app


def _no_such_control_route(routes: Sequence[BaseRoute], scope: Scope) -> JSONResponse:
    method, path = scope["method"], scope["path"]
    matching = [route for route in routes if isinstance(route, Route) and route.matches(scope)[0] is Match.PARTIAL]
    allowed = sorted({allowed for route in matching for allowed in route.methods or ()})
    if not allowed:
        return error_response(404, "NotFoundError", f"there is no control route {path}")
    return error_response(405, "MethodNotAllowedError", f"{method} is not for {path}", Allow=", ".join(allowed))
