"""A deployment with an API key, through its real socket, with and without a front end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import openai
import pytest

from tests.e2e.cluster import Cluster

pytestmark = pytest.mark.e2e

KEYED = ("--data-parallel-size", "2", "--survive-losses", "0", "--api-key", "secret-one", "--api-key", "secret-two")


def test_keys(tmp_path: Path) -> None:
    with Cluster(tmp_path / "run", *KEYED) as cluster:
        keyed = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="secret-two", max_retries=0)
        assert keyed.completions.create(model="tiny-moe", prompt="copy 1 2 3", max_tokens=4).choices
        stranger = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="guess", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            stranger.completions.create(model="tiny-moe", prompt="copy 1 2 3", max_tokens=4)
        _assert_closed(cluster.url)
        assert "secret" not in cluster.log

        (front_end,) = [pid for pid in cluster.descendants() if "front end" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(front_end, signal.SIGKILL)
        cluster.wait_for(lambda: cluster.health()["status"] == "recovering")
        _assert_closed(cluster.url)


def _assert_closed(url: str) -> None:
    """What a stranger gets, whoever answers."""
    assert set(httpx.get(f"{url}/health").json()) == {"status"}
    for path in ("/livez", "/readyz", "/metrics"):
        assert httpx.get(url + path).status_code in (200, 503), path
    for path in ("/v1/models", "/events", "/experts", "/openapi.json"):
        assert httpx.get(url + path).status_code == 401, path
    assert httpx.post(f"{url}/tokenize", json={"prompt": "x"}).status_code == 401
