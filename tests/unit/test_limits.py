"""What a client may send, over real sockets; TLS; and who may read what the daemon writes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from elastic_daemon.config import Settings
from elastic_daemon.errors import ConfigError
from elastic_daemon.gates.answering import Answering
from elastic_daemon.gates.limits import MAX_HEADER_BYTES, MAX_HEADERS, SizeLimits
from elastic_daemon.settings.sources import Sources
from elastic_daemon.tasks import Tasks
from tests.certificates import certificate
from tests.unit.http_server import serving

BODY = 2000


async def answer(request: Request) -> JSONResponse:
    return JSONResponse({"size": len(await request.body())})


APP = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])
LIMITED = SizeLimits(APP, BODY)


async def raw(address: tuple[str, int], *parts: bytes) -> bytes:
    """What comes back, until the other side closes."""
    reader, writer = await asyncio.open_connection(*address)
    with contextlib.suppress(ConnectionError):
        for part in parts:
            writer.write(part)
            await writer.drain()
    answer = b""
    with contextlib.suppress(ConnectionError):
        answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return answer


async def test_bodies() -> None:
    async def chunks(number: int) -> AsyncIterator[bytes]:
        for _ in range(number):
            yield b"x" * 100

    async with serving(LIMITED) as (host, port), httpx.AsyncClient(base_url=f"http://{host}:{port}") as http:
        assert (await http.post("/", content=b"x" * BODY)).json() == {"size": BODY}
        assert (await http.post("/", content=chunks(20))).json() == {"size": BODY}
        for content in (b"x" * (BODY + 1), chunks(21)):
            refused = await http.post("/", content=content)
            assert refused.status_code == 413
            assert refused.json()["error"]["code"] == 413 and "--max-body-size" in refused.text


async def test_headers() -> None:
    async with serving(LIMITED) as address:
        host, port = address
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as http:
            assert (await http.get("/", headers={"X": "x" * (MAX_HEADER_BYTES - 1000)})).is_success
            assert (await http.get("/", headers={"X": "x" * (MAX_HEADER_BYTES + 1)})).status_code == 431
            many = {f"x-{number}": "1" for number in range(MAX_HEADERS)}
            assert (await http.get("/", headers=many)).status_code == 431
            assert (await http.get("/")).is_success
        path = b"GET /" + b"x" * MAX_HEADER_BYTES + b" HTTP/1.1\r\nhost: x\r\n\r\n"
        assert (await raw(address, path)).startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))
        endless = [b"GET / HTTP/1.1\r\nhost: x\r\nx: ", *[b"y" * 16384] * 4]
        assert (await raw(address, *endless)).startswith(b"HTTP/1.1 431 ")
        lines = [b"GET / HTTP/1.1\r\nhost: x\r\n", *[b"x: " + b"y" * 1000 + b"\r\n"] * 66]
        assert (await raw(address, *lines)).startswith(b"HTTP/1.1 431 ")


async def test_large_bodies_are_no_headers() -> None:
    sent: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent.append(len(await Request(scope, receive).body()))
        await JSONResponse({})(scope, receive, send)

    async with serving(SizeLimits(app, 1 << 24)) as (host, port):
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as http:
            for _ in range(3):  # on one connection
                assert (await http.post("/", content=b"x" * (1 << 20))).is_success
    assert sent == [1 << 20] * 3


async def test_a_connection_outlives_what_a_client_keeps_it_for(socket_dir: Path) -> None:
    """httpx uses a connection again for 5 s, and a server that closes it just then gives no answer."""
    tasks = Tasks(pytest.fail)  # type: ignore[arg-type]
    listener = socket.create_server(("127.0.0.1", 0))
    answering = Answering(APP, APP, listener, Sources({}, {}).load().settings, tasks)
    answering.open_internal(str(socket_dir / "http.sock"))
    await asyncio.sleep(0.1)
    reader, writer = await asyncio.open_unix_connection(socket_dir / "http.sock")
    for pause_s in (5.5, 0):
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await reader.readuntil(b"\r\n") == b"HTTP/1.1 200 OK\r\n"
        await reader.read(1 << 16)
        await asyncio.sleep(pause_s)
    writer.close()
    answering.close()
    await tasks.settle(5)


async def test_the_supervisor_speaks_tls_and_takes_a_new_certificate(tmp_path: Path, socket_dir: Path) -> None:
    cert, key = certificate(tmp_path)
    settings = Sources({"ssl_certfile": cert, "ssl_keyfile": key}, {}).load().settings
    tasks = Tasks(pytest.fail)  # type: ignore[arg-type]
    listener = socket.create_server(("127.0.0.1", 0))
    answering = Answering(APP, APP, listener, settings, tasks)
    answering.open_internal(str(socket_dir / "http.sock"))
    answering.open_public()
    url = f"https://localhost:{listener.getsockname()[1]}"

    async def status() -> int:
        context = ssl.create_default_context(cafile=str(cert))
        async with httpx.AsyncClient(verify=context) as http:
            for _ in range(200):
                with contextlib.suppress(httpx.ConnectError):
                    return (await http.get(url)).status_code
                await asyncio.sleep(0.01)
        raise AssertionError("no answer that this certificate proves")

    assert await status() == 200
    with pytest.raises(httpx.TransportError):
        async with httpx.AsyncClient() as http:
            await http.get(url.replace("https", "http"))
    certificate(tmp_path)
    answering.adopt(settings)
    assert await status() == 200, "the new one proves it"
    cert.write_text("nonsense")
    with pytest.raises(ConfigError, match="--ssl-certfile"):
        answering.adopt(settings)
    assert stat.S_IMODE((socket_dir / "http.sock").stat().st_mode) == 0o600
    answering.close()
    await tasks.settle(5)


@pytest.mark.parametrize("source", ["flag", "variable", "line"])
def test_tls_that_cannot_work_is_named_where_it_was_given(tmp_path: Path, source: str) -> None:
    cert, key = certificate(tmp_path)
    other = certificate(_made(tmp_path / "other"))[1]
    locked, passphrase = certificate(_made(tmp_path / "locked"), passphrase=b"secret")
    nowhere, file = tmp_path / "nowhere", tmp_path / "c.toml"

    def problem(bad: str, **given: Any) -> str:
        """What is said, without the place where `bad` was given, which it must begin with."""
        texts = {name: str(value) for name, value in given.items()}
        line = list(given).index(bad) + 1
        if source == "flag":
            sources, label = Sources(given, {}), "--" + bad.replace("_", "-")
        elif source == "variable":
            sources = Sources({}, {f"ELASTIC_{name.upper()}": text for name, text in texts.items()})
            label = f"ELASTIC_{bad.upper()}"
        else:
            file.write_text("".join(f"{name} = '{text}'\n" for name, text in texts.items()))
            sources, label = Sources({"config": file}, {}), f"{file}:{line}: {bad}"
        with pytest.raises(ConfigError) as error:
            sources.load()
        said = str(error.value)
        assert said.startswith(f"{label}: ")
        return said.removeprefix(f"{label}: ")

    pair = {"ssl_certfile": cert, "ssl_keyfile": key}
    assert problem("ssl_keyfile", ssl_keyfile=key).startswith("the certificate is needed too")
    assert problem("ssl_certfile", ssl_certfile=nowhere) == f"{nowhere}: No such file or directory"
    assert problem("ssl_certfile", ssl_certfile=nowhere, ssl_keyfile=key) == f"{nowhere}: No such file or directory"
    assert problem("ssl_keyfile", ssl_certfile=cert, ssl_keyfile=nowhere) == f"{nowhere}: No such file or directory"
    mismatch = f"{other}: not the key of the certificate in {cert}"
    assert problem("ssl_keyfile", ssl_certfile=cert, ssl_keyfile=other) == mismatch
    assert problem("ssl_ca_certs", **pair, ssl_ca_certs=nowhere) == f"{nowhere}: No such file or directory"
    assert problem("ssl_cert_reqs", **pair, ssl_cert_reqs=2).startswith("2: clients are checked against --ssl-ca-certs")
    assert problem("ssl_ciphers", **pair, ssl_ciphers="none").startswith("none: ")
    said = problem("ssl_keyfile", ssl_certfile=locked, ssl_keyfile=passphrase)
    assert said == f"{passphrase}: a key with a passphrase cannot be used"
    whole = tmp_path / "whole.pem"
    whole.write_bytes(locked.read_bytes() + passphrase.read_bytes())
    assert problem("ssl_certfile", ssl_certfile=whole) == f"{whole}: a key with a passphrase cannot be used"


def test_without_a_certificate_there_is_no_tls() -> None:
    assert Settings().tls is None


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory
