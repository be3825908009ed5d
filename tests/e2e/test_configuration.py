"""A real daemon from a file: reloaded while it serves, over TLS, with limits, and private to its user."""

from __future__ import annotations

import os
import signal
import ssl
import stat
from pathlib import Path

import httpx
import pytest
import schemathesis

from elastic_daemon.control_routes import CONTROL_PATHS, CONTROL_TEMPLATES
from tests.certificates import certificate
from tests.e2e.cluster import Cluster
from tests.fuzzing import fuzz

pytestmark = pytest.mark.e2e

ADMIN = {"Authorization": "Bearer secret-admin"}


def test_a_daemon_from_a_file(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    keys, admin = tmp_path / "keys", tmp_path / "admin"
    keys.write_text("secret-one\n")
    admin.write_text("secret-admin\n")
    (file := tmp_path / "daemon.toml").write_text(
        f"data-parallel-size = 2\nsurvive-losses = 0\napi-key-file = '{keys}'\nadmin-key-file = '{admin}'\n"
        f"ssl-certfile = '{cert}'\nssl-keyfile = '{key}'\nmax-body-size = 2048\n[vllm]\nmax-model-len = 128\n"
    )
    with Cluster(tmp_path / "run", "--config", str(file)) as cluster:
        assert cluster.health()["url"].startswith("https://")
        with httpx.Client(
            base_url=cluster.url.replace("http://127.0.0.1", "https://localhost"),
            verify=ssl.create_default_context(cafile=str(cert)),
        ) as http:
            _assert_serves(http, "secret-one")
            models = http.get("/v1/models", headers={"Authorization": "Bearer secret-one"}).json()
            assert models["data"][0]["max_model_len"] == 128
            _assert_limits(http)
            _assert_private(cluster)
            _reload(cluster, http, file, keys)
            (front_end,) = cluster.titled("front end")
            os.kill(front_end, signal.SIGKILL)
            cluster.wait_for(lambda: cluster.health()["status"] == "recovering")
            assert http.get("/events", headers=ADMIN).status_code == 200, "the supervisor answers, over TLS"
            cluster.wait_for(lambda: cluster.health()["status"] == "ok", 30)
            cluster.wait_for(lambda: _status(http, "secret-two") == 200)
            _fuzz(http, str(cert))
            assert cluster.process.poll() is None
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
    assert not [path for path in paths if stat.S_IMODE(path.stat().st_mode) & 0o077]


def _reload(cluster: Cluster, http: httpx.Client, file: Path, keys: Path) -> None:
    before = {rank: cluster.pid(rank) for rank in cluster.active()}
    text = file.read_text()
    keys.write_text("secret-two\n")
    file.write_text("hold-timeout = 33\n" + text.replace("= 128", "= 64").replace("survive-losses = 0", "port = 1"))
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


def _fuzz(http: httpx.Client, cert: str) -> None:
    """The control routes, as the front end's document has them; it ends what the deployment was."""
    document = http.get("/openapi.json", headers=ADMIN).json()
    assert {"/v1/completions", "/scale_elastic_ep", "/events"} <= set(document["paths"])
    document["paths"] = {
        path: it for path, it in document["paths"].items() if path in CONTROL_PATHS | CONTROL_TEMPLATES
    }
    schema = schemathesis.openapi.from_dict(document)
    url = str(http.base_url)
    seen = fuzz(schema, 6, lambda case: case.call(base_url=url, headers=ADMIN, verify=cert, timeout=3))
    assert set(document["paths"]) == {label.partition(" ")[2] for label in seen}
    assert set.union(*seen.values()) >= {200, 400, 404}
