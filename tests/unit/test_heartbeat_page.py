"""Heartbeat pages: what a writer writes, what a reader makes of it, and of everything that is no page."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watchdog.heartbeat import layout
from watchdog.heartbeat.errors import PageCorrupt, PageInvalid, PageMissing, PageNotCreated, PageVersionMismatch
from watchdog.heartbeat.layout import WORD_MASK, Collective, Granularity, Phase, ProcessState, ahead
from watchdog.heartbeat.page import HeartbeatWriter, page_path
from watchdog.heartbeat.reader import PageDirectory, PageReader


@pytest.fixture
def writer(tmp_path: Path) -> HeartbeatWriter:
    return HeartbeatWriter(tmp_path, rank=2, incarnation=7)


def set_word(path: Path, index: int, value: int) -> None:
    with path.open("r+b") as page:
        page.seek(8 * index)
        page.write(struct.pack("@Q", value))


def test_a_step_is_read_back(writer: HeartbeatWriter) -> None:
    writer.begin_epoch(3)
    writer.start_step(41, Phase.DECODE)
    writer.enter(Collective.DISPATCH)
    writer.complete(Collective.DISPATCH)
    writer.enter(Collective.COMBINE)
    writer.report_async_error(6)
    with PageReader(writer.path) as reader:
        page = reader.read()
    assert (page.rank, page.incarnation, page.pid) == (2, 7, os.getpid())
    assert (page.epoch, page.step, page.phase, page.granularity) == (3, 41, Phase.DECODE, Granularity.COLLECTIVE)
    assert (page.entered, page.completed) == ((1, 1, 0, 0), (1, 0, 0, 0))
    assert (page.entered_total, page.completed_total, page.collective) == (2, 1, Collective.COMBINE)
    assert page.phase_since_ns <= page.last_completed_ns <= page.last_entered_ns <= page.async_error_ns
    assert page.worked_ns > 0 and page.waited_ns > 0
    assert (page.timed, page.starved_ns) == (1, 0)
    assert (page.async_error, page.torn, page.process) == (6, False, ProcessState.RUNNING)


def test_a_new_epoch_counts_from_zero(writer: HeartbeatWriter) -> None:
    writer.begin_epoch(3)
    writer.enter(Collective.SYNC)  # failed: never completed
    writer.begin_epoch(4)
    writer.enter(Collective.SYNC)
    writer.complete(Collective.SYNC)
    with PageReader(writer.path) as reader:
        page = reader.read()
    assert (page.epoch, page.entered, page.completed, page.in_collective) == (4, (0, 0, 1, 0), (0, 0, 1, 0), False)


def test_fields_keep_their_documented_places(writer: HeartbeatWriter) -> None:
    writer.begin_epoch(3)
    writer.start_step(5, Phase.PREFILL)
    writer.enter(Collective.COMBINE)
    raw = writer.path.read_bytes()
    words = struct.unpack("@64Q", raw[:512])
    assert len(raw) == 4096
    assert raw[:8] == b"ELASTHB\n"
    assert words[1:5] == (1, 4096, 2, 7)
    assert words[5] == os.getpid()
    assert words[7:12] == (0, 6, 3, 5, 6)
    assert words[16:24] == (0, 1, 0, 0, 0, 0, 0, 0)
    assert not any(words[24:32]) and not any(words[34:])
    writer.complete(Collective.COMBINE)
    writer.add_times(0, 0, 5, 7)
    words = struct.unpack("@64Q", writer.path.read_bytes()[:512])
    assert words[24] and words[25] and words[26:28] == (8, 5)
    assert not any(words[28:32])


@pytest.mark.parametrize("granularity", [Granularity.STEP, Granularity.DEVICE])
def test_a_host_does_not_time_what_its_device_waits_for(tmp_path: Path, granularity: Granularity) -> None:
    writer = HeartbeatWriter(tmp_path, 2, 7, lambda page: granularity)
    writer.begin_epoch(3)
    writer.enter(Collective.SYNC)
    writer.complete(Collective.SYNC)
    with PageReader(writer.path) as reader:
        page = reader.read()
    assert page.completed == (0, 0, 1, 0)
    assert (page.worked_ns, page.waited_ns, page.starved_ns, page.timed) == (0, 0, 0, 0)


@given(st.lists(st.tuples(*4 * [st.integers(0, 2**62)]), min_size=1, max_size=5))
def test_times_of_a_device_add_up_and_start_anew(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, int, int]]
) -> None:
    writer = HeartbeatWriter(tmp_path_factory.mktemp("pages"), 0, 1, lambda page: Granularity.DEVICE)
    for times in steps:
        writer.add_times(*times)
    with PageReader(writer.path) as reader:
        page = reader.read()
        assert not page.torn
        sums = tuple(sum(one) & WORD_MASK for one in zip(*steps, strict=True))
        assert (page.worked_ns, page.waited_ns, page.starved_ns, page.timed) == sums
        writer.begin_epoch(2)
        page = reader.read()
    assert (page.worked_ns, page.waited_ns, page.starved_ns, page.timed) == (0, 0, 0, 0)


def test_the_page_is_private_and_named_by_incarnation(writer: HeartbeatWriter, tmp_path: Path) -> None:
    assert writer.path == page_path(tmp_path, 7) == tmp_path / "heartbeats" / "rank-7.page"
    assert writer.path.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in writer.path.parent.iterdir()] == ["rank-7.page"]


def test_a_page_outlives_its_writer(writer: HeartbeatWriter) -> None:
    writer.close()
    with PageReader(writer.path) as reader:
        assert reader.read().phase is Phase.STOPPED


def test_an_unfinished_update_is_torn_and_keeps_the_last_good_values(writer: HeartbeatWriter) -> None:
    writer.begin_epoch(3)
    with PageReader(writer.path) as reader:
        good = reader.read()
        set_word(writer.path, layout.SEQUENCE, good.sequence + 1)
        set_word(writer.path, layout.EPOCH, 99)
        torn = reader.read()
        assert (torn.torn, torn.epoch, torn.sequence) == (True, 3, good.sequence + 1)
        writer.beat()  # the writer lives on: its next update mends the page
        assert not reader.read().torn
    set_word(writer.path, layout.SEQUENCE, good.sequence + 3)
    with PageReader(writer.path) as reader:
        first = reader.read()
    assert (first.torn, first.epoch) == (True, 99)


def test_an_exception_in_the_middle_of_an_update_is_mended_by_the_next(writer: HeartbeatWriter) -> None:
    with pytest.raises(IndexError):
        writer.enter(99)
    with PageReader(writer.path) as reader:
        assert reader.read().torn
        writer.enter(Collective.SYNC)
        page = reader.read()
    assert (page.torn, page.entered) == (False, (0, 0, 1, 0))


def test_a_phase_that_changes_inside_a_collective_is_no_error(writer: HeartbeatWriter) -> None:
    writer.begin_epoch(3)
    writer.enter(Collective.DISPATCH)
    writer.set_phase(Phase.COMPILING)
    writer.complete(Collective.DISPATCH)
    writer.complete(Collective.DISPATCH)


@given(st.binary(max_size=5000))
def test_what_is_no_page_is_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("pages") / "rank-1.page"
    path.write_bytes(content)
    with pytest.raises(PageInvalid, match=r"rank-1\.page"):
        PageReader(path)


@given(words=st.dictionaries(st.integers(0, 63), st.integers(0, WORD_MASK), min_size=1, max_size=6))
def test_damage_is_an_error_of_ours_or_a_snapshot(
    tmp_path_factory: pytest.TempPathFactory, words: dict[int, int]
) -> None:
    writer = HeartbeatWriter(tmp_path_factory.mktemp("pages"), 0, 1)
    with PageReader(writer.path) as reader:
        for index, value in words.items():
            set_word(writer.path, index, value)
        try:
            page = reader.read()
        except PageCorrupt:
            return
        assert page.torn == bool(words.get(layout.SEQUENCE, 0) & 1)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda path: set_word(path, 1, 2), PageVersionMismatch),
        (lambda path: set_word(path, 0, 1), PageInvalid),
        (lambda path: set_word(path, layout.GRANULARITY, 9), PageCorrupt),
        (lambda path: os.truncate(path, 100), PageInvalid),
        (lambda path: path.unlink(), PageMissing),
        (lambda path: (path.unlink(), path.mkdir()), PageInvalid),
        (lambda path: (path.unlink(), os.mkfifo(path)), PageInvalid),
        (lambda path: (path.rename(path.with_suffix(".x")), path.symlink_to(path.with_suffix(".x"))), PageInvalid),
    ],
)
def test_errors_say_which_file(
    writer: HeartbeatWriter, spoil: Callable[[Path], object], error: type[Exception]
) -> None:
    spoil(writer.path)
    with pytest.raises(error, match=r"rank-7\.page"):
        PageReader(writer.path)


def test_a_page_that_is_cut_short_while_it_is_read(writer: HeartbeatWriter) -> None:
    with PageReader(writer.path) as reader:
        os.truncate(writer.path, 256)
        with pytest.raises(PageInvalid, match="cut short"):
            reader.read()


def test_a_page_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").write_text("in the way")
    with pytest.raises(PageNotCreated, match=r"rank-7\.page"):
        HeartbeatWriter(tmp_path, 2, 7)


def test_pages_come_go_and_are_replaced(tmp_path: Path) -> None:
    pages = PageDirectory(tmp_path)
    assert pages.read() == ([], [])
    HeartbeatWriter(tmp_path, 1, 11)
    first = HeartbeatWriter(tmp_path, 0, 10)
    (tmp_path / "heartbeats" / "rank-12.page").write_bytes(b"junk")
    snapshots, errors = pages.read()
    assert [(page.rank, page.incarnation) for page in snapshots] == [(0, 10), (1, 11)]
    assert [type(error) for error in errors] == [PageInvalid]
    HeartbeatWriter(tmp_path, 3, 10)
    (tmp_path / "heartbeats" / "rank-11.page").unlink()
    (tmp_path / "heartbeats" / "rank-12.page").unlink()
    snapshots, errors = pages.read()
    assert [(page.rank, page.incarnation) for page in snapshots] == [(3, 10)]
    assert errors == []
    first.close()
    pages.close()


def test_a_pid_that_was_used_again_is_another_process(writer: HeartbeatWriter) -> None:
    set_word(writer.path, layout.PID_START, 1)
    with PageReader(writer.path) as reader:
        assert reader.read().process is ProcessState.GONE


@given(st.integers(0, WORD_MASK), st.integers(-(2**40), 2**40))
def test_counters_compare_across_the_wrap(counter: int, distance: int) -> None:
    assert ahead((counter + distance) & WORD_MASK, counter) == distance
