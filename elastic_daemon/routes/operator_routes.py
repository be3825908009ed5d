"""Operators' routes: manual scaling, single ranks and GPUs, automation, and what has come of it (docs/api.md)."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from elastic_daemon import protocol as p
from elastic_daemon.errors import OrderUnanswered
from elastic_daemon.membership import Status
from elastic_daemon.routes.health import HealthView
from elastic_daemon.routes.http_errors import bad_request, error_response, unavailable
from elastic_daemon.routes.operations import HTTP_STATUS, OperationDesk, Order, new_id
from elastic_daemon.routes.order_bodies import (
    MAX_BODY_BYTES,
    AutomationBody,
    BadOrder,
    OrderBody,
    ScaleBody,
    check_scale,
    parse,
)

MAX_RANK_DIGITS = 6

ERROR_TYPES = {
    400: "BadRequestError",
    408: "TimeoutError",
    409: "ConflictError",
    500: "InternalServerError",
}

Body = TypeVar("Body", bound=BaseModel)


class OperatorPlane(Protocol):
    """What the routes need of the supervisor."""

    @property
    def operations(self) -> OperationDesk: ...

    @property
    def min_ranks(self) -> int: ...

    @property
    def max_ranks(self) -> int: ...

    @property
    def automation(self) -> bool: ...

    def set_automation(self, enabled: bool) -> None: ...

    def release_gpu(self, uuid: str) -> None:
        """Raises LookupError, with the reason, where nothing is known of it."""

    def health(self) -> HealthView: ...


class _TooLarge(Exception):
    pass


def make_operator_router(plane: OperatorPlane) -> APIRouter:
    router = APIRouter()

    @router.post("/scale_elastic_ep")
    async def scale_elastic_ep(request: Request) -> JSONResponse:
        """vLLM's request, answered when the new number of ranks serves, or with `wait` false at once."""
        body = await _read(request, ScaleBody)
        if isinstance(body, JSONResponse):
            return body
        try:
            check_scale(body, plane.min_ranks, plane.max_ranks)
        except BadOrder as error:
            return bad_request(str(error))
        order = p.ScaleOrder(new_id(), body.new_data_parallel_size, body.retire_ranks, body.drain_timeout)
        return await _submit(plane, order, body.wait)

    @router.post("/is_scaling_elastic_ep")
    async def is_scaling_elastic_ep() -> JSONResponse:
        return JSONResponse({"is_scaling_elastic_ep": plane.operations.busy})

    @router.get("/operations")
    async def operations() -> JSONResponse:
        """The latest 256, oldest first."""
        active = _active(plane)
        return JSONResponse([operation_json(report, active) for report in plane.operations.all()])

    @router.get("/operations/{operation}")
    async def one_operation(operation: str) -> JSONResponse:
        report = plane.operations.get(operation)
        if report is None:
            return error_response(
                404, "NotFoundError", f"no operation {operation} is known; GET /operations lists them"
            )
        return JSONResponse(operation_json(report, _active(plane)))

    def add_rank_route(deed: p.RankDeed) -> None:
        @router.post(f"/ranks/{{rank}}/{deed.value}", name=f"{deed.value}_rank")
        async def order_rank(rank: str, request: Request) -> JSONResponse:
            body = await _read(request, OrderBody)
            if isinstance(body, JSONResponse):
                return body
            if not (rank.isascii() and rank.isdigit() and len(rank) <= MAX_RANK_DIGITS):
                return bad_request(f"expected /ranks/RANK/{deed.value} with the number of a rank, as in GET /health")
            return await _submit(plane, p.RankOrder(new_id(), int(rank), deed, body.drain_timeout), body.wait)

    for deed in p.RankDeed:
        add_rank_route(deed)

    @router.post("/gpus/{uuid}/release")
    async def release_gpu(uuid: str) -> JSONResponse:
        """Out of quarantine: what happened on it before is forgiven."""
        try:
            plane.release_gpu(uuid)
        except LookupError as error:
            return error_response(404, "NotFoundError", str(error.args[0]))
        return JSONResponse({"message": f"{uuid} is released: the watchdog judges it anew", "gpu": uuid})

    @router.get("/automation")
    async def automation() -> JSONResponse:
        return JSONResponse({"enabled": plane.automation})

    @router.post("/automation")
    async def set_automation(request: Request) -> JSONResponse:
        body = await _read(request, AutomationBody)
        if isinstance(body, JSONResponse):
            return body
        plane.set_automation(body.enabled)
        return JSONResponse({"enabled": plane.automation})

    return router


async def _read(request: Request, kind: type[Body]) -> Body | JSONResponse:
    """The body, or what to answer instead. An empty one is `{}`."""
    try:
        return parse(kind, await _text(request) or b"{}")
    except BadOrder as error:
        return bad_request(str(error))
    except _TooLarge:
        return error_response(413, "BadRequestError", f"the body is larger than {MAX_BODY_BYTES} bytes")


async def _text(request: Request) -> bytes:
    text = bytearray()
    async for chunk in request.stream():
        text += chunk
        if len(text) > MAX_BODY_BYTES:
            raise _TooLarge
    return bytes(text)


async def _submit(plane: OperatorPlane, order: Order, wait: bool) -> JSONResponse:
    view = plane.health()
    if view.snapshot is None or view.status is Status.STOPPING:
        return unavailable(f"the daemon takes no orders: it is {view.status.value}")
    try:
        report = await plane.operations.submit(order, wait)
    except OrderUnanswered as error:
        return unavailable(str(error))
    return _answer(report, waited=wait)


def _answer(report: p.OperationReport, *, waited: bool) -> JSONResponse:
    code = HTTP_STATUS[report.state]
    if waited and not report.state.ended:
        return _failed(500, f"it has not ended in time, it is still at: {report.phase}", report.operation)
    if code != 200:
        return _failed(code, _why(report), report.busy_with or report.operation)
    message = report.message if report.state.ended else report.phase
    return JSONResponse(
        {"message": message, "operation_id": report.operation, "data_parallel_size": report.target}, code
    )


def _why(report: p.OperationReport) -> str:
    other = report.busy_with
    if other is None or other in report.message:
        return report.message
    return f"{report.message or 'another operation is running'} (operation {other})"


def _failed(code: int, message: str, operation: str) -> JSONResponse:
    """`operation`: which one to look at."""
    error = {"message": message, "type": ERROR_TYPES[code], "code": code}
    return JSONResponse({"error": error, "operation_id": operation}, code)


def _active(plane: OperatorPlane) -> int:
    snapshot = plane.health().snapshot
    return snapshot.active if snapshot is not None else 0


def operation_json(report: p.OperationReport, active: int) -> dict[str, Any]:
    """The body of `GET /operations/{id}`. `active`: ranks that serve now."""
    wall = time.time() - time.monotonic()
    failed = report.state.ended and report.state is not p.OperationState.DONE
    return {
        "id": report.operation,
        "kind": report.kind.value,
        "state": report.state.value,
        "phase": "done" if report.state is p.OperationState.DONE else report.phase,
        "progress": {"from": report.previous, "to": report.target, "active": active},
        "ranks": list(report.ranks),
        "message": report.message,
        "error": report.message if failed else None,
        "busy_with": report.busy_with,
        "started": _iso(report.started + wall),
        "ended": _iso(report.ended + wall) if report.ended is not None else None,
        "seconds": round((report.ended if report.ended is not None else time.monotonic()) - report.started, 3),
    }


def _iso(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds")
