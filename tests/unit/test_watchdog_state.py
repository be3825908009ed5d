"""What outlives a restart, also one in the middle of a write."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watchdog.errors import StateError
from watchdog.state import FILE_NAME, State
from watchdog.verdict import Policy, Verdict

POLICY = Policy()
TIMES = st.lists(st.floats(1e9, 2e9), max_size=5)


def test_round_trip(tmp_path: Path) -> None:
    state = State.load(tmp_path / "new" / "directory")
    now = time.time()
    state.see("GPU-a", now)
    assert [state.add_failure("GPU-a", POLICY, now - age) for age in (20, 10, 0)] == [False, False, True]
    state.add_restart("GPU-b", now)
    state.set_verdict("GPU-a", Verdict.EXCLUDE)
    state.save()
    again = State.load(tmp_path / "new" / "directory")
    assert again.record("GPU-a") == state.record("GPU-a")
    assert again.record("GPU-a").history.quarantined == now
    assert not again.dirty
    assert (tmp_path / "new" / "directory" / FILE_NAME).stat().st_mode & 0o777 == 0o600


@given(TIMES, TIMES, st.none() | st.floats(1e9, 2e9), st.floats(1e9, 2e9))
def test_release_forgives_what_was_before(
    tmp_path_factory: pytest.TempPathFactory,
    failures: list[float],
    restarts: list[float],
    again: float | None,
    at: float,
) -> None:
    state = State.load(tmp_path_factory.getbasetemp() / "release")
    for wall in failures:
        state.add_failure("GPU-r", Policy(quarantine_failures=0), wall)
    for wall in restarts:
        state.add_restart("GPU-r", wall)
    state.release("GPU-r", at)
    history = state.record("GPU-r").history
    assert history.quarantined is None
    assert all(wall > at for wall in (*history.failures, *history.restarts))
    assert not state.release("GPU-r", at), "the same release twice"


@pytest.mark.parametrize(
    "contents", [b"", b"{", b"[]", b'{"version": 9, "gpus": {}}', b'{"version": 1, "gpus": {"a": 1}}', b"\xff"]
)
def test_corrupt_file_is_put_aside(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(contents)
    state = State.load(tmp_path)
    assert state.gpus == ()
    aside = [path for path in tmp_path.iterdir() if ".corrupt-" in path.name]
    assert [path.read_bytes() for path in aside] == [contents]
    state.add_restart("GPU-a", time.time())
    state.save()
    assert State.load(tmp_path).record("GPU-a").history.restarts


def test_survives_kills_in_the_middle_of_writing(tmp_path: Path) -> None:
    """A process that does nothing but save is killed again and again: its file always reads, and nothing is lost."""
    program = (
        "import sys,time\nfrom pathlib import Path\nfrom watchdog.state import State\n"
        "state = State.load(Path(sys.argv[1]))\nprint('go', flush=True)\n"
        "while True:\n    state.add_restart('GPU-a', time.time()); state.see('GPU-a', time.time()); state.save()\n"
    )
    known: tuple[float, ...] = ()
    for round_ in range(6):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        while not (tmp_path / FILE_NAME).exists():
            time.sleep(0.001)  # the first save of all
        time.sleep(0.02 + 0.013 * round_)
        process.kill()
        process.wait()
        process.stdout.close()
        found = State.load(tmp_path).record("GPU-a").history.restarts
        assert len(found) >= min(len(known), 100)
        known = found
    assert known
    assert not [path for path in tmp_path.iterdir() if ".corrupt-" in path.name]


def test_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="file"):
        State.load(tmp_path / "file" / "below")
    state = State.load(tmp_path)
    state.add_restart("GPU-a", 1.0)
    os.mkdir(tmp_path / f".{FILE_NAME}.{os.getpid()}")
    with pytest.raises(StateError):
        state.save()
    assert state.dirty
