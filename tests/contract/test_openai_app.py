"""vLLM's application as it is served: every route in it is listed, whether or not its document tells of it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from elastic_daemon.engine import openai_app
from elastic_daemon.engine.configure import parse_flags
from elastic_daemon.gates.access import AccessRules

DOCUMENTS = {"/openapi.json", "/docs", "/docs/oauth2-redirect"}


@pytest.fixture
async def app() -> FastAPI:
    """Without an engine behind it."""
    deployment: Any = mock.Mock(args=parse_flags([]))
    with mock.patch.object(openai_app, "init_app_state", mock.AsyncMock()):
        return await openai_app.make_app(deployment, mock.Mock())


async def test_nothing_is_mounted_but_what_is_listed(app: FastAPI) -> None:
    assert all(isinstance(route, Route) for route in app.routes), "no mount, no WebSocket"
    assert {route.path for route in app.routes if isinstance(route, Route)} == openai_app.SERVED_ROUTES | DOCUMENTS


async def test_no_middleware_of_vllms_answers_before_ours(app: FastAPI) -> None:
    assert [middleware.cls for middleware in app.user_middleware] == [CORSMiddleware]


async def test_every_route_wants_a_key(app: FastAPI) -> None:
    rules = AccessRules(("secret",), loopback=True)
    for route in app.routes:
        assert isinstance(route, Route)
        for method in route.methods or ():
            refusal = rules.refusal(method, route.path, Headers())
            assert refusal is not None and refusal.status == 401, (method, route.path)
