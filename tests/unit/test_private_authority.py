"""The operator's commands and a daemon whose certificate is of a private authority, with TLS on both ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_daemon.commands.client_tls import client_tls
from elastic_daemon.commands.operator_commands import Target, follow
from elastic_daemon.drill.drill import Daemon
from elastic_daemon.errors import ConfigError
from elastic_daemon.gates.access import AccessRules
from elastic_daemon.settings.sources import Sources
from tests.certificates import Issued, issued
from tests.unit.command_line import Server, run, serving
from tests.unit.operator_plane import OperatorPlane

pytestmark = pytest.mark.usefixtures("clean_environment")

ORDERS = ("scale 5", "drain 1", "release 1", "exclude 2", "release 2", "automation off", "automation")
COMMANDS = ("status", "status --json", "events", *ORDERS)


@pytest.fixture
def made(tmp_path: Path) -> Issued:
    return issued(tmp_path)


@pytest.fixture
def server(made: Issued) -> Iterator[Server]:
    with serving(OperatorPlane(), AccessRules((), loopback=True), made) as server:
        yield server


def test_all_commands_believe_the_authority_that_they_are_given(
    server: Server, made: Issued, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in COMMANDS:
        assert run(*command.split(), "--url", server.url, "--cacert", str(made.authority)) == 0, command
    monkeypatch.setenv("ELASTIC_CACERT", str(made.authority))
    assert run("status", "--url", server.url) == 0
    monkeypatch.setenv("ELASTIC_CACERT", "/nowhere")
    assert run("status", "--url", server.url, "--cacert", str(made.authority)) == 0, "the flag wins"


def test_a_stream_of_events(server: Server, made: Issued, tmp_path: Path) -> None:
    followed = follow(Target(tmp_path, server.url, client_tls({}, made.authority)))
    server.record("one")
    assert any(event["event"] == "one" for event in followed)


@pytest.mark.parametrize("command", ["status", "events", "scale 3", "automation"])
def test_a_certificate_that_is_not_proven(
    command: str, server: Server, made: Issued, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*command.split(), "--url", server.url) == 3, "of no authority that is known"
    told = capsys.readouterr().err
    assert "certificate verify failed" in told and "--cacert" in told and told.count("\n") == 1
    other = server.url.replace("localhost", "127.0.0.1")
    assert run(*command.split(), "--url", other, "--cacert", str(made.authority)) == 3, "for another name"
    assert "'127.0.0.1'" in (told := capsys.readouterr().err) and "--url" in told


@pytest.mark.parametrize("command", [*COMMANDS, "drill"])
def test_a_file_that_cannot_be_used_is_named(
    command: str, made: Issued, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (nonsense := tmp_path / "nonsense.pem").write_text("nonsense")
    words = [*command.split(), "--url", "https://localhost:1"]
    for file, reason in (
        (tmp_path / "nowhere.pem", "No such file"),
        (nonsense, "no certificate"),
        (made.key, "no certificate"),
        (tmp_path, ""),
    ):
        assert run(*words, "--cacert", str(file)) == 2
        assert (told := capsys.readouterr().err).startswith(f"elastic-daemon: --cacert {file}: ")
        assert reason in told and told.count("\n") == 1
        monkeypatch.setenv("ELASTIC_CACERT", str(file))
        assert run(*words) == 2
        assert capsys.readouterr().err.startswith(f"elastic-daemon: ELASTIC_CACERT {file}: ")
        monkeypatch.delenv("ELASTIC_CACERT")


async def test_a_drill_finds_where_to_stream_from_or_says_what_it_lacks(
    server: Server, made: Issued, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that was found by its runtime directory tells an address, which its certificate need not be for."""

    async def found(url: str, authority: Path | None) -> str:
        daemon = Daemon(Target(tmp_path, tls=client_tls({}, authority)), "")

        async def get(_: str) -> dict[str, Any]:
            return {"status": "ok", "url": url}

        monkeypatch.setattr(daemon, "get", get)
        try:
            return await daemon.find_url()
        finally:
            await daemon.close()

    assert await found(server.url, made.authority) == server.url
    with pytest.raises(ConfigError, match=r"serves at https://localhost:.*--cacert"):
        await found(server.url, None)
    with pytest.raises(ConfigError, match=r"'127\.0\.0\.1'.*--url"):
        await found(server.url.replace("localhost", "127.0.0.1"), made.authority)


def test_a_daemon_does_not_take_the_variable_for_a_setting() -> None:
    assert Sources({}, {"ELASTIC_CACERT": "/etc/ca.pem"}).load().settings.ssl_ca_certs is None
