"""The bundled model over four ranks, through an ordinary OpenAI client."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from elastic_daemon.routes.control_routes import CONTROL_PATHS, CONTROL_TEMPLATES
from tests.e2e.cluster import PROMPTS, Cluster, assert_same, run_streams

pytestmark = pytest.mark.e2e

VLLM_METRICS = Path(__file__).parents[1] / "unit" / "data" / "vllm_metrics.json"


@pytest.fixture
def client(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)


def test_completion_and_chat_give_right_answers(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="tiny-moe", prompt="add 384 + 729 =", max_tokens=20, temperature=0)
    chat = client.chat.completions.create(
        model="tiny-moe", messages=[{"role": "user", "content": "add 384 + 729"}], max_tokens=20, temperature=0
    )
    assert completion.choices[0].text.split()[0] == "1113"
    assert chat.choices[0].message.content is not None
    assert chat.choices[0].message.content.split()[0] == "1113"


def test_streaming_chat_equals_its_whole_answer(client: openai.OpenAI) -> None:
    ask = {"model": "tiny-moe", "messages": [{"role": "user", "content": "sort 42 7 93 15"}], "temperature": 0}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert text.split() == ["7", "15", "42", "93"]
    assert chunks[-1].usage == whole.usage


def test_a_batch_is_served_and_one_that_no_queue_could_hold_is_refused(client: openai.OpenAI) -> None:
    ask = {"model": "tiny-moe", "max_tokens": 4}
    batch = client.completions.create(**ask, prompt=["copy 1 2 3", "copy 4 5"], n=3, temperature=1.0)
    assert len(batch.choices) == 6
    for too_many in ({"prompt": ["a"] * 4097}, {"prompt": ["a", "b"], "n": 2049}):
        with pytest.raises(openai.BadRequestError, match="at most 4096 can wait"):
            client.completions.create(**ask, **too_many)
    assert client.completions.create(**ask, prompt="copy 1").choices, "nothing is left of what was refused"


def test_models_lists_the_bundled_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-moe"]


def test_unknown_model_is_a_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


def test_health_tells_all(cluster: Cluster) -> None:
    health = httpx.get(f"{cluster.url}/health").json()
    assert health["status"] == "ok"
    assert health["model"] == "tiny-moe"
    assert health["data_parallel_size"] == {"target": 4, "active": 4}
    assert health["expert_safety"] == 1
    assert health["survivable_losses"] == 2
    assert [row["state"] for row in health["ranks"]] == ["active"] * 4
    assert len({pid for row in health["ranks"] for pid in row["pids"]}) == 4


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_probes(cluster: Cluster, path: str) -> None:
    assert httpx.get(cluster.url + path).status_code == 200


def test_metrics_of_engine_and_daemon_come_together(cluster: Cluster, client: openai.OpenAI) -> None:
    client.completions.create(model="tiny-moe", prompt="copy 1 2 3", max_tokens=5)
    families = {
        family.name: family for family in text_string_to_metric_families(httpx.get(f"{cluster.url}/metrics").text)
    }
    assert families["elastic_epoch"].samples[0].value == cluster.health()["epoch"]
    engines = {sample.labels["engine"] for sample in families["vllm:generation_tokens"].samples}
    assert engines == {"0", "1", "2", "3"}
    recorded = json.loads(VLLM_METRICS.read_text(encoding="utf-8"))["metrics"]
    told = {
        name + "_total" * (family.type == "counter"): {
            "type": family.type,
            "labels": sorted({label for sample in family.samples for label in sample.labels} - {"le"}),
        }
        for name, family in families.items()
        if name.startswith("vllm:")
    }
    assert told == recorded, "tests/unit/data/vllm_metrics.json is what rules and dashboard are held to"


def test_start_reads_as_a_story(cluster: Cluster) -> None:
    names = [event["event"] for event in httpx.get(f"{cluster.url}/events").json()]
    story = ["starting", "configured", "rank_starting", "rank_standby", "regrouping", "recovery_done"]
    assert [name for name in dict.fromkeys(names) if name in story] == story


def test_only_listed_routes_are_mounted(cluster: Cluster) -> None:
    for path in (
        "/invocations",
        "/pause",
        "/collective_rpc",
        "/v1/load_lora_adapter",
        "/server_info",
    ):
        assert httpx.post(cluster.url + path, json={}).status_code == 404, path
    ours = httpx.post(f"{cluster.url}/scale_elastic_ep", json={"new_data_parallel_size": 99})
    assert "see --max-ranks" in ours.json()["error"]["message"], "not vLLM's route of that name"
    routes = httpx.get(f"{cluster.url}/openapi.json").json()["paths"]
    assert "/v1/chat/completions" in routes
    control = CONTROL_PATHS | CONTROL_TEMPLATES
    assert control <= set(routes)
    assert not {path for path in set(routes) - control if not path.startswith(("/v1/", "/tokenize", "/detokenize"))}


def test_everything_listens_on_loopback_only(cluster: Cluster) -> None:
    pids = {cluster.process.pid, *cluster.descendants()}
    listening = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
    ours = [
        line.split()[3] for line in listening.splitlines() if {int(p) for p in re.findall(r"pid=(\d+)", line)} & pids
    ]
    assert ours
    assert all(address.startswith("127.0.0.1:") for address in ours), ours


def test_runtime_files_are_private(cluster: Cluster) -> None:
    assert cluster.runtime_dir.stat().st_mode & 0o777 == 0o700
    assert (cluster.runtime_dir / "control.sock").stat().st_mode & 0o077 == 0


def test_supervisor_is_free_of_vllm(cluster: Cluster) -> None:
    mapped = Path(f"/proc/{cluster.process.pid}/maps").read_text()
    assert "/vllm/" not in mapped


def test_load_spreads_over_ranks(cluster: Cluster) -> None:
    def look() -> None:
        cluster.wait_for(lambda: [row["in_flight"] for row in cluster.health()["ranks"]] == [4, 4, 4, 4], 5)

    run_streams(cluster, max_tokens=300, during=look, at_tokens=16)


def test_repeated_runs_give_the_same_tokens(cluster: Cluster) -> None:
    assert_same(run_streams(cluster), run_streams(cluster))


def test_status_command_prints_a_table(cluster: Cluster) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "elastic_daemon.cli", "status", "--runtime-dir", str(cluster.runtime_dir)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "tiny-moe" in done.stdout
    assert done.stdout.count("active") >= 4


def test_runtime_directory_of_a_live_daemon_is_refused(cluster: Cluster) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "elastic_daemon.cli", "serve", "--port", "0", "--runtime-dir", str(cluster.runtime_dir)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stderr.startswith("elastic-daemon: another daemon")
    assert len(done.stderr.splitlines()) == 1


def test_busy_port_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    port = cluster.url.rsplit(":", 1)[1]
    done = subprocess.run(
        [sys.executable, "-m", "elastic_daemon.cli", "serve", "--port", port, "--runtime-dir", str(tmp_path / "r")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


def test_front_end_crash_keeps_the_ranks(cluster: Cluster) -> None:
    """Its crash costs its requests, never ranks or weights; control routes answer meanwhile."""
    ranks = cluster.health()["ranks"]
    (front_end,) = cluster.titled("front end")
    with pytest.raises(httpx.TransportError):
        kill = functools.partial(os.kill, front_end, signal.SIGKILL)
        run_streams(cluster, max_tokens=1800, during=kill, at_tokens=3200)
    cluster.wait_for(lambda: httpx.get(f"{cluster.url}/health").json()["status"] == "recovering")
    cluster.wait_for(lambda: cluster.health()["status"] == "ok", 30)
    assert [row["pids"] for row in cluster.health()["ranks"]] == [row["pids"] for row in ranks]
    (lost,) = cluster.events("requests_lost")
    assert lost["count"] == len(PROMPTS)
    assert f"elastic_requests_lost_total {len(PROMPTS)}.0" in cluster.control("/metrics").text
    assert_same(run_streams(cluster, max_tokens=10), run_streams(cluster, max_tokens=10))
    cluster.wait_for(lambda: running(cluster) == 0)  # of the 1800 tokens for each, few were computed in vain


def running(cluster: Cluster) -> float:
    """Requests that ranks compute."""
    lines = httpx.get(f"{cluster.url}/metrics").text.splitlines()
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running{")]
    assert values
    return sum(values)


def test_memory_of_the_whole_deployment(cluster: Cluster) -> None:
    cluster.wait_for(lambda: len(cluster.descendants()) == 9, 30)  # a GPU that was slow has a child of its own a while
    pids = [cluster.process.pid, *cluster.descendants()]
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    shares = [int(line.split()[1]) for text in rollups for line in text.splitlines() if line.startswith("Pss:")]
    assert len(shares) == 10, "supervisor, zygote, front end, four ranks, the watchdog and its two children"
    assert sum(shares) * 1024 < 4 << 30
