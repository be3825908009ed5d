"""The drill's parts, small, on a real GPU that all ranks share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import driver, fp8
from elastic_daemon.config import BUNDLED_MODEL

SEEN = driver.ask()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(SEEN is None or not SEEN.gpus, reason="no CUDA device: the NVIDIA driver does not answer"),
]

SHARED = ("kill", "hang", "rejoin", "scale", "nvml", "leak")
"""Parts of one life."""


def drill(out: Path, *arguments: str) -> str:
    """Run parts with one trial each. Returns what was said; a part that has not passed is found in its result."""
    command = [sys.executable, "-m", "bench.gpu_drill", "--out", str(out), "--trials", "1", "--watch-minutes", "0.5"]
    said = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=580, check=False)
    return said.stdout + said.stderr


def result(out: Path, part: str, said: str) -> dict[str, Any]:
    path = out / f"{part}.json"
    assert path.exists(), said[-4000:]
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("drill")
    return out, drill(out, "--part", ",".join(SHARED))


@pytest.mark.parametrize("part", SHARED)
def test_parts_that_share_a_life(shared: tuple[Path, str], part: str) -> None:
    out, said = shared
    found = result(out, part, said)
    assert found["verdict"] == "passed", (found["problems"], said[-4000:])
    assert not found["trial"] and found["gpu"] and found["driver"]


@pytest.mark.parametrize("part", ["eplb", "checkpoint", "graphs"])
def test_parts_with_a_life_of_their_own(tmp_path: Path, part: str) -> None:
    said = drill(tmp_path, "--part", part)
    found = result(tmp_path, part, said)
    assert found["verdict"] == "passed", (found["problems"], said[-4000:])


def test_fp8(tmp_path: Path) -> None:
    fp8.make(BUNDLED_MODEL, tmp_path / "model")
    said = drill(tmp_path, "--part", "fp8", "--model", str(tmp_path / "model"), "--logprobs")
    found = result(tmp_path, "fp8", said)
    assert found["verdict"] == "passed", (found["problems"], said[-4000:])
