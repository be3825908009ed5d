"""How long clients wait for a recovery, by the quick form of the benchmark that the README's numbers come from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.measure import GAP_BAR_S

pytestmark = pytest.mark.chaos


@pytest.mark.timeout(700)
def test_the_median_wait_of_a_quick_benchmark(tmp_path: Path) -> None:
    """Nothing is lost or changed, and the median over runs of the longest wait of any client is within twice its bar.

    A machine that is slow just now makes clients wait without any fault, too: what they waited in the undisturbed runs
    beside the faults is allowed on top.
    """
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "bench.recovery", "--quick", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert report.exists(), (done.stdout + done.stderr)[-4000:]
    found = json.loads(report.read_text())
    summary = found["summary"]
    assert summary["kills"] >= 4
    assert (summary["lost"], summary["changed"]) == (0, 0), found["problems"]
    assert not [problem for problem in found["problems"] if "median" not in problem]
    assert summary["gaps"]["p50"] <= 2 * GAP_BAR_S + summary["calm_gaps"]["p50"], summary
