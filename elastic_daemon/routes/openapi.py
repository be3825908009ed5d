"""The OpenAPI document of the control routes. Bodies are read by hand, so their schemas are put in here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from elastic_daemon import __version__
from elastic_daemon.routes.control_routes import is_order, needs_admin
from elastic_daemon.routes.order_bodies import AutomationBody, OrderBody, ScaleBody

BODIES: Mapping[str, type[BaseModel]] = {
    "/scale_elastic_ep": ScaleBody,
    "/ranks/{rank}/exclude": OrderBody,
    "/ranks/{rank}/drain": OrderBody,
    "/ranks/{rank}/release": OrderBody,
    "/automation": AutomationBody,
}
"""Of POST. An empty body is an empty object."""

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "code": {"type": "integer"},
            },
        },
        "operation_id": {"type": "string"},
    },
}

READ_ERRORS = {"401": "a key is required", "403": "this key or address is not enough", "503": "cannot be told now"}
ORDER_ERRORS = {
    **READ_ERRORS,
    "400": "the order makes no sense",
    "404": "nothing of this name",
    "408": "not done in time, and undone",
    "409": "another operation is running",
    "413": "the body is too large",
    "415": "Content-Type is not application/json",
    "500": "the operation failed, and is undone",
}

SECURITY = {"key": {"type": "http", "scheme": "bearer", "description": "an API key; for orders the admin key"}}


def control_document(app: FastAPI) -> dict[str, Any]:
    """Of all routes of `app` that have a path of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # GET and HEAD of a probe share their name
        document = get_openapi(title="elastic-daemon", version=__version__, routes=app.routes)
    for path, methods in document["paths"].items():
        methods.pop("head", None)
        for method, operation in methods.items():
            _complete(operation, method.upper(), path)
    components = document.setdefault("components", {})
    components.setdefault("schemas", {})["Error"] = ERROR
    components["securitySchemes"] = SECURITY
    return document


def _complete(operation: dict[str, Any], method: str, path: str) -> None:
    order = is_order(method, path.replace("{", "").replace("}", ""))
    if method == "POST" and path in BODIES:
        schema = BODIES[path].model_json_schema()
        operation["requestBody"] = {"content": {"application/json": {"schema": schema}}}
    reference = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for code, meaning in (ORDER_ERRORS if order else READ_ERRORS).items():
        operation["responses"].setdefault(code, {"description": meaning, "content": reference})
    operation["security"] = [{"key": []}] if needs_admin(method, path) else [{}, {"key": []}]


def merged(own: dict[str, Any], control: dict[str, Any]) -> dict[str, Any]:
    """vLLM's document with the control routes in it. What both have is the control routes'."""
    components = dict(own.get("components", {}))
    for kind, entries in control["components"].items():
        components[kind] = {**components.get(kind, {}), **entries}
    return {**own, "paths": {**own["paths"], **control["paths"]}, "components": components}
