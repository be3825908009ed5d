"""What the benchmark of stragglers makes of its trials."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from bench.load import Outcome
from bench.straggler import SLOWDOWN, Run, Trial, named, slowed

GOOD = Trial(2, 6.5, ())


def test_only_suspicions_of_slowness_count_and_the_first_of_each_rank() -> None:
    slow = {"event": "verdict", "verdict": "suspect", "signal": "straggler"}
    events = [
        {"event": "verdict", "verdict": "suspect", "signal": "xid", "rank": 0, "time": 1.0},
        {**slow, "rank": 2, "time": 2.0},
        {**slow, "rank": 2, "time": 3.0},
        {"event": "verdict", "verdict": "ok", "signal": "", "rank": 2, "time": 4.0},
        {"event": "rank_excluded", "rank": 1, "time": 5.0},
    ]
    assert named(events) == {2: 2.0}


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (Run([GOOD]), None),
        (Run([GOOD, Trial(1, None, ())]), "rank 1 was not named"),
        (Run([Trial(1, 5.0, (3,))]), "ranks [3] were named, 1 was slow"),
        (Run([GOOD], excluded=[2]), "rank 2 was excluded"),
        (Run([GOOD], Outcome(5, changed=1)), "1 streams"),
        (Run([GOOD], problem="TimeoutError"), "TimeoutError"),
    ],
)
def test_what_is_wrong(run: Run, said: str | None) -> None:
    wrong = run.wrong()
    assert (wrong == []) if said is None else (len(wrong) == 1 and said in wrong[0])


def test_a_slowed_process_gets_its_share_of_the_time_and_runs_on_afterwards() -> None:
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.1)
        before, started = used_s(child.pid), time.monotonic()
        with slowed(child.pid):
            time.sleep(1.0)
        share = (used_s(child.pid) - before) / (time.monotonic() - started)
        assert share < 2 / SLOWDOWN
        again = used_s(child.pid)
        deadline = time.monotonic() + 10
        while used_s(child.pid) == again:
            assert time.monotonic() < deadline, "it stands still"
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()


def used_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
