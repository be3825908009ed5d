"""What there is to see of the group: `/placement` and `/recoveries` (docs/api.md). They change nothing."""

from __future__ import annotations

import asyncio
import json
from typing import Protocol

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from elastic_daemon.routes.http_errors import bad_request, unavailable
from elastic_daemon.routes.placement_view import PlacementView
from elastic_daemon.routes.recovery_history import RecoveryHistory


class GroupPlane(Protocol):
    """What the routes need of the supervisor."""

    @property
    def recoveries(self) -> RecoveryHistory: ...

    def placement(self) -> PlacementView | None: ...


def make_group_router(plane: GroupPlane) -> APIRouter:
    router = APIRouter()
    bodies = _Bodies()

    @router.get("/placement")
    async def placement(layer: int | None = None) -> Response:
        """How many copies of each expert there are, and in which ranks: in one layer, or in all."""
        view = plane.placement()
        if view is None:
            return unavailable("there is no group yet")
        if layer is not None and not 0 <= layer < view.layers:
            return bad_request(f"layer: expected 0 to {view.layers - 1}, got {layer}")
        return Response(await bodies.of(view, layer), media_type="application/json")

    @router.get("/recoveries")
    async def recoveries() -> JSONResponse:
        """The latest 64, oldest first."""
        return JSONResponse(plane.recoveries.to_json())

    return router


class _Bodies:
    """Keeps what was last computed: many may look at a placement that seldom changes."""

    def __init__(self) -> None:
        self._view: PlacementView | None = None
        self._bodies: dict[int | None, bytes] = {}

    async def of(self, view: PlacementView, layer: int | None) -> bytes:
        if not view.is_same(self._view):
            self._view, self._bodies = view, {}
        bodies = self._bodies
        if layer not in bodies:
            # Of a large model it takes longer than the control loop should wait.
            bodies[layer] = await asyncio.to_thread(_encode, view, layer)
        return bodies[layer]


def _encode(view: PlacementView, layer: int | None) -> bytes:
    return json.dumps(view.to_json(layer), separators=(",", ":")).encode()
