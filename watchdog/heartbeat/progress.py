"""For how long each page has not changed, in time that the reader was there to see.

No age is computed from a time that a rank wrote: clocks of other processes (and of other time namespaces) are evidence
only. Ages are sums of the gaps between the reader's own observations, each counted up to a maximum. So a reader that
was stalled, or whose clock jumped, learns nothing about the ranks in that time, and an age is never longer than the
real silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from watchdog.heartbeat.intervals import SilenceLimits
from watchdog.heartbeat.layout import Collective, Granularity, ProcessState, Snapshot


@dataclass(slots=True)
class Track:
    """One incarnation as the reader has seen it.

    `silent_s`: since anything on its page changed. `stuck_s`: since it last advanced (epoch, step, phase or a counter).
    `halted_s`: for how long its process was seen stopped or stuck in the kernel. `disturbed`: in its present silence
    somebody hung, was stopped or died.
    """

    page: Snapshot
    silent_s: float = 0.0
    stuck_s: float = 0.0
    halted_s: float = 0.0
    seen_alive: bool = False
    disturbed: bool = False

    @property
    def halted(self) -> bool:
        return self.page.process in (ProcessState.STOPPED, ProcessState.UNINTERRUPTIBLE)


class ReaderClock:
    """The reader's own time: how much of a gap between two observations counts."""

    def __init__(self, longest_gap_s: float) -> None:
        self._longest_gap_s = longest_gap_s
        self._last_s: float | None = None
        self.stalled = False

    def credit_s(self, now_s: float) -> float:
        """Time that passed under observation. Sets `stalled` when more passed than one gap may last."""
        gap = 0.0 if self._last_s is None else now_s - self._last_s
        self._last_s = now_s
        self.stalled = gap > self._longest_gap_s
        return min(max(gap, 0.0), self._longest_gap_s)


class Progress:
    """Tracks of all ranks; of each rank, its newest incarnation only."""

    def __init__(self, limits: SilenceLimits) -> None:
        self._limits = limits
        self._tracks: dict[int, Track] = {}
        self.looked_up: set[Collective] = set()
        """Kinds of collectives in which some rank was seen to beat while it waited."""

    def update(self, snapshots: Sequence[Snapshot], credit_s: float, reader_stalled: bool) -> list[Track]:
        """Take in one observation. Ranks without a page are forgotten. Returns the tracks by rank."""
        newest: dict[int, Snapshot] = {}
        for page in snapshots:
            if page.rank not in newest or page.incarnation > newest[page.rank].incarnation:
                newest[page.rank] = page
        self._tracks = {
            rank: self._advance(self._tracks.get(rank), newest[rank], credit_s, reader_stalled)
            for rank in sorted(newest)
        }
        tracks = list(self._tracks.values())
        if any(track.page.process is ProcessState.STOPPED for track in tracks):
            self.disturb()
        return tracks

    def disturb(self) -> None:
        """A rank is in trouble. The silence that all are in now is no habit of theirs: some do not run, the others wait
        for them. Nothing is learnt from it, or each hang would make the next one harder to see."""
        for track in self._tracks.values():
            track.disturbed = True

    def _advance(self, track: Track | None, page: Snapshot, credit_s: float, reader_stalled: bool) -> Track:
        if track is None or track.page.incarnation != page.incarnation:
            track = Track(page)
        before, track.page = track.page, page
        track.seen_alive |= page.process is not ProcessState.GONE
        track.halted_s = track.halted_s + credit_s if track.halted else 0.0
        if _signs_of_life(before) == _signs_of_life(page):
            track.silent_s += credit_s
            track.stuck_s += credit_s
            return track
        if not reader_stalled and not track.disturbed and _tells_of_the_rank(before, page):
            self._limits.learn(before.phase, track.silent_s + credit_s)
        track.silent_s = 0.0
        track.disturbed = False
        same_position = _position(before) == _position(page)
        if same_position and not before.torn and not page.torn and (collective := page.waited_for) is not None:
            self.looked_up.add(collective)
        track.stuck_s = track.stuck_s + credit_s if same_position else 0.0
        return track


def _tells_of_the_rank(before: Snapshot, page: Snapshot) -> bool:
    """Whether the interval between two changes is the rank's own: one spent waiting inside a collective is not."""
    if before.phase is not page.phase or before.epoch != page.epoch:
        return False
    return not before.in_collective or before.granularity is Granularity.STEP


def _signs_of_life(page: Snapshot) -> tuple[object, ...]:
    # A device advances the counters without touching the sequence.
    return (page.sequence, page.entered, page.completed)


def _position(page: Snapshot) -> tuple[object, ...]:
    return (page.epoch, page.step, page.phase, page.entered, page.completed)
