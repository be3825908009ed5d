"""What a person gets wrong: one line that says what and what to do, the right exit code, nothing left running."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elastic_daemon.config import BUNDLED_MODEL
from tests.e2e.cluster import Cluster

pytestmark = pytest.mark.e2e

SERVE = (sys.executable, "-m", "elastic_daemon.cli", "serve")


def serve(tmp_path: Path, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SERVE, *arguments, "--port", "0", "--runtime-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in done.stderr
    lines: list[str] = [line for line in done.stderr.splitlines() if line.startswith("elastic-daemon: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("/no/such/model",), 2, "no such model directory: /no/such/model"),
        (("--pipeline-parallel-size", "2"), 2, "--pipeline-parallel-size 2 is not supported"),
        (("--no-such-flag", "1"), 2, "--no-such-flag"),
        (("--data-parallel-size", "4", "--survive-losses", "4"), 2, "can survive 0 to 3 losses"),
        (("--data-parallel-size", "0"), 2, "--data-parallel-size"),
        (("--port", "0", "stray"), 2, "unexpected argument 'stray'"),
        (("--device", "cuda"), 2, "serves on cpu"),
    ],
)
def test_refused_with_one_line(tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    done = serve(tmp_path, *arguments)
    assert message in error_line(done)
    assert done.returncode == code


def test_dense_model_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "dense"
    shutil.copytree(BUNDLED_MODEL, model)
    (model / "config.json").write_text(
        """{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 64,
        "vocab_size": 128}"""
    )
    done = serve(tmp_path, str(model))
    assert "is a dense model" in error_line(done)
    assert done.returncode == 2


def test_corrupt_checkpoint_ends_the_start_after_bounded_restarts(tmp_path: Path) -> None:
    model = tmp_path / "corrupt"
    shutil.copytree(BUNDLED_MODEL, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    done = serve(tmp_path, str(model), "--dtype", "float32", "--data-parallel-size", "2")
    assert done.returncode == 3
    assert "did not start on it in 3 attempts" in done.stderr
    assert done.stderr.count('"event": "rank_starting"') <= 2 * 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_while_starting_ends_everything(tmp_path: Path, number: signal.Signals) -> None:
    cluster = Cluster(tmp_path / "run")
    try:
        cluster.wait_for(lambda: cluster.health()["status"] == "starting", 60)
        pids = [cluster.process.pid, *cluster.descendants()]
        started = time.monotonic()
        cluster.process.send_signal(number)
        assert cluster.process.wait(10) == 0
        assert time.monotonic() - started < 10
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists() and pid != cluster.process.pid]
    finally:
        cluster.stop()
