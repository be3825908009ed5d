"""NCCL RAS as the second source: what it answers, what becomes of no answer, and whom that names.

`data/nccl_ras_stopped.json` is what NCCL 2.30.7 answered on an H100 when one of three ranks was stopped.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.test_heartbeat_learning import VICTIM, Group
from watchdog.errors import RasError
from watchdog.heartbeat.findings import FindingKind, Reason
from watchdog.heartbeat.layout import Granularity
from watchdog.ras import RasReport, RasWitness, address, ask, parse

STOPPED = (Path(__file__).parent / "data" / "nccl_ras_stopped.json").read_bytes()
STOPPED_PID = 1243
WAIT_S = 10.0


@contextmanager
def listening(*answers: bytes, holds: bool = False) -> Iterator[tuple[str, int]]:
    """A server that answers one line after the other, the last one in two pieces. `holds`: it never closes."""

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            lines = connection.makefile("rb")
            for answer in answers:
                lines.readline()
                connection.sendall(answer[: len(answer) // 2])
                connection.sendall(answer[len(answer) // 2 :])
            if holds:
                lines.read()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()
        thread.join(WAIT_S)
        assert not thread.is_alive()


def test_a_recorded_answer() -> None:
    assert parse(b"SERVER PROTOCOL 2\nOK\n" + STOPPED) == RasReport(frozenset({STOPPED_PID}))


def test_a_rank_that_is_missing_for_another_reason_is_not_unheard() -> None:
    assert parse(b'{"communicators": [{"missing_ranks": [{"pid": 5, "status": {}}]}]}') == RasReport(frozenset())


@pytest.mark.parametrize("answer", [b"", b"OK\n", b"{", b"[]", b"{}", b'{"communicators": [{"missing_ranks": [7]}]}'])
def test_what_is_no_report(answer: bytes) -> None:
    with pytest.raises(RasError):
        parse(answer)


def test_asking() -> None:
    with listening(b"SERVER PROTOCOL 2\n", b"OK\n", STOPPED) as where:
        assert ask(where, WAIT_S).unheard == {STOPPED_PID}


def test_a_server_that_never_ends_is_left_in_time() -> None:
    started = time.monotonic()
    with listening(b"SERVER PROTOCOL 2\n", b"OK\n", STOPPED[:100], holds=True) as where:
        with pytest.raises(RasError, match="timed out"):
            ask(where, 0.3)
    assert time.monotonic() - started < WAIT_S


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = server.getsockname()
    with pytest.raises(RasError, match="refused"):
        ask(where, WAIT_S)


def test_where_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_RAS_ADDR", raising=False)
    assert address() == ("localhost", 28028)
    monkeypatch.setenv("NCCL_RAS_ADDR", "[::1]:5")
    assert address() == ("::1", 5)
    monkeypatch.setenv("NCCL_RAS_ADDR", "here")
    with pytest.raises(RasError, match="HOST:PORT"):
        address()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_witness_asks_only_when_somebody_is_suspected_and_never_keeps_its_asker_waiting() -> None:
    asked = threading.Semaphore(0)
    answer = threading.Event()

    def slowly() -> RasReport:
        asked.release()
        assert answer.wait(WAIT_S)
        return RasReport(frozenset({7}))

    witness = RasWitness(slowly)
    assert witness.unheard(False, 0.0) == frozenset()
    assert witness.unheard(True, 1.0) == frozenset()
    assert asked.acquire(timeout=WAIT_S)
    assert witness.unheard(True, 3.0) == frozenset(), "one question at a time"
    answer.set()
    until(lambda: witness.unheard(False, 4.0) == {7})
    assert not asked.acquire(blocking=False)
    assert witness.unheard(False, 13.9) == {7}
    assert witness.unheard(False, 14.1) == frozenset(), "an old answer says nothing"
    witness.close()


def test_a_witness_that_cannot_be_asked_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    def refused() -> RasReport:
        raise RasError("refused")

    witness = RasWitness(refused)
    for second in range(5):
        witness.unheard(True, float(second))
        until(lambda: witness._asking is None or witness._asking.done())
    witness.unheard(False, 6.0)
    assert capsys.readouterr().err.count("nccl_ras_unavailable") == 1
    witness.close()


@pytest.mark.parametrize(("unheard", "named"), [((VICTIM,), VICTIM), ((), None), ((0, VICTIM), None)])
def test_a_standstill_is_the_fault_of_the_one_that_nccl_does_not_hear(
    unheard: tuple[int, ...], named: int | None
) -> None:
    """All ranks are inside the same collective: their counters name nobody."""
    group = Group(Granularity.STEP)
    group.work(60.0)
    group.step += 1
    pages = [replace(group._page(rank, waits=True), pid=100 + rank) for rank in range(4)]
    found = []
    for _ in range(100):
        group.now += 0.1
        pids = frozenset(100 + rank for rank in unheard)
        found = group.judge.observe(group.now, pages, group.epoch, pids)
    (finding,) = found
    assert (finding.rank, finding.confirmed) == (named, True)
    assert finding.kind is (FindingKind.NOBODY if named is None else FindingKind.HUNG)
    assert (finding.reason is Reason.UNHEARD) == (named is not None)
