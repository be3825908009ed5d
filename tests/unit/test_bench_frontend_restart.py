"""What bench.frontend_restart makes of its measurements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from bench import frontend_restart
from bench.frontend_restart import Measured, Restart, parser, render
from elastic_daemon.commands.operator_commands import make_console
from tests.unit.http_server import serving


def rendered(measured: Measured) -> str:
    console = make_console()
    with console.capture() as capture:
        console.print(render(measured, 0.5))
    return capture.get()


def test_the_bar_is_for_the_slowest() -> None:
    fast, slow = Restart(0.9, 1.2, 20, 8), Restart(4.8, 5.1, 90, 7)
    assert "1.20     1.20      met" in rendered(Measured([fast]))
    shown = rendered(Measured([fast, slow], ["kill 3: no"]))
    assert "1.20     5.10  not met" in shown
    assert "cut by the kills: 15; requests refused until then: 110" in shown
    assert "problem: kill 3: no" in shown
    assert parser().parse_args([]).kills == 10


def test_a_report_of_nothing_meets_no_bar() -> None:
    assert "not met" in rendered(Measured([], ["kill 1: StartError"]))


async def test_who_asks_until_it_is_served_counts_what_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend_restart, "ASK_S", 0.0)
    answers = [503, 503, 200, 200]
    texts = ["", "", "", "46"]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b'{"choices": [{"text": "%s"}]}' % texts.pop(0).encode()
        await send({"type": "http.response.start", "status": answers.pop(0), "headers": []})
        await send({"type": "http.response.body", "body": body})

    async with serving(app) as (host, port):
        assert await frontend_restart._until_served(f"http://{host}:{port}") == 3
    assert not answers


async def test_a_connection_that_is_cut_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend_restart, "ASK_S", 0.0)
    calls: Iterator[Exception | httpx.Response] = iter(
        [httpx.ReadError("cut"), httpx.Response(200, json={"choices": [{"text": "46"}]})]
    )

    def answer(_: httpx.Request) -> httpx.Response:
        if isinstance(next_one := next(calls), Exception):
            raise next_one
        return next_one

    client = httpx.AsyncClient(base_url="http://daemon", transport=httpx.MockTransport(answer))
    monkeypatch.setattr(frontend_restart, "stream_client", lambda _: client)
    assert await frontend_restart._until_served("http://daemon") == 1
