"""Error responses of our own routes, in the form of vLLM's."""

from __future__ import annotations

from fastapi.responses import JSONResponse


def error_response(code: int, type_: str, message: str, **headers: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": type_, "code": code}}, code, headers)


def bad_request(message: str) -> JSONResponse:
    return error_response(400, "BadRequestError", message)


def unavailable(message: str, retry_after_s: int = 5) -> JSONResponse:
    return error_response(503, "ServiceUnavailableError", message, **{"Retry-After": str(retry_after_s)})
