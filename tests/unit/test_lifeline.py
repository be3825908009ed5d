"""The notice of a death, between real processes."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic_daemon.processes.lifeline import follow

HOLDER = """
import sys, threading, time
from pathlib import Path
from elastic_daemon.processes.lifeline import hold

hold(Path(sys.argv[1]))
memory = bytearray(int(sys.argv[2]) << 20)
for page in range(0, len(memory), 4096):
    memory[page] = 1
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print("held", flush=True)
sys.stdin.readline()
"""

Holder = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    started: list[subprocess.Popen[str]] = []

    def start(mebibytes: int = 1) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(tmp_path / "lifeline"), str(mebibytes)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def followed(tmp_path: Path) -> threading.Event:
    dead = threading.Event()
    follow(tmp_path / "lifeline", dead.set)
    return dead


def test_a_kill_is_told_before_the_process_is_gone(tmp_path: Path, holder: Holder) -> None:
    """By tens of milliseconds: this process may be off its processor for as long, so it tries again."""
    for _ in range(5):
        process = holder(mebibytes=1500)
        dead = followed(tmp_path)
        pidfd = os.pidfd_open(process.pid)
        time.sleep(0.1)
        assert not dead.is_set()
        process.send_signal(signal.SIGKILL)
        assert dead.wait(10)
        gone, _, _ = select.select([pidfd], [], [], 0)
        os.close(pidfd)
        process.wait(10)
        if not gone:
            return
    pytest.fail("a pidfd would have been as fast, each time")


def test_an_end_without_a_signal_is_told(tmp_path: Path, holder: Holder) -> None:
    process = holder()
    dead = followed(tmp_path)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert dead.wait(10) and process.wait(10) == 0


def test_a_stopped_process_is_not_dead(tmp_path: Path, holder: Holder) -> None:
    process = holder()
    dead = followed(tmp_path)
    process.send_signal(signal.SIGSTOP)
    assert not dead.wait(0.3)
    process.send_signal(signal.SIGKILL)
    assert dead.wait(10)


def test_a_death_before_anybody_follows_is_told(tmp_path: Path, holder: Holder) -> None:
    process = holder()
    process.kill()
    process.wait(10)
    assert followed(tmp_path).wait(10)


def test_the_file_is_gone_once_followed(tmp_path: Path, holder: Holder) -> None:
    holder()
    followed(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_follow(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        followed(tmp_path)
