from __future__ import annotations

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from elastic_daemon.access import AccessGuard, AccessRules, is_loopback

PATHS = ("/health", "/livez", "/readyz", "/metrics", "/events", "/experts", "/v1/completions", "/tokenize", "/docs")


def client(rules: AccessRules) -> httpx.AsyncClient:
    async def answer(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "secret": "layout"})

    app = AccessGuard(Starlette(routes=[Route(path, answer) for path in PATHS]), rules)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def statuses(rules: AccessRules, key: str | None = None) -> dict[str, int]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with client(rules) as http:
        return {path: (await http.get(path, headers=headers)).status_code for path in PATHS}


async def test_with_keys_only_probes_are_open() -> None:
    rules = AccessRules(("one", "two"), loopback=True)
    opened = {"/health", "/livez", "/readyz", "/metrics"}
    assert await statuses(rules) == {path: 200 if path in opened else 401 for path in PATHS}
    assert await statuses(rules, "wrong") == await statuses(rules)
    assert set((await statuses(rules, "two")).values()) == {200}


async def test_health_tells_strangers_the_status_only() -> None:
    async with client(AccessRules(("one",), loopback=True)) as http:
        assert (await http.get("/health")).json() == {"status": "ok"}
        known = await http.get("/health", headers={"Authorization": "bearer one"})
        assert known.json() == {"status": "ok", "secret": "layout"}


async def test_operator_routes_stay_on_this_machine_without_a_key() -> None:
    assert set((await statuses(AccessRules((), loopback=True))).values()) == {200}
    reachable = await statuses(AccessRules((), loopback=False))
    assert {path for path, status in reachable.items() if status == 403} == {"/events", "/experts"}


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_an_empty_scheme_or_key_opens_nothing() -> None:
    rules = AccessRules(("one",), loopback=True)
    for authorization in (None, "", "one", "Basic one", "Bearer", "Bearer "):
        assert not rules.has_key(authorization)
