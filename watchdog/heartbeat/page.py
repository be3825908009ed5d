"""The writing side of a heartbeat page: what a rank does at each turn, step and collective.

The page is a file that is mapped into the rank's memory. A write is a store to memory: no system call, and what was
written stays readable when the process is killed, at whatever instruction. `layout` has the fields.

An update makes the sequence odd, stores its fields and makes the sequence even again (a sequence lock: Boehm, "Can
Seqlocks Get Along With Programming Language Memory Models?", MSPC 2012). Python has no memory fences, so on a weakly
ordered processor a reader does not trust an even sequence alone; see `reader`.

All methods but `report_async_error` belong to one thread, the one that starts the collectives: a beat from a helper
thread would prove nothing about it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from time import monotonic_ns

from watchdog.heartbeat import layout
from watchdog.heartbeat.errors import PageNotCreated
from watchdog.heartbeat.layout import (
    COMPLETED,
    DIRECTORY_NAME,
    ENTERED,
    LAST_BEAT,
    LAST_COMPLETED,
    LAST_ENTERED,
    PAGE_BYTES,
    PHASE,
    PHASE_SINCE,
    SEQUENCE,
    STARVED,
    STEP,
    TIMED,
    WAITED,
    WORD_MASK,
    WORKED,
    Collective,
    Granularity,
    Phase,
)
from watchdog.heartbeat.process import start_time


def page_path(runtime_dir: Path, incarnation: int) -> Path:
    """Where the page of an incarnation lies. Incarnations are unique in the life of a daemon, so pages are too."""
    return runtime_dir / DIRECTORY_NAME / f"rank-{incarnation}.page"


class HeartbeatWriter:
    """The page of this process. Create it in the rank's own process, after any fork.

    In a step: `start_step`, then `enter` and `complete` around each collective. When idle: `beat` at each turn of the
    main loop, at least five times a second. While waiting for a collective in slices: `beat` after each slice.
    """

    __slots__ = (
        "_completed",
        "_entered",
        "_entered_at",
        "_file",
        "_mark",
        "_sequence",
        "_timed",
        "_times_itself",
        "_waited",
        "_words",
        "_worked",
        "granularity",
        "path",
    )

    def __init__(
        self,
        runtime_dir: Path,
        rank: int,
        incarnation: int,
        prepare: Callable[[mmap.mmap], Granularity] = lambda page: Granularity.COLLECTIVE,
    ) -> None:
        """Make the page, in phase STARTING and epoch 0. It replaces a page that another daemon's life left there.

        `prepare`: called with the mapped page before any reader sees it; says what will be counted. A device that it
        maps the page for writes the counters itself, in stream order (words 16 to 23 but for those of SYNC).

        Raises PageNotCreated.
        """
        self.path = page_path(runtime_dir, incarnation)
        try:
            self._file, self.granularity = _create(self.path, rank, incarnation, prepare)
        except OSError as error:
            raise PageNotCreated(f"heartbeat page {self.path}: {error.strerror}") from error
        self._words = memoryview(self._file).cast("Q")
        self._sequence = 0
        self._times_itself = self.granularity is Granularity.COLLECTIVE
        self._worked = self._waited = self._timed = 0
        self._reset_counters()
        self._mark = self._entered_at = monotonic_ns()

    def begin_epoch(self, epoch: int, phase: Phase = Phase.IDLE) -> None:
        """Become a member of a group: counters, step and times of work start anew."""
        words = self._words
        now = monotonic_ns()
        words[SEQUENCE] = self._sequence + 1
        self._reset_counters()
        for kind in Collective:
            words[ENTERED + kind] = words[COMPLETED + kind] = 0
        words[WORKED] = words[WAITED] = words[TIMED] = words[STARVED] = words[STEP] = 0
        words[layout.EPOCH] = epoch
        words[PHASE] = phase
        words[PHASE_SINCE] = words[LAST_BEAT] = now
        self._end_update()
        self._mark = now

    def set_phase(self, phase: Phase) -> None:
        """The main thread goes over to something else. Also a beat."""
        words = self._words
        now = monotonic_ns()
        words[SEQUENCE] = self._sequence + 1
        words[PHASE] = phase
        words[PHASE_SINCE] = words[LAST_BEAT] = now
        self._end_update()
        self._mark = now

    def beat(self) -> None:
        """The main thread has come by: a turn of its loop, or a look up from a wait inside a collective."""
        words = self._words
        words[SEQUENCE] = self._sequence + 1
        words[LAST_BEAT] = monotonic_ns()
        words[SEQUENCE] = self._sequence = self._sequence + 2

    def start_step(self, step: int, phase: Phase) -> None:
        """A step begins; `phase` is PREFILL or DECODE. Also a beat."""
        words = self._words
        now = monotonic_ns()
        words[SEQUENCE] = self._sequence + 1
        words[STEP] = step
        if words[PHASE] != phase:
            words[PHASE] = phase
            words[PHASE_SINCE] = now
        words[LAST_BEAT] = now
        words[SEQUENCE] = self._sequence = self._sequence + 2
        self._mark = now

    def enter(self, kind: int) -> None:
        """About to start a collective (a `Collective`)."""
        words = self._words
        sequence = self._sequence
        entered = self._entered
        now = monotonic_ns()
        words[SEQUENCE] = sequence + 1
        count = entered[kind] = entered[kind] + 1
        words[ENTERED + kind] = count
        words[LAST_ENTERED] = self._entered_at = now
        words[SEQUENCE] = self._sequence = sequence + 2

    def complete(self, kind: int) -> None:
        """The collective that was entered last is done. One that failed is never completed."""
        words = self._words
        sequence = self._sequence
        completed = self._completed
        entered_at = self._entered_at
        now = monotonic_ns()
        words[SEQUENCE] = sequence + 1
        count = completed[kind] = completed[kind] + 1
        words[COMPLETED + kind] = count
        words[LAST_COMPLETED] = now
        if self._times_itself:
            words[WAITED] = self._waited = self._waited + now - entered_at
            # Masked: negative if the phase changed inside the collective, and a heartbeat must never raise.
            words[WORKED] = self._worked = (self._worked + entered_at - self._mark) & WORD_MASK
            words[TIMED] = self._timed = self._timed + 1
        words[SEQUENCE] = self._sequence = sequence + 2
        self._mark = self._entered_at = now

    def add_times(self, worked: int, waited: int, starved: int, timed: int) -> None:
        """What a device has measured of a step by itself. Times in ns."""
        words = self._words
        words[SEQUENCE] = self._sequence + 1
        for word, more in ((WORKED, worked), (WAITED, waited), (STARVED, starved), (TIMED, timed)):
            words[word] = (words[word] + more) & WORD_MASK
        self._end_update()

    def report_async_error(self, code: int) -> None:
        """NCCL's asynchronous error of the group, 0 for none. From one thread of any kind; not part of an update."""
        self._words[layout.ASYNC_ERROR_AT] = monotonic_ns()
        self._words[layout.ASYNC_ERROR] = code

    def close(self) -> None:
        """Say that this rank ends on purpose, and unmap the page. The file stays until the supervisor removes it."""
        self.set_phase(Phase.STOPPED)
        self._words.release()
        with contextlib.suppress(BufferError):  # a device or a test may still hold it
            self._file.close()

    def _end_update(self) -> None:
        # The sequence is kept here and not read back: an update that an exception cut short is repaired by the next.
        self._words[SEQUENCE] = self._sequence = self._sequence + 2

    def _reset_counters(self) -> None:
        self._entered = [0] * len(Collective)
        self._completed = [0] * len(Collective)
        self._worked = self._waited = self._timed = 0


def _create(
    path: Path, rank: int, incarnation: int, prepare: Callable[[mmap.mmap], Granularity]
) -> tuple[mmap.mmap, Granularity]:
    """A new page under its final name, with its header in place: no reader ever sees half a header."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, PAGE_BYTES)  # a full file system is an error here, and no SIGBUS later
        page = mmap.mmap(fd, PAGE_BYTES)
        granularity = prepare(page)
        pid = os.getpid()
        header = (layout.MAGIC, layout.VERSION, PAGE_BYTES, rank, incarnation, pid, start_time(pid), granularity)
        now = monotonic_ns()
        with memoryview(page).cast("Q") as words:
            for index, value in enumerate(header):
                words[index] = value
            words[PHASE_SINCE] = words[LAST_BEAT] = now
        os.rename(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
    finally:
        os.close(fd)
    return page, granularity
