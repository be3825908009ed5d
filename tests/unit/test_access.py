"""Who may ask what, for each kind of bind, key, method, origin and host."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from elastic_daemon.gates.access import AccessGuard, AccessRules, is_loopback

PATHS = ("/health", "/livez", "/readyz", "/metrics", "/events", "/experts", "/v1/completions", "/tokenize", "/docs")
ORDERS = (
    "/scale_elastic_ep",
    "/ranks/1/drain",
    "/ranks/1/exclude",
    "/ranks/1/release",
    "/ranks/1/whatever",
    "/gpus/GPU-1/release",
    "/automation",
    "/operations/op-1",
)
PAGES = ("/dashboard", "/dashboard/main.js", "/dashboard/no-such-file")
NO_PAGES = (
    "/dashboard/",
    "/dashboard/a/b",
    "/dashboard/../events",
    "/dashboard/..",
    "/dashboardx",
)
OPERATOR_READS = (
    "/placement",
    "/recoveries",
    "/totals",
    "/operations",
    "/operations/op-1",
    "/automation",
    "/ranks/1/drain",
)


def client(rules: AccessRules) -> httpx.AsyncClient:
    async def answer(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "secret": "layout"})

    methods = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]
    app = AccessGuard(Starlette(routes=[Route("/{path:path}", answer, methods=methods)]), rules)
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


PREFLIGHT = {
    "Origin": "https://chat.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization",
}


async def test_browsers_may_ask_whether_a_page_may_ask() -> None:
    """As in vLLM, whose check of keys lets OPTIONS through: a preflight has no credentials, by its standard."""

    async def completed(_: Request) -> JSONResponse:
        return JSONResponse({})

    app = Starlette(routes=[Route("/{path:path}", completed, methods=["GET", "POST", "OPTIONS"])])
    app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
    guarded = AccessGuard(app, AccessRules(("one",), loopback=False, admin_key="two"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://test") as http:
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/models"):
            asked = await http.options(path, headers=PREFLIGHT)
            assert asked.status_code == 200
            assert asked.headers["access-control-allow-origin"] == "*"
            assert (await http.post(path, headers=PREFLIGHT)).status_code == 401, "a preflight is OPTIONS"
        for missing in PREFLIGHT.keys() - {"Access-Control-Request-Headers"}:
            less = {name: value for name, value in PREFLIGHT.items() if name != missing}
            assert (await http.options("/v1/completions", headers=less)).status_code == 401
        for path in ("/events", "/experts", "/experts/verify", "/automation", "/ranks/1/drain", "/operations/op-1"):
            assert (await http.options(path, headers=PREFLIGHT)).status_code == 401, path


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


API_KEY, ADMIN_KEY = "api-key", "admin-key"
JSON = {"Content-Type": "application/json"}
LOOPBACK_HOSTS = ("localhost", "localhost:8000", "LOCALHOST:8000", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000", "[::1]")
OTHER_HOSTS = ("gpu-host:8000", "10.0.0.1:8000", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example")


async def order(rules: AccessRules, path: str = "/scale_elastic_ep", method: str = "POST", **headers: str) -> int:
    return (await ask(rules, method, path, {**JSON, **_headers(headers)})).status_code


async def ask(rules: AccessRules, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    async with client(rules) as http:
        return await http.request(method, path, headers=headers)


def _headers(names: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-").title(): value for name, value in names.items()}


def expected(rules: AccessRules, key: str | None, host: str, origin: str | None, content_type: str | None) -> int:
    """As docs/api.md has it, written in another way than the code."""
    loopback_host = host in LOOPBACK_HOSTS
    if rules.admin_key is None and not rules.loopback:
        return 403
    needed = [rules.admin_key] if rules.admin_key is not None else list(rules.keys)
    if needed and key not in needed:
        return 403 if key in rules.keys else 401
    if not needed and not loopback_host:
        return 403
    if origin is not None and origin != f"http://{host}":
        return 403
    return 200 if content_type in ("application/json", "application/json; charset=utf-8") else 415


@pytest.mark.parametrize("loopback", [True, False])
@pytest.mark.parametrize("keys", [(), (API_KEY,)])
@pytest.mark.parametrize("admin_key", [None, ADMIN_KEY])
async def test_orders(loopback: bool, keys: tuple[str, ...], admin_key: str | None) -> None:
    rules = AccessRules(keys, loopback, admin_key)
    seen = set()
    async with client(rules) as http:
        for key, host, origin_kind, content_type in itertools.product(
            (None, API_KEY, ADMIN_KEY, "wrong"),
            ("localhost:8000", "127.0.0.1:8000", "gpu-host:8000", "evil.example"),
            (None, "same", "http://evil.example:1", "http://localhost:3000", "null"),
            (None, "application/json", "application/json; charset=utf-8", "text/plain"),
        ):
            origin = f"http://{host}" if origin_kind == "same" else origin_kind
            headers = {"Host": host}
            headers |= {"Authorization": f"Bearer {key}"} if key else {}
            headers |= {"Origin": origin} if origin else {}
            headers |= {"Content-Type": content_type} if content_type else {}
            want = 403 if origin and origin_kind != "same" else None
            for method, path in (("POST", "/scale_elastic_ep"), ("POST", "/ranks/1/drain"), ("DELETE", "/automation")):
                status = (await http.request(method, path, headers=headers)).status_code
                assert status == expected(rules, key, host, origin, content_type), (method, path, headers)
                assert want is None or status in (401, 403)
                seen.add(status)
    closed = not loopback and admin_key is None
    assert seen == ({403} if closed else {200, 403, 415} | ({401} if keys or admin_key else set()))


@pytest.mark.parametrize("path", ORDERS)
async def test_every_order_is_guarded(path: str) -> None:
    assert await order(AccessRules((), loopback=False), path) == 403
    keyed = AccessRules((API_KEY,), loopback=False, admin_key=ADMIN_KEY)
    assert await order(keyed, path) == 401
    assert await order(keyed, path, authorization=f"Bearer {API_KEY}") == 403
    assert await order(keyed, path, authorization=f"Bearer {ADMIN_KEY}") == 200
    for method in ("PUT", "DELETE", "PATCH"):
        assert await order(keyed, path, method) == 401


@pytest.mark.parametrize("host", LOOPBACK_HOSTS)
async def test_hosts_of_this_machine(host: str) -> None:
    assert await order(AccessRules((), loopback=True), host=host) == 200


@pytest.mark.parametrize("host", [*OTHER_HOSTS, "", "evil@127.0.0.1", "[::1", "localhost:x@evil", "2130706433", "::"])
async def test_other_hosts_need_a_key(host: str) -> None:
    assert await order(AccessRules((), loopback=True), host=host) == 403
    bearer = f"Bearer {ADMIN_KEY}"
    assert await order(AccessRules((), loopback=True, admin_key=ADMIN_KEY), host=host, authorization=bearer) == 200


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "https://evil.example", "null", "", "file://", "localhost:8000", "ws://localhost:8000"],
)
async def test_foreign_origins(origin: str) -> None:
    assert await order(AccessRules((), loopback=True), host="localhost:8000", origin=origin) == 403


@pytest.mark.parametrize("origin", ["http://localhost:8000", "https://localhost:8000", "HTTP://LocalHost:8000"])
async def test_our_own_origin(origin: str) -> None:
    assert await order(AccessRules((), loopback=True), host="localhost:8000", origin=origin) == 200


async def raw(rules: AccessRules, headers: list[tuple[bytes, bytes]]) -> int:
    """With headers as they are, repeated ones too."""
    statuses: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await JSONResponse({})(scope, receive, send)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {"type": "http", "method": "POST", "path": "/automation", "headers": headers, "query_string": b""}
    await AccessGuard(app, rules)(scope, _nothing, send)
    return statuses[0]


async def _nothing() -> Any:
    return {"type": "http.request", "body": b"", "more_body": False}


async def test_repeated_headers_open_nothing() -> None:
    rules = AccessRules((), loopback=True)
    json, good, evil = (b"content-type", b"application/json"), (b"host", b"localhost"), (b"host", b"evil.example")
    assert await raw(rules, [json, good]) == 200
    assert await raw(rules, [json]) == 403
    for hosts in ([good, evil], [evil, good], [good, good]):
        assert await raw(rules, [json, *hosts]) == 403
    own, foreign = (b"origin", b"http://localhost"), (b"origin", b"http://evil.example")
    assert await raw(rules, [json, good, own]) == 200
    for origins in ([own, foreign], [foreign, own]):
        assert await raw(rules, [json, good, *origins]) == 403


@pytest.mark.parametrize("path", OPERATOR_READS)
async def test_operator_reads(path: str) -> None:
    async def read(rules: AccessRules, key: str | None = None) -> int:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return (await ask(rules, "GET", path, headers)).status_code

    assert await read(AccessRules((), loopback=True)) == 200
    assert await read(AccessRules((), loopback=False)) == 403
    assert await read(AccessRules((), loopback=False, admin_key=ADMIN_KEY)) == 403
    assert await read(AccessRules((), loopback=False, admin_key=ADMIN_KEY), ADMIN_KEY) == 200
    keyed = AccessRules((API_KEY,), loopback=False, admin_key=ADMIN_KEY)
    assert [await read(keyed, key) for key in (None, "wrong", API_KEY, ADMIN_KEY)] == [401, 401, 200, 200]


@pytest.mark.parametrize("rules", [AccessRules((API_KEY,), True), AccessRules((), False), AccessRules((), True)])
async def test_the_page_is_open_and_what_it_shows_is_not(rules: AccessRules) -> None:
    nobody = Headers({})
    for path in PAGES:
        assert rules.refusal("GET", path, nobody) is rules.refusal("HEAD", path, nobody) is None
    for path in NO_PAGES:
        assert (rules.refusal("GET", path, nobody) is None) is not bool(rules.keys), f"{path}: as for any other path"
    for path in ("/placement", "/recoveries", "/totals", "/events"):
        assert (rules.refusal("GET", path, nobody) is None) is (rules.loopback and not rules.keys)
    assert await order(rules, "/dashboard/main.js", host="evil.example") in (401, 403)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
async def test_whoever_has_experts_verified_needs_what_an_order_needs(method: str) -> None:
    """It changes nothing, but all ranks read their checkpoint for it between two steps."""

    async def verify(rules: AccessRules, **headers: str) -> int:
        return (await ask(rules, method, "/experts/verify", _headers(headers))).status_code

    bare = AccessRules((), loopback=True)
    assert await verify(bare, host="localhost:8000") == 200, "no Content-Type is needed: there is no body"
    assert await verify(bare, host="evil.example") == 403
    assert await verify(bare, host="localhost:8000", origin="http://localhost:8000") == 200
    assert await verify(bare, host="localhost:8000", origin="http://evil.example") == 403
    for site, status in (("same-origin", 200), ("none", 200), ("same-site", 403), ("cross-site", 403)):
        assert await verify(bare, host="localhost:8000", sec_fetch_site=site) == status
    assert await verify(AccessRules((), loopback=False), host="localhost:8000") == 403
    keyed = AccessRules((API_KEY,), loopback=True)
    assert [await verify(keyed, authorization=f"Bearer {key}") for key in ("wrong", API_KEY)] == [401, 200]
    both = AccessRules((API_KEY,), loopback=False, admin_key=ADMIN_KEY)
    assert [await verify(both, authorization=f"Bearer {key}") for key in ("", API_KEY, ADMIN_KEY)] == [401, 403, 200]


async def test_a_page_of_another_origin_gives_no_orders_even_without_an_origin() -> None:
    assert await order(AccessRules((), loopback=True), host="localhost:8000", sec_fetch_site="cross-site") == 403
    assert await order(AccessRules((), loopback=True), host="localhost:8000", sec_fetch_site="same-origin") == 200


async def test_to_ask_whether_it_scales_is_no_order() -> None:
    assert (await ask(AccessRules((), loopback=True), "POST", "/is_scaling_elastic_ep", {})).status_code == 200
    assert (await ask(AccessRules((API_KEY,), loopback=True), "POST", "/is_scaling_elastic_ep", {})).status_code == 401
    assert (await ask(AccessRules((), loopback=False), "POST", "/is_scaling_elastic_ep", {})).status_code == 403


async def test_an_admin_key_alone_closes_nothing_else() -> None:
    rules = AccessRules((), loopback=True, admin_key=ADMIN_KEY)
    assert set((await statuses(rules)).values()) == {200}
    assert set((await statuses(AccessRules((API_KEY,), loopback=True, admin_key=ADMIN_KEY), ADMIN_KEY)).values()) == {
        200
    }


async def test_a_refusal_says_what_to_do() -> None:
    async def reason(rules: AccessRules, **headers: str) -> str:
        answer = await ask(rules, "POST", "/automation", _headers(headers))
        error = answer.json()["error"]
        assert error["code"] == answer.status_code
        text: str = error["message"]
        return text

    assert "ELASTIC_ADMIN_KEY" in await reason(AccessRules((), loopback=False))
    admin = AccessRules((API_KEY,), loopback=True, admin_key=ADMIN_KEY)
    assert "admin key is required" in await reason(admin)
    assert "API key does not open" in await reason(admin, authorization=f"Bearer {API_KEY}")
    assert "application/json" in await reason(admin, authorization=f"Bearer {ADMIN_KEY}")


def test_secrets_are_not_shown_and_travel() -> None:
    rules = AccessRules((API_KEY,), loopback=True, admin_key=ADMIN_KEY)
    assert API_KEY not in repr(rules) and ADMIN_KEY not in repr(rules)
    assert AccessRules.from_message(rules.to_message()) == rules
