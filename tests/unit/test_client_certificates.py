"""The operator's commands and a daemon that asks its clients for certificates, with TLS on both ends."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_daemon.commands.client_tls import client_tls
from elastic_daemon.commands.operator_commands import Target, follow
from elastic_daemon.drill.drill import run_streams
from elastic_daemon.gates.access import AccessRules
from elastic_daemon.gates.tls import Tls
from elastic_daemon.settings.sources import Sources
from tests.certificates import Issued, certificate, issued
from tests.unit.command_line import Server, run, serving
from tests.unit.operator_plane import OperatorPlane
from tests.unit.test_drill_streams import GOOD, answering
from tests.unit.test_private_authority import COMMANDS

pytestmark = pytest.mark.usefixtures("clean_environment")


def made(folder: Path, name: str) -> Issued:
    folder.mkdir()
    return issued(folder, name)


@pytest.fixture
def daemon(tmp_path: Path) -> Issued:
    return made(tmp_path / "daemon", "localhost")


@pytest.fixture
def operator(tmp_path: Path) -> Issued:
    return made(tmp_path / "operator", "an operator")


@pytest.fixture
def server(daemon: Issued, operator: Issued) -> Iterator[Server]:
    rules = AccessRules((), loopback=True)
    with serving(OperatorPlane(), rules, daemon, clients=operator.authority) as server:
        yield server


@pytest.fixture
def at(server: Server, daemon: Issued) -> tuple[str, ...]:
    return "--url", server.url, "--cacert", str(daemon.authority)


def test_all_commands_prove_themselves(at: tuple[str, ...], operator: Issued) -> None:
    for command in COMMANDS:
        own = "--cert", str(operator.cert), "--cert-key", str(operator.key)
        assert run(*command.split(), *at, *own) == 0, command


def test_variables_name_the_files_too(
    at: tuple[str, ...], operator: Issued, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ELASTIC_CERT", str(operator.cert))
    monkeypatch.setenv("ELASTIC_CERT_KEY", str(operator.key))
    assert run("status", *at) == 0
    monkeypatch.setenv("ELASTIC_CERT", "/nowhere")
    assert run("status", *at, "--cert", str(operator.cert)) == 0, "the flag wins"
    monkeypatch.delenv("ELASTIC_CERT_KEY")
    (both := tmp_path / "both.pem").write_bytes(operator.cert.read_bytes() + operator.key.read_bytes())
    assert run("status", *at, "--cert", str(both)) == 0, "certificate and key in one file"
    loaded = Sources({}, {"ELASTIC_CERT": "/nowhere", "ELASTIC_CERT_KEY": "/nowhere"}).load()
    assert loaded.settings.tls is None, "they are none of the daemon's"


@pytest.mark.parametrize("command", ["status", "events", "scale 3", "automation", "drill --streams 1"])
def test_who_proves_nothing_is_told_what_is_asked_for(
    command: str, at: tuple[str, ...], daemon: Issued, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger = "--cert", str(daemon.cert), "--cert-key", str(daemon.key)
    for own in ((), stranger):
        assert run(*command.split(), *at, *own) == 3
        (*_, told) = capsys.readouterr().err.splitlines()
        assert told.startswith("elastic-daemon: no daemon answers at https://")
        assert "--ssl-cert-reqs" in told and "--cert-key" in told


def test_an_address_where_nobody_listens_is_no_matter_of_certificates(
    daemon: Issued, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("status", "--url", "https://localhost:1", "--cacert", str(daemon.authority)) == 3
    assert "--cert" not in capsys.readouterr().err


def test_a_stream_of_events(server: Server, daemon: Issued, operator: Issued, tmp_path: Path) -> None:
    tls = client_tls({}, daemon.authority, operator.cert, operator.key)
    followed = follow(Target(tmp_path, server.url, tls))
    server.record("one")
    assert any(event["event"] == "one" for event in followed)


async def test_streams_of_a_drill(daemon: Issued, operator: Issued) -> None:
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(operator.authority))
    server.load_cert_chain(daemon.cert, daemon.key)
    server.verify_mode = ssl.CERT_REQUIRED
    async with answering("200 OK", GOOD, server) as port:
        for own, served in (((operator.cert, operator.key), True), ((), False)):
            tls = client_tls({}, daemon.authority, *own)
            (seen,) = await run_streams(f"https://localhost:{port}", ["p"], 2, tls=tls)
            assert (seen.error is None) is served, seen.error


@pytest.mark.parametrize("command", ["status", "events", "scale 3", "automation", "drill"])
def test_files_that_cannot_be_used_are_named(
    command: str, operator: Issued, daemon: Issued, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (nonsense := tmp_path / "nonsense.pem").write_text("nonsense")
    (broken := tmp_path / "broken.pem").write_text(operator.cert.read_text()[:100] + operator.key.read_text())
    nowhere = tmp_path / "nowhere.pem"
    locked_cert, locked = certificate(tmp_path, passphrase=b"secret")
    cert, key = operator.cert, operator.key
    for own, told in (
        ((cert, nowhere), f"--cert-key {nowhere}: No such file"),
        ((nowhere, key), f"--cert {nowhere}: No such file"),
        ((tmp_path, key), f"--cert {tmp_path}: Is a directory"),
        ((cert, None), f"--cert {cert}: no private key in it: give its file with --cert-key"),
        ((key, cert), f"--cert {key}: no certificate in it"),
        ((nonsense, key), f"--cert {nonsense}: no certificate in it"),
        ((cert, nonsense), f"--cert-key {nonsense}: no private key in it\n"),
        ((cert, daemon.key), f"--cert-key {daemon.key}: this is not the key of the certificate in {cert}"),
        ((broken, None), f"--cert {broken}: "),
        ((locked_cert, locked), f"--cert-key {locked}: a key with a passphrase cannot be used"),
        ((None, key), f"--cert-key {key}: the certificate that this key belongs to is needed too"),
    ):
        words = [word for flag, file in zip(("--cert", "--cert-key"), own, strict=True) if file is not None
                 for word in (flag, str(file))]  # fmt: skip
        assert run(*command.split(), "--url", "https://localhost:1", *words) == 2, told
        error = capsys.readouterr().err
        assert error.startswith(f"elastic-daemon: {told}") and error.count("\n") == 1, error


def test_a_variable_is_named_as_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ELASTIC_CERT_KEY", "/nowhere")
    assert run("status", "--url", "https://localhost:1") == 2
    assert capsys.readouterr().err.startswith("elastic-daemon: ELASTIC_CERT_KEY /nowhere: the certificate that ")


def test_a_server_takes_another_authority_of_its_clients(daemon: Issued, operator: Issued, tmp_path: Path) -> None:
    authorities = tmp_path / "authorities.pem"
    authorities.write_bytes(operator.authority.read_bytes())
    tls = Tls(str(daemon.cert), str(daemon.key), str(authorities), ssl.CERT_REQUIRED)
    tls.load_into(context := ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    assert len(context.get_ca_certs()) == 1
    authorities.write_bytes(operator.authority.read_bytes() + daemon.authority.read_bytes())
    tls.load_into(context)
    assert len(context.get_ca_certs()) == 2
