"""The GPU drill itself, tried on CPU ranks: it proves the script, and nothing about GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import fp8
from elastic_daemon.config import BUNDLED_MODEL
from tests.timing import SLACK_S

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

DRILL = (sys.executable, "-m", "bench.gpu_drill")
SMALL = ("--device", "cpu", "--ranks", "3", "--trials", "1", "--watch-minutes", "0.05", "--tokens", "60")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DRILL, *arguments], capture_output=True, text=True, timeout=280, check=False)


def unmet(result: dict[str, Any]) -> list[str]:
    """What was wrong. Times may be longer by some slack: their bars are those of a GPU host."""
    assert result["verdict"] in ("passed", "failed") and result["bars"], "it came to its end"

    def within(bar: dict[str, Any]) -> bool:
        slow = bar["what"].endswith(", s") and bar["value"] is not None and bar["value"] <= bar["limit"] + SLACK_S
        return bool(bar["met"] or slow)

    return [*result["problems"], *(bar["text"] for bar in result["bars"] if not within(bar))]


def test_trial_run(tmp_path: Path) -> None:
    mixed = ("--sampling", "mixed")
    said = run("--part", "kill,nvml,scale,ties", "--out", str(tmp_path), "--variant", "small", *mixed, *SMALL)
    results = [json.loads((tmp_path / f"{part}-small.json").read_text()) for part in ("kill", "nvml", "scale", "ties")]
    assert [unmet(one) for one in results] == [[]] * 4, said.stderr[-4000:]
    assert all(one["trial"] and not one["gpu"] for one in results)
    assert {one["setting"]["sampling"] for one in results} == {"mixed"}
    assert all(one["cell"].endswith("mixed streams") for one in results)
    assert len(list(tmp_path.glob("*.log"))) == 1, "parts with the same flags share one daemon"

    report = run("--report", str(tmp_path))
    assert report.stdout.count("**trial run on CPU**") == 4
    again = run("--part", "kill", "--out", str(tmp_path), "--variant", "small", *SMALL)
    assert again.returncode == 0 and "there is a result" in again.stderr


def test_an_xid_moves_a_rank_to_a_spare_gpu(tmp_path: Path) -> None:
    said = run("--part", "xid", "--serve-args=--spare-gpus 1", "--out", str(tmp_path), *SMALL)
    found = json.loads((tmp_path / "xid.json").read_text())
    assert not unmet(found), said.stderr[-4000:]
    (trial,) = found["trials"]
    assert trial["rank"] == 2 and trial["gpu"] != trial["gpu_after"]


def test_refused_cell_is_a_result_with_its_reason(tmp_path: Path) -> None:
    fp8.make(BUNDLED_MODEL, tmp_path / "model")
    said = run("--part", "fp8", "--model", str(tmp_path / "model"), "--out", str(tmp_path), *SMALL)
    assert said.returncode == 0, said.stderr[-4000:]
    found = json.loads((tmp_path / "fp8.json").read_text())
    assert found["verdict"] == "refused"
    assert "fp8" in found["refused"]
