"""Whom the drill kills, when, and what it reports of it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from elastic_daemon.drill.drill import (
    Fault,
    Moment,
    Victim,
    victims_of,
)
from elastic_daemon.drill.report import (
    Delay,
)
from elastic_daemon.errors import ConfigError
from tests.unit.drill_stream import stream

SLEEPER = "import setproctitle, sys, time; setproctitle.setproctitle(sys.argv[1]); print(flush=True); time.sleep(60)"


@pytest.fixture
def start_process() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(title: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", SLEEPER, title], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_victim_is_killed(start_process: Callable[[str], subprocess.Popen[bytes]]) -> None:
    process = start_process("elastic-daemon: rank 3")
    health = {"ranks": [{"rank": 3, "pids": [process.pid]}, {"rank": 4, "pids": [1]}]}
    with victims_of(health, [3]) as (victim,):
        victim.kill()
        assert process.wait(10) == -9
        victim.kill()  # gone already: no error


@pytest.mark.parametrize("title", ["elastic-daemon: rank 2", "elastic-daemon: rank 31", "something else"])
def test_no_other_process_is_killed(title: str, start_process: Callable[[str], subprocess.Popen[bytes]]) -> None:
    process = start_process(title)
    with pytest.raises(ConfigError, match="is not rank 3 on this machine"):
        Victim(3, [process.pid])
    assert process.poll() is None


def test_victim_without_process() -> None:
    with pytest.raises(ConfigError, match="no process"):
        Victim(3, [])
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(ConfigError, match="rank 3: its process"):
        Victim(3, [gone.pid])


class Recorder(Victim):
    def __init__(self, rank: int) -> None:
        self.rank, self.pids, self.kills = rank, (os.getpid(),), 0

    def kill(self) -> None:
        self.kills += 1


def test_fault_strikes_once_at_its_share_of_the_tokens() -> None:
    victim = Recorder(2)
    fault = Fault([victim], Moment(share=0.4), all_tokens=10)
    for tokens in (1, 2):
        fault.token(tokens)
    assert victim.kills == 0
    assert fault.report([stream()], [], []) is None
    for _ in range(5):
        fault.token(1)
    assert victim.kills == 1
    assert fault.seen == 4


async def test_fault_strikes_after_seconds() -> None:
    victim = Recorder(2)
    fault = Fault([victim], Moment(seconds=0.01), all_tokens=10)
    fault.run_begins()
    fault.token(9)
    assert victim.kills == 0
    await asyncio.sleep(0.1)
    assert victim.kills == 1


async def test_fault_that_comes_too_late_strikes_nobody() -> None:
    victim = Recorder(2)
    fault = Fault([victim], Moment(seconds=0.05), all_tokens=10)
    fault.run_begins()
    fault.run_ended()
    await asyncio.sleep(0.1)
    assert victim.kills == 0


def test_report_of_the_fault() -> None:
    fault = Fault([Recorder(1), Recorder(2)], Moment(), 10)
    fault.at, fault.wall_time, fault.seen = 2.0, 1000.0, 5
    streams = [stream(arrivals=(1.0, 1.5, 4.0)), stream(ended=1.0)]
    delays = [Delay(1.0, 0.9), Delay(3.0, 0.1)]
    events = [
        {"event": "rank_excluded", "rank": 1, "time": 1000.01},
        {"event": "rank_fault", "rank": 2, "time": 1000.02},
    ]
    strike = fault.report(streams, delays, events)
    assert strike is not None
    assert (strike.ranks, strike.streams, strike.at_s, strike.detection_s) == ((1, 2), 1, 2.0, None)
    assert (strike.gaps.max, strike.delays.max) == (2.5, 0.1)
    strike = fault.report(streams, delays, [*events, {"event": "rank_excluded", "rank": 2, "time": 1000.25}])
    assert strike is not None
    assert strike.detection_s == pytest.approx(0.25)
