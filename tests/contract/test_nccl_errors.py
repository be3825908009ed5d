"""Our binding to `ncclCommGetAsyncError` and the thread that polls it, against a small library with its signature.

It shows that the call, its arguments and what becomes of its answer fit; not what NCCL does on a GPU.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_daemon.engine.nccl_errors import ErrorPoll, async_error_of
from watchdog.heartbeat.page import HeartbeatWriter
from watchdog.heartbeat.reader import PageReader

pytestmark = pytest.mark.contract

SOURCE = Path(__file__).with_name("nccl_stub.c")
ROOT = Path(__file__).parents[2]

ASK = """
import ctypes, sys
from elastic_daemon.engine.nccl_errors import async_error_of

class Comm(ctypes.Structure):
    _fields_ = [("error", ctypes.c_int), ("result", ctypes.c_int), ("calls", ctypes.c_int)]

comm = Comm()

class Group:
    def _comm_ptr(self):
        return ctypes.addressof(comm)

assert async_error_of(Group()) is None, "nothing is loaded yet, and nothing must be loaded for this"
torch, other = map(ctypes.CDLL, sys.argv[1:])
error = async_error_of(Group())
for comm.error, comm.result in ((0, 0), (6, 0), (2, 0), (7, 0), (0, 4)):
    print(error.read())
print(comm.calls)
assert async_error_of(object()) is None, "a torch without _comm_ptr"
"""


def compile_library(path: Path, *arguments: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-o", str(path), *arguments]
    subprocess.run(command, check=True, timeout=60)
    return path


def test_the_library_that_torch_uses_is_asked(tmp_path: Path) -> None:
    """In a process of its own, where what is loaded stays so. Another NCCL is there too."""
    nccl = compile_library(tmp_path / "torch" / "libnccl.so.2", str(SOURCE), "-DOFFSET=0")
    wrong = compile_library(tmp_path / "other" / "libnccl.so.2", str(SOURCE), "-DOFFSET=100")
    linked = ("-Wl,--no-as-needed", str(nccl), "-Wl,-rpath,$ORIGIN")
    torch = compile_library(tmp_path / "torch" / "libtorch_cuda.so", "-x", "c", "/dev/null", "-x", "none", *linked)
    command = [sys.executable, "-c", ASK, str(torch), str(wrong)]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert asked.returncode == 0, asked.stderr
    said = [line for line in asked.stdout.splitlines() if line.isdigit()]
    assert said == ["0", "6", "2", "0", "4", "5"]


def test_without_nccl_a_rank_serves_all_the_same() -> None:
    assert async_error_of(object()) is None  # type: ignore[arg-type]


@pytest.fixture
def page(tmp_path: Path) -> Iterator[HeartbeatWriter]:
    writer = HeartbeatWriter(tmp_path, 0, 1)
    yield writer
    writer.close()


def until(page: HeartbeatWriter, code: int) -> None:
    deadline = time.monotonic() + 5
    with PageReader(page.path) as reader:
        while (found := reader.read()).async_error != code:
            assert time.monotonic() < deadline, f"5 s without error {code}: the page says {found.async_error}"
            time.sleep(0.005)


def test_the_page_says_what_nccl_says(page: HeartbeatWriter) -> None:
    page.report_async_error(6)  # of the communicator before
    answers: list[int | None] = [0]
    poll = ErrorPoll(lambda: answers[-1], page, 0.01)
    until(page, 0)
    for code in (6, 2, 0, 6):
        answers.append(code)
        until(page, code)
    answers.append(None)  # aborted: what NCCL says from here on is our doing
    poll._thread.join(5)
    assert not poll._thread.is_alive()
    answers.append(3)
    poll.close()
    until(page, 6)


def test_nothing_is_written_after_close(page: HeartbeatWriter) -> None:
    asked: list[int] = []

    def error() -> int:
        asked.append(1)
        return len(asked)

    poll = ErrorPoll(error, page, 0.005)
    while len(asked) < 3:
        time.sleep(0.001)
    poll.close()
    count = len(asked)
    with PageReader(page.path) as reader:
        before = reader.read().async_error
        time.sleep(0.05)
        assert (reader.read().async_error, len(asked)) == (before, count)


def test_a_page_that_is_closed_first_ends_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    writer = HeartbeatWriter(tmp_path, 0, 1)
    closed: list[bool] = []
    poll = ErrorPoll(lambda: 6 if closed else 0, writer, 0.01)
    time.sleep(0.03)
    writer.close()
    closed.append(True)
    time.sleep(0.05)
    assert poll._thread.is_alive()
    poll.close()
    assert "Traceback" not in capfd.readouterr().err
