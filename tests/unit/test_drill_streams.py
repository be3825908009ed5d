"""What a stream of the drill sees of a server, real or not there."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from rich.console import Console

from elastic_daemon.commands.client_tls import client_tls
from elastic_daemon.commands.operator_commands import Target
from elastic_daemon.drill.drill import (
    Daemon,
    Display,
    Options,
    _watched_run,
    run_streams,
)
from elastic_daemon.drill.report import (
    StreamResult,
)
from tests.certificates import issued


def chunk(token: int, finish: str | None = None) -> str:
    return json.dumps({"choices": [{"text": chr(token), "token_ids": [token], "finish_reason": finish}]})


USAGE = json.dumps({"choices": [], "usage": {"completion_tokens": 2}})
GOOD = [chunk(97), chunk(98, "length"), USAGE, "[DONE]"]


@contextlib.asynccontextmanager
async def answering(status: str, lines: list[str], tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The port of a server that sends these events to whoever asks, and hangs up."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = "".join(f"data: {line}\n\n" for line in lines)
        writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n{body}".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=tls) as server:
        yield server.sockets[0].getsockname()[1]


async def answered(status: str, lines: list[str]) -> tuple[StreamResult, list[tuple[int, int]]]:
    """One stream against such a server."""
    tokens: list[tuple[int, int]] = []
    async with answering(status, lines) as port:
        url = f"http://127.0.0.1:{port}"
        (seen,) = await run_streams(url, ["p"], 2, lambda number, count: tokens.append((number, count)))
    return seen, tokens


async def test_stream_is_read() -> None:
    seen, tokens = await answered("200 OK", GOOD)
    assert seen.error is None
    assert (seen.token_ids, seen.text, seen.finish_reason, seen.completion_tokens) == ((97, 98), "ab", "length", 2)
    assert tokens == [(0, 1), (0, 1)]
    assert seen.started <= seen.arrivals[0] <= seen.arrivals[1] <= seen.ended


@pytest.mark.parametrize(
    ("status", "lines", "error"),
    [
        ("503 Busy", ["no capacity"], "503: data: no capacity"),
        ("200 OK", GOOD[:2], r"without \[DONE\]"),
        ("200 OK", [GOOD[0], '{"error": {"message": "gone"}}', "[DONE]"], "gone"),
        ("200 OK", ["{"], "not a completion stream"),
    ],
)
async def test_streams_that_fail_say_why(status: str, lines: list[str], error: str) -> None:
    seen, _ = await answered(status, lines)
    assert seen.error is not None
    assert re.search(error, seen.error)


async def test_streams_of_a_daemon_with_a_private_authority(tmp_path: Path) -> None:
    made = issued(tmp_path)
    (server := ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)).load_cert_chain(made.cert, made.key)
    console = Console(file=io.StringIO())
    async with answering("200 OK", GOOD, server) as port:
        for authority, error in ((made.authority, None), (None, "CERTIFICATE_VERIFY_FAILED")):
            target = Target(tmp_path, f"https://localhost:{port}", client_tls({}, authority))
            daemon = Daemon(target, target.base_url)
            options = Options(target, streams=1, tokens=2)
            (seen,), _, _ = await _watched_run(daemon, Display(console), "undisturbed", options, ["p"], None)
            assert seen.error is None if error is None else error in str(seen.error)
            await daemon.close()


async def test_stream_without_server() -> None:
    (seen,) = await run_streams("http://127.0.0.1:1", ["p"], 2)
    assert seen.error is not None
    assert seen.error.startswith("ConnectError")
