"""Layout of a heartbeat page, version 1, and what a reader makes of one.

A page is a file of 4096 bytes (one memory page, so that a GPU may map it too), of which 64 words are used. Every field
is one unsigned 64-bit word in the machine's byte order, aligned to 8 bytes. A word keeps its place within a version; a
reserved one may be put to use if its 0 then reads as "not known".

    word   bytes    field            written by
       0   0        magic            creator, before the file gets its name; never changes
       1   8        version          "
       2   16       size             "  bytes of the file
       3   24       rank             "
       4   32       incarnation      "
       5   40       pid              "
       6   48       pid start time   "  clock ticks after boot, field 22 of /proc/PID/stat
       7   56       granularity      "  0 per collective, 1 per step, 2 per collective by a device
       8   64       sequence         main thread: odd while an update is under way
       9   72       epoch            main thread
      10   80       step             "
      11   88       phase            "  see Phase
      12   96       phase since      "  CLOCK_MONOTONIC, ns
      13   104      last beat        "  CLOCK_MONOTONIC, ns; turns of the main loop and looks up from a wait
      14   112      last entered     "  CLOCK_MONOTONIC, ns
      15   120      last completed   "  CLOCK_MONOTONIC, ns
      16   128      entered          main thread or device: 4 counters (dispatch, combine, sync, step), one cache line
      20   160      completed        "  4 counters
      24   192      worked           main thread: ns outside collectives, within steps
      25   200      waited           "  ns inside collectives
      26   208      timed            "  collectives, or expert layers of a device, that `worked` is the sum of
      27   216      starved          "  ns of `worked` in which a device may have waited for its host
      28   224      reserved, 0
      32   256      async error      any one other thread: NCCL's code, 0 for none
      33   264      async error at   "  CLOCK_MONOTONIC, ns
      34   272      reserved, 0

Counters start at 0 in each epoch, since ranks of one epoch take part in the same collectives: only then they compare.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, StrEnum

MAGIC = int.from_bytes(b"ELASTHB\n", "little")
VERSION = 1
PAGE_BYTES = 4096
USED_BYTES = 512
HEADER_BYTES = 64
DIRECTORY_NAME = "heartbeats"

WORD_MASK = (1 << 64) - 1

RANK, INCARNATION, PID, PID_START, GRANULARITY = 3, 4, 5, 6, 7
SEQUENCE, EPOCH, STEP, PHASE, PHASE_SINCE = 8, 9, 10, 11, 12
LAST_BEAT, LAST_ENTERED, LAST_COMPLETED = 13, 14, 15
ENTERED, COMPLETED = 16, 20
WORKED, WAITED, TIMED, STARVED = 24, 25, 26, 27
ASYNC_ERROR, ASYNC_ERROR_AT = 32, 33

WORDS = struct.Struct("@64Q")


class Collective(IntEnum):
    """Kinds of collectives that are counted. STEP is for granularity per step: one around each step."""

    DISPATCH = 0
    COMBINE = 1
    SYNC = 2
    STEP = 3


class Granularity(IntEnum):
    """How finely the counters advance, and who writes them.

    DEVICE: per collective, in the order of the device's stream; times are the device's own, of some steps. STEP: the
    host, once per step of a device; its times compare with nobody's, since it waits for the device wherever it needs
    it.
    """

    COLLECTIVE = 0
    STEP = 1
    DEVICE = 2


class Phase(IntEnum):
    """What a rank's main thread is doing. The values are part of the layout."""

    STARTING = 0
    LOADING = 1
    COMPILING = 2
    PARKED = 3
    REGROUPING = 4
    IDLE = 5
    PREFILL = 6
    DECODE = 7
    STOPPED = 8

    @property
    def serving(self) -> bool:
        """Whether the rank is a working member of its epoch's group, so that its counters compare with its peers'."""
        return self in (Phase.IDLE, Phase.PREFILL, Phase.DECODE, Phase.COMPILING)


class ProcessState(StrEnum):
    """What the kernel says about the main thread of a page's owner."""

    RUNNING = "running"
    STOPPED = "stopped"
    """By SIGSTOP or a debugger (state T or t)."""
    UNINTERRUPTIBLE = "uninterruptible"
    """State D: in the kernel, often in a driver, where not even SIGKILL reaches it."""
    GONE = "gone"
    """No such process, a zombie, or its pid now belongs to a process that started at another time."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One consistent reading of a page. All `_ns` are CLOCK_MONOTONIC as the writer saw it, or durations.

    `torn`: an update was under way at each attempt, or its writer ended in the middle of one. The values are then those
    of the last consistent reading (single words, if there was none); `sequence` is always what the page says now.
    """

    rank: int
    incarnation: int
    pid: int
    pid_start: int = 0
    granularity: Granularity = Granularity.COLLECTIVE
    sequence: int = 0
    epoch: int = 0
    step: int = 0
    phase: Phase = Phase.STARTING
    phase_since_ns: int = 0
    last_beat_ns: int = 0
    last_entered_ns: int = 0
    last_completed_ns: int = 0
    entered: tuple[int, int, int, int] = (0, 0, 0, 0)
    completed: tuple[int, int, int, int] = (0, 0, 0, 0)
    worked_ns: int = 0
    waited_ns: int = 0
    timed: int = 0
    starved_ns: int = 0
    async_error: int = 0
    async_error_ns: int = 0
    torn: bool = False
    process: ProcessState = ProcessState.RUNNING

    @property
    def entered_total(self) -> int:
        return sum(self.entered) & WORD_MASK

    @property
    def completed_total(self) -> int:
        return sum(self.completed) & WORD_MASK

    @property
    def in_collective(self) -> bool:
        return self.entered_total != self.completed_total

    @property
    def collective(self) -> Collective | None:
        """The collective that the rank is in."""
        return next((kind for kind in Collective if self.entered[kind] != self.completed[kind]), None)

    @property
    def waited_for(self) -> Collective | None:
        """The collective that the main thread is in: the hosts sync while the device is inside another one."""
        syncing = self.entered[Collective.SYNC] != self.completed[Collective.SYNC]
        return Collective.SYNC if syncing else self.collective


def ahead(one: int, other: int) -> int:
    """How far counter `one` is ahead of `other`, negative if behind. Counters wrap around at 2**64."""
    distance = (one - other) & WORD_MASK
    return distance - (1 << 64) if distance >> 63 else distance
