"""What is told to a service manager, when, and over which socket."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.timing import SLACK_S
from watchdog.notify import EXTEND_S, Notifier, NotifySocket, Schedule, Supervision


def listener(address: str) -> socket.socket:
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(f"\0{address[1:]}" if address.startswith("@") else address)
    receiver.settimeout(5)
    return receiver


def heard(receiver: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in receiver.recv(4096).decode().split("\n"))


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_one_datagram_carries_all_fields(kind: str, tmp_path: Path) -> None:
    address = str(tmp_path / "notify") if kind == "path" else f"@elastic-{uuid.uuid4()}"
    with listener(address) as receiver:
        assert NotifySocket(address).send(READY=1, STATUS="two\nlines")
        assert heard(receiver) == {"READY": "1", "STATUS": "two lines"}


def test_without_a_service_manager_nothing_happens(tmp_path: Path) -> None:
    assert not NotifySocket(None).send(READY=1)
    assert not NotifySocket(str(tmp_path / "nobody")).send(READY=1)
    Notifier(Supervision()).turn(lambda: pytest.fail("asked for a sentence that nobody reads"), serving=True)


def test_a_manager_that_does_not_read_stops_nobody(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with listener(address):
        sender = NotifySocket(address)
        began = time.monotonic()
        taken = [sender.send(WATCHDOG=1) for _ in range(2000)]
    assert taken[0] and not taken[-1]
    assert time.monotonic() - began < SLACK_S


def test_the_environment_is_taken_and_not_left_to_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert Supervision.take() == Supervision("/run/notify", 30.0)
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)
    assert Supervision.take() == Supervision()


def test_pings_meant_for_another_process_are_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "@x")
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert Supervision.take() == Supervision("@x", None)


def test_a_hung_service_says_where_when_systemd_aborts_it() -> None:
    program = "import os; from watchdog.notify import Supervision; Supervision.take(); os.abort()"
    environment = {**os.environ, "NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "30000000"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == -signal.SIGABRT
    assert 'File "<string>", line 1' in run.stderr


def test_a_start_asks_for_time_until_it_serves_and_is_ready_once() -> None:
    schedule = Schedule(None)
    assert schedule.turn(0.0, "starting", serving=False) == {"EXTEND_TIMEOUT_USEC": 60_000_000, "STATUS": "starting"}
    assert schedule.turn(1.0, "starting", serving=False) == {}
    assert schedule.turn(21.0, "starting", serving=False) == {"EXTEND_TIMEOUT_USEC": 60_000_000}
    assert schedule.turn(22.0, "serving", serving=True) == {"READY": 1, "STATUS": "serving"}
    assert schedule.turn(60.0, "recovering", serving=False) == {"STATUS": "recovering"}
    assert schedule.turn(61.0, "serving", serving=True) == {"STATUS": "serving"}


def test_a_sentence_that_changes_all_the_time_is_not_sent_all_the_time() -> None:
    schedule = Schedule(None)
    schedule.turn(0.0, "0", serving=True)
    told = [schedule.turn(turn / 10, f"{turn}", serving=True) for turn in range(1, 31)]
    assert sum("STATUS" in fields for fields in told) == 3


def test_no_time_is_asked_for_to_start_while_stopping() -> None:
    assert "EXTEND_TIMEOUT_USEC" not in Schedule(None).turn(0.0, "stopping", serving=False, stopping=True)


@given(
    gaps=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=200),
    serving=st.booleans(),
    watchdog_s=st.floats(2.5, 60.0),
)
def test_a_loop_that_turns_each_second_never_misses_a_period(
    gaps: list[float], serving: bool, watchdog_s: float
) -> None:
    """Pings come in time, and time for the start is asked for before it is over."""
    schedule = Schedule(watchdog_s)
    now = pinged = extended = 0.0
    for gap in gaps:
        now += gap
        fields = schedule.turn(now, "", serving=serving)
        pinged = now if "WATCHDOG" in fields else pinged
        extended = now if "EXTEND_TIMEOUT_USEC" in fields else extended
        assert now - pinged < watchdog_s
        assert serving or now - extended < EXTEND_S


def test_reload_says_when_it_began_and_only_of_a_service_that_is_ready(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with listener(address) as receiver:
        notifier = Notifier(Supervision(address))
        notifier.reloading()
        notifier.ready()
        notifier.turn(lambda: "serving", serving=True)
        assert heard(receiver) == {"READY": "1", "STATUS": "serving"}  # the first of all

        before = time.monotonic()
        notifier.reloading()
        said = heard(receiver)
        assert said["RELOADING"] == "1"
        assert before <= int(said["MONOTONIC_USEC"]) / 1e6 + 1e-5 <= time.monotonic() + 1e-5
        notifier.ready()
        assert heard(receiver) == {"READY": "1"}

        notifier.stopping(25.0)
        assert heard(receiver) == {"STOPPING": "1", "EXTEND_TIMEOUT_USEC": "25000000"}
        notifier.ready()
        notifier.turn(lambda: "stopping", serving=False)
        receiver.settimeout(0.2)
        left = []
        try:
            while True:
                left.append(heard(receiver))
        except TimeoutError:
            pass
        assert not [fields for fields in left if "READY" in fields or "EXTEND_TIMEOUT_USEC" in fields]
