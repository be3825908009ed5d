"""A real daemon from a file: reloaded while it serves, over TLS, with limits, and private to its user."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import ssl
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import schemathesis

from elastic_daemon.routes.control_routes import CONTROL_PATHS, CONTROL_TEMPLATES
from tests.certificates import Issued, issued
from tests.documented import OVER_TLS
from tests.documents import ROOT
from tests.e2e.cluster import Cluster
from tests.fuzzing import fuzz

pytestmark = pytest.mark.e2e

ADMIN = {"Authorization": "Bearer secret-admin"}


class Desk(NamedTuple):
    """Where an operator sits: certificates of the daemon and of its clients, and a shell's environment with keys."""

    folder: Path
    daemon: Issued
    operator: Issued

    @classmethod
    def at(cls, folder: Path) -> Desk:
        made = [folder / name for name in ("daemon", "operator")]
        for directory in made:
            directory.mkdir()
        desk = cls(folder, issued(made[0]), issued(made[1], "an operator"))
        for name, file in (
            ("ca.pem", desk.daemon.authority),
            ("operator.pem", desk.operator.cert),
            ("operator-key.pem", desk.operator.key),
        ):
            (folder / name).symlink_to(file)
        return desk

    @property
    def settings(self) -> str:
        """For a daemon that its clients prove, and that asks them for proof."""
        files = f"ssl-certfile = '{self.daemon.cert}'\nssl-keyfile = '{self.daemon.key}'\n"
        return f"{files}ssl-ca-certs = '{self.operator.authority}'\nssl-cert-reqs = 2\n"

    def context(self, *, proven: bool = True) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.daemon.authority))
        if proven:
            context.load_cert_chain(self.operator.cert, self.operator.key)
        return context

    def run(self, line: str, url: str) -> subprocess.CompletedProcess[str]:
        """A documented command line, as the operator of the daemon at `url` would type it."""
        typed = line.replace("elastic-daemon", f"{sys.executable} -m elastic_daemon.cli", 1)
        own = {"ELASTIC_CACERT": "ca.pem", "ELASTIC_CERT": "operator.pem", "ELASTIC_CERT_KEY": "operator-key.pem"}
        return subprocess.run(
            shlex.split(typed.replace("https://gpu-host:8000", url)),
            cwd=self.folder,
            env={**os.environ, **own, "ELASTIC_API_KEY": "secret-two", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )


def test_a_daemon_from_a_file(tmp_path: Path) -> None:
    desk = Desk.at(tmp_path)
    keys, admin = tmp_path / "keys", tmp_path / "admin"
    keys.write_text("secret-one\n")
    admin.write_text("secret-admin\n")
    (file := tmp_path / "daemon.toml").write_text(
        f"data-parallel-size = 2\nsurvive-losses = 1\napi-key-file = '{keys}'\nadmin-key-file = '{admin}'\n"
        f"{desk.settings}enable-ssl-refresh = true\nmax-body-size = 2048\n[vllm]\nmax-model-len = 128\n"
    )
    with Cluster(tmp_path / "run", "--config", str(file), env={"ELASTIC_RESTORE": "auto"}) as cluster:
        assert cluster.health()["url"].startswith("https://")
        url = cluster.url.replace("http://127.0.0.1", "https://localhost")
        with httpx.Client(base_url=url, verify=desk.context()) as http:
            _assert_serves(http, "secret-one")
            _assert_nobody_is_served_without_a_certificate(url, desk)
            models = http.get("/v1/models", headers={"Authorization": "Bearer secret-one"}).json()
            assert models["data"][0]["max_model_len"] == 128
            _assert_limits(http)
            _assert_private(cluster)
            _reload(cluster, http, file, keys)
            _renew(cluster, desk)
            (front_end,) = cluster.titled("front end")
            os.kill(front_end, signal.SIGKILL)
            cluster.wait_for(lambda: cluster.health()["status"] == "recovering")
            assert http.get("/events", headers=ADMIN).status_code == 200, "the supervisor answers, over TLS"
            _assert_nobody_is_served_without_a_certificate(url, desk)
            cluster.wait_for(lambda: cluster.health()["status"] == "ok", 30)
            cluster.wait_for(lambda: _status(http, "secret-two") == 200)
            _assert_commands_work(cluster, desk, url)
            _fuzz(cluster, http, desk)
        assert "secret" not in cluster.log


def _status(http: httpx.Client, key: str) -> int:
    body = {"model": "tiny-moe", "prompt": "copy 1 2 3", "max_tokens": 4}
    return http.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}).status_code


def _assert_serves(http: httpx.Client, key: str) -> None:
    assert _status(http, key) == 200
    assert _status(http, "guess") == 401


def _assert_limits(http: httpx.Client) -> None:
    for path in ("/v1/completions", "/scale_elastic_ep"):
        assert http.post(path, json={"prompt": "x" * 3000}, headers=ADMIN).status_code == 413, path
    assert http.get("/health", headers={"X": "x" * 70_000}).status_code == 431


def _assert_private(cluster: Cluster) -> None:
    """Nothing in the runtime directory is for others than its user."""
    paths = [cluster.runtime_dir, *cluster.runtime_dir.rglob("*")]
    assert {path.name for path in paths} >= {"control.sock", "http.sock", "input.sock", "daemon.lock"}
    modes = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # the watchdog replaces its file twice a second
            modes[path] = stat.S_IMODE(path.stat().st_mode)
    assert not [path for path, mode in modes.items() if mode & 0o077]


def _reload(cluster: Cluster, http: httpx.Client, file: Path, keys: Path) -> None:
    before = {rank: cluster.pid(rank) for rank in cluster.active()}
    text = file.read_text()
    keys.write_text("secret-two\n")
    file.write_text("hold-timeout = 33\n" + text.replace("= 128", "= 64").replace("survive-losses = 1", "port = 1"))
    cluster.process.send_signal(signal.SIGHUP)
    (event,) = cluster.wait_for(lambda: cluster.events("reloaded"))
    assert set(event["applied"]) == {"hold_timeout", "api_key"}
    assert set(event["needs_restart"]) == {"survive_losses", "vllm.max_model_len"}, "--port is a flag, which wins"
    cluster.wait_for(lambda: _status(http, "secret-two") == 200)
    assert _status(http, "secret-one") == 401
    file.write_text("hold-timeout = 34\nunheard-of = 1\n")
    cluster.process.send_signal(signal.SIGHUP)
    (failed,) = cluster.wait_for(lambda: cluster.events("reload_failed"))
    assert f"{file}:2: unheard-of" in failed["reason"]
    assert _status(http, "secret-two") == 200
    assert {rank: cluster.pid(rank) for rank in cluster.active()} == before
    file.write_text(text)


def _renew(cluster: Cluster, desk: Desk) -> None:
    """Another certificate in the same files is served by itself, and one that cannot be used is not."""
    pair = (desk.daemon.cert, desk.daemon.key)
    old = [path.read_bytes() for path in pair]
    (folder := desk.folder / "renewed").mkdir()
    renewed = issued(folder)
    for path, new in zip(pair, (renewed.cert, renewed.key), strict=True):
        path.write_bytes(new.read_bytes())
    cluster.wait_for(lambda: cluster.events("certificate_renewed"))
    expected = ssl.PEM_cert_to_DER_cert(renewed.cert.read_text())
    cluster.wait_for(lambda: _served(cluster, desk) == expected)
    desk.daemon.key.write_text("half of a key")
    (event,) = cluster.wait_for(lambda: cluster.events("certificate_unreadable"))
    assert str(desk.daemon.key.parent) in event["reason"]
    assert _served(cluster, desk) == expected
    for path, content in zip(pair, old, strict=True):
        path.write_bytes(content)
    cluster.wait_for(lambda: _served(cluster, desk) == ssl.PEM_cert_to_DER_cert(old[0].decode()))


def _served(cluster: Cluster, desk: Desk) -> bytes | None:
    """The certificate that a new connection gets."""
    context = desk.context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    port = httpx.URL(cluster.url).port
    with socket.create_connection(("127.0.0.1", port), 10) as plain, context.wrap_socket(plain) as secured:
        return secured.getpeercert(binary_form=True)


def _assert_nobody_is_served_without_a_certificate(url: str, desk: Desk) -> None:
    """Not even probes, whoever answers."""
    with httpx.Client(base_url=url, verify=desk.context(proven=False)) as stranger, pytest.raises(httpx.TransportError):
        stranger.get("/livez")


def _assert_commands_work(cluster: Cluster, desk: Desk, url: str) -> None:
    """Those that ask at the port; and what is the daemon's own needs no certificate of a client."""
    for line in OVER_TLS:
        drill = "drill" in line
        done = desk.run(f"{line} --streams 4 --tokens 40" if drill else line, url)
        assert done.returncode == 0, done.stdout + done.stderr
        if drill:
            cluster.wait_for(lambda: cluster.health()["status"] == "ok", 30)
    assert cluster.events("rank_excluded"), "the drill was held"
    assert cluster.health()["watchdog"]["state"] == "alive"


def _fuzz(cluster: Cluster, http: httpx.Client, desk: Desk) -> None:
    """The control routes, as the front end's document has them; it ends what the deployment was."""
    (front_end,) = cluster.titled("front end")
    document = http.get("/openapi.json", headers=ADMIN).json()
    assert {"/v1/completions", "/scale_elastic_ep", "/events"} <= set(document["paths"])
    document["paths"] = {
        path: it for path, it in document["paths"].items() if path in CONTROL_PATHS | CONTROL_TEMPLATES
    }
    schema = schemathesis.openapi.from_dict(document)
    sent: dict[str, Any] = {"base_url": str(http.base_url), "headers": ADMIN, "timeout": 3}
    sent |= {"verify": str(desk.daemon.authority), "cert": (str(desk.operator.cert), str(desk.operator.key))}
    seen = fuzz(schema, 6, lambda case: case.call(**sent))
    assert set(document["paths"]) == {label.partition(" ")[2] for label in seen}
    assert set.union(*seen.values()) >= {200, 400, 404}
    assert cluster.process.poll() is None
    assert cluster.titled("front end") == [front_end], "it went on, and was not started again"
