"""`events` of a daemon that wants a key, or takes no more readers: said, and over."""

from __future__ import annotations

import asyncio

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from elastic_daemon.routes.http_errors import error_response, unavailable
from tests.unit.command_line import run
from tests.unit.http_server import serving


def app(answer: JSONResponse) -> Starlette:
    async def health(_: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def events(_: Request) -> JSONResponse:
        return answer

    return Starlette(routes=[Route("/health", health), Route("/events", events)])


async def told(answer: JSONResponse, *options: str) -> int:
    async with serving(app(answer)) as (host, port):
        asked = asyncio.to_thread(run, "events", *options, "--url", f"http://{host}:{port}")
        return await asyncio.wait_for(asked, 20)


@pytest.mark.parametrize("options", [(), ("--follow",)])
async def test_without_a_key(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert await told(error_response(401, "AuthenticationError", "an API key is wanted"), *options) == 1
    error = capsys.readouterr().err
    assert error == "elastic-daemon: /events: an API key is wanted; give a key of the daemon in ELASTIC_API_KEY\n"


async def test_too_many_readers(capsys: pytest.CaptureFixture[str]) -> None:
    assert await told(unavailable("64 readers follow the events already"), "--follow") == 1
    assert capsys.readouterr().err == "elastic-daemon: /events: 64 readers follow the events already\n"
