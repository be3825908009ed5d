"""A deployment with API keys and an admin key, through its real socket, with and without a front end."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from tests import proc
from tests.e2e.cluster import Cluster

pytestmark = pytest.mark.e2e

KEYED = ("--data-parallel-size", "2", "--survive-losses", "0", "--api-key", "secret-one", "--api-key", "secret-two")


ADMIN_KEY = "secret-admin"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
USER = {"Authorization": "Bearer secret-two"}


def test_keys(tmp_path: Path) -> None:
    origins = ("--allowed-origins", '["https://chat.example"]')
    with Cluster(tmp_path / "run", *KEYED, *origins, env={"ELASTIC_ADMIN_KEY": ADMIN_KEY}) as cluster:
        keyed = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="secret-two", max_retries=0)
        assert keyed.completions.create(model="tiny-moe", prompt="copy 1 2 3", max_tokens=4).choices
        stranger = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="guess", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            stranger.completions.create(model="tiny-moe", prompt="copy 1 2 3", max_tokens=4)
        _assert_closed(cluster.url)
        preflight = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
        asked = httpx.options(f"{cluster.url}/v1/completions", headers=preflight)
        assert asked.status_code == 200, "by vLLM, without a key"
        assert asked.headers["access-control-allow-origin"] == "https://chat.example"
        elsewhere = {**preflight, "Origin": "https://evil.example"}
        assert httpx.options(f"{cluster.url}/v1/completions", headers=elsewhere).status_code == 400
        assert httpx.options(f"{cluster.url}/events", headers=preflight).status_code == 401
        _assert_orders_need_the_admin_key(cluster.url)
        assert httpx.post(
            f"{cluster.url}/scale_elastic_ep", json={"new_data_parallel_size": 2}, headers=ADMIN
        ).is_success
        _assert_commands_need_no_key(cluster)
        _assert_secrets_stay_secret(cluster)

        (front_end,) = cluster.titled("front end")
        os.kill(front_end, signal.SIGKILL)
        cluster.wait_for(lambda: cluster.health()["status"] == "recovering")
        _assert_closed(cluster.url)
        _assert_orders_need_the_admin_key(cluster.url)


def _assert_closed(url: str) -> None:
    """What a stranger gets, whoever answers."""
    assert set(httpx.get(f"{url}/health").json()) == {"status"}
    for path in ("/livez", "/readyz", "/metrics"):
        assert httpx.get(url + path).status_code in (200, 503), path
    for path in ("/v1/models", "/events", "/experts", "/openapi.json"):
        assert httpx.get(url + path).status_code == 401, path
    assert httpx.post(f"{url}/tokenize", json={"prompt": "x"}).status_code == 401


def _assert_orders_need_the_admin_key(url: str) -> None:
    body = {"new_data_parallel_size": 3}
    for path in ("/scale_elastic_ep", "/ranks/0/drain", "/ranks/0/exclude", "/gpus/GPU-1/release", "/automation"):
        assert httpx.post(url + path, json=body).status_code == 401, path
        assert httpx.post(url + path, json=body, headers=USER).status_code == 403, path
    verify = f"{url}/experts/verify"
    assert [httpx.get(verify, headers=headers).status_code for headers in ({}, USER)] == [401, 403]
    scale = f"{url}/scale_elastic_ep"
    assert httpx.post(scale, json=body, headers={**ADMIN, "Origin": "http://evil.example"}).status_code == 403
    assert httpx.post(scale, content=b"{}", headers=ADMIN).status_code == 415
    too_many = httpx.post(scale, json=body, headers=ADMIN)
    assert (too_many.status_code, too_many.json()["error"]["code"]) == (400, 400)
    assert "must be at most 2" in too_many.json()["error"]["message"]
    assert httpx.post(f"{url}/is_scaling_elastic_ep", headers=USER).json() == {"is_scaling_elastic_ep": False}
    assert httpx.get(f"{url}/operations/op-0", headers=USER).status_code == 404
    for detour in ("/operations/../scale_elastic_ep", "/operations/..%2Fscale_elastic_ep", "/health/../automation"):
        assert _status_of(url, detour) in (404, 503), f"{detour}: not a control route, whoever answers"


def _status_of(url: str, path: str) -> int:
    """Of a POST to a path that is sent as it is, by somebody with an API key."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("POST", path, b'{"enabled": false}', {**USER, "Content-Type": "application/json"})
    status = connection.getresponse().status
    connection.close()
    return status


def _assert_commands_need_no_key(cluster: Cluster) -> None:
    command = [sys.executable, "-m", "elastic_daemon.cli"]
    target = ["--runtime-dir", str(cluster.runtime_dir)]
    done = subprocess.run([*command, "scale", "2", *target], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("scale 2 -> 2: done after ")


def _assert_secrets_stay_secret(cluster: Cluster) -> None:
    assert "secret" not in cluster.log
    for path in ("/metrics", "/events", "/health", "/operations"):
        assert "secret" not in cluster.control(path).text, path
    for pid in cluster.descendants():
        assert "secret" not in proc.read(pid, "cmdline")
    assert ADMIN_KEY not in proc.read(cluster.process.pid, "cmdline")
