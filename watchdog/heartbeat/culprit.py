"""Who is to blame when the group stands still: findings from the pages of all ranks.

Ranks of one epoch take part in the same collectives in the same order, so their counters are positions on one line.
The rules, in terms of a rank that has not advanced for its limit (`intervals`):

- its process is gone: dead.
- it has entered fewer collectives than peers who wait in one, and is in none itself: hung. Whatever it does, it is not
  waiting for anybody. An idle rank counts only if its main loop does not turn either: one whose loop turns was not
  told to join, and is not broken.
- it is inside a collective, as are others: they wait for each other, and counters alone do not tell who stopped. Hung
  is one that the kernel says is stopped; or is silent although ranks look up from waits in this kind of collective;
  or, where nobody looks up, the only one that all others have left behind.
- it is idle and its main loop does not turn, while those of others do: hung.
- else, if the group stands still: the one whose process NCCL's RAS does not hear, if it is one alone; else nobody.

Ranks of older epochs, and those that load, are parked or regroup, are compared with nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from watchdog.heartbeat.findings import Finding, FindingKind, Reason
from watchdog.heartbeat.intervals import IntervalPolicy, SilenceLimits
from watchdog.heartbeat.layout import Collective, Phase, ProcessState, Snapshot, ahead
from watchdog.heartbeat.nccl import WITNESS_CODES
from watchdog.heartbeat.progress import Progress, ReaderClock, Track
from watchdog.heartbeat.straggler import StragglerPolicy, StragglerWatch


@dataclass(frozen=True, slots=True)
class JudgePolicy:
    """`period_s`: how often the reader means to observe. A gap counts for at most three times that."""

    period_s: float = 0.1
    intervals: IntervalPolicy = field(default_factory=IntervalPolicy)
    straggler: StragglerPolicy = field(default_factory=StragglerPolicy)


class HeartbeatJudge:
    """Turns observations into findings. Deterministic, without I/O: the same observations give the same findings."""

    def __init__(self, policy: JudgePolicy | None = None) -> None:
        self._policy = policy or JudgePolicy()
        self._clock = ReaderClock(3 * self._policy.period_s)
        self._limits = SilenceLimits(self._policy.intervals)
        self._progress = Progress(self._limits)
        self._stragglers = StragglerWatch(self._policy.straggler)
        self._unheard: frozenset[int] = frozenset()
        """Pids of processes that NCCL's RAS does not hear."""
        self._witnesses: frozenset[int] = frozenset()
        """Members whose NCCL says that something is wrong with a peer. Nobody while one is dead: that explains it."""

    def observe(
        self,
        now_s: float,
        snapshots: Sequence[Snapshot],
        epoch: int | None = None,
        unheard: frozenset[int] = frozenset(),
        shared: bool = False,
    ) -> list[Finding]:
        """Findings that hold now.

        `now_s`: the reader's CLOCK_MONOTONIC, in seconds, when it took the snapshots. `snapshots`: all pages; leave
        out ranks that are known to be no members any more. `epoch`: the current one, if known; else the newest that
        a living rank is in. `unheard`: pids that NCCL's RAS has just missed. `shared`: some ranks are on one device.
        """
        self._unheard = unheard
        credit_s = self._clock.credit_s(now_s)
        tracks = self._progress.update(snapshots, credit_s, self._clock.stalled)
        dead = [track for track in tracks if track.page.process is ProcessState.GONE and _unexpected_end(track)]
        alive = [track for track in tracks if track.page.process is not ProcessState.GONE]
        serving = [track for track in alive if track.page.phase.serving]
        if epoch is None:
            epoch = max((track.page.epoch for track in serving), default=0)
        members = [track for track in serving if track.page.epoch == epoch]
        self._witnesses = frozenset(
            track.page.rank
            for track in members
            if track.page.async_error in WITNESS_CODES and not any(one.page.epoch == epoch for one in dead)
        )
        group = _Group(members, self._limits, self._progress.looked_up, self._policy.intervals.confirm_s)

        findings = [self._dead(track) for track in dead]
        findings += self._silent_in_slow_phase(track for track in alive if not track.page.phase.serving)
        hung = self._hung(group)
        findings += hung
        if not hung and not any(track.page.epoch == epoch for track in dead):
            findings += self._unheard_alone(group) or self._standstill(group, epoch)
        if any(finding.confirmed and finding.epoch == epoch for finding in findings):
            self._progress.disturb()
        slow = self._stragglers.observe([track.page for track in members], epoch, credit_s, shared)
        findings += self._slow(group, slow, {finding.rank for finding in hung})
        return findings

    def _dead(self, track: Track) -> Finding:
        return self._finding(FindingKind.DEAD, track, Reason.PROCESS_GONE, track.silent_s, 0.0, confirmed=True)

    def _silent_in_slow_phase(self, tracks: Iterable[Track]) -> list[Finding]:
        return [
            self._finding(FindingKind.HUNG, track, Reason.SILENT_SLOW_PHASE, track.silent_s, limit)
            for track in tracks
            if track.silent_s >= (limit := self._limits.limit_s(track.page.phase))
        ]

    def _hung(self, group: _Group) -> list[Finding]:
        found = []
        for track in group.tracks:
            if blame := group.blame(track):
                reason, seconds = blame
                found.append(self._finding(FindingKind.HUNG, track, reason, seconds, group.limit_s(track)))
        return found

    def _unheard_alone(self, group: _Group) -> list[Finding]:
        stands = group.standstill()
        unheard = [track for track in group.tracks if track.page.pid in self._unheard]
        if stands is None or len(unheard) != 1:
            return []
        _, seconds, limit = stands
        return [self._finding(FindingKind.HUNG, unheard[0], Reason.UNHEARD, seconds, limit, confirmed=True)]

    def _standstill(self, group: _Group, epoch: int) -> list[Finding]:
        stands = group.standstill()
        if stands is None:
            return []
        reason, seconds, limit = stands
        evidence = {
            "entered": {track.page.rank: track.page.entered_total for track in group.tracks},
            "completed": {track.page.rank: track.page.completed_total for track in group.tracks},
            "phases": {track.page.rank: track.page.phase.name.lower() for track in group.tracks},
            "async_errors": {track.page.rank: track.page.async_error for track in group.tracks},
        }
        confirmed = seconds >= limit + self._policy.intervals.confirm_s
        return [Finding(FindingKind.NOBODY, None, None, epoch, confirmed, reason, seconds, limit, evidence=evidence)]

    def _slow(self, group: _Group, slow: Mapping[int, float], hung: set[int | None]) -> list[Finding]:
        return [
            self._finding(FindingKind.STRAGGLER, track, Reason.SLOW, 0.0, 0.0, False, slow[track.page.rank])
            for track in group.tracks
            if track.page.rank in slow and track.page.rank not in hung
        ]

    def _finding(
        self,
        kind: FindingKind,
        track: Track,
        reason: Reason,
        seconds: float,
        limit_s: float,
        confirmed: bool | None = None,
        slowdown: float | None = None,
    ) -> Finding:
        page = track.page
        if confirmed is None:
            witnesses = self._witnesses - {page.rank} if page.phase.serving else frozenset()
            halted = track.halted and track.halted_s >= limit_s
            second_source = bool(witnesses) or halted or page.pid in self._unheard
            confirmed = second_source or seconds >= limit_s + self._policy.intervals.confirm_s
        collective = page.collective
        evidence: dict[str, object] = {
            "phase": page.phase.name.lower(),
            "process": page.process.value,
            "step": page.step,
            "entered": page.entered_total,
            "completed": page.completed_total,
            "collective": collective.name.lower() if collective is not None else None,
            "silent_s": round(track.silent_s, 3),
            "stuck_s": round(track.stuck_s, 3),
            "phi": self._limits.phi(page.phase, seconds),
            "async_error": page.async_error,
            "nccl_witnesses": sorted(self._witnesses - {page.rank}),
            "nccl_unheard": page.pid in self._unheard,
            "torn": page.torn,
        }
        return Finding(
            kind, page.rank, page.incarnation, page.epoch, confirmed, reason, seconds, limit_s, slowdown, evidence
        )


def _unexpected_end(track: Track) -> bool:
    """A page whose process was never seen alive is what an earlier life has left."""
    return track.seen_alive and track.page.phase is not Phase.STOPPED


class _Group:
    """The working members of one epoch, at one observation."""

    def __init__(
        self, tracks: list[Track], limits: SilenceLimits, looked_up: Set[Collective], confirm_s: float
    ) -> None:
        """`looked_up`: kinds of collectives that ranks look up from while they wait."""
        self.tracks = tracks
        self._limits = limits
        self._looked_up = looked_up
        self._confirm_s = confirm_s
        self._waiting = [track for track in tracks if track.page.in_collective]

    def limit_s(self, track: Track) -> float:
        return self._limits.limit_s(track.page.phase)

    def behind_s(self, track: Track) -> float:
        """For how long peers ahead of this rank have waited in a collective while it did not advance; 0: they do not.

        Its own standstill alone says nothing: an idle rank does not advance for hours.
        """
        longest = max((peer.stuck_s for peer in self._waiting if _is_ahead(peer, track)), default=0.0)
        return min(longest, track.stuck_s)

    def blame(self, track: Track) -> tuple[Reason, float] | None:
        """Why this rank is hung, and for how long it has been."""
        limit = self.limit_s(track)
        if track.page.process is ProcessState.STOPPED and min(track.halted_s, track.silent_s) >= limit:
            return self._stopped_reason(track), track.silent_s
        if track.page.in_collective:
            return self._blame_inside(track, limit)
        if track.page.phase is Phase.IDLE:
            return self._blame_idle(track, limit)
        behind = self.behind_s(track)
        return (Reason.BEHIND, behind) if behind >= limit else None

    def standstill(self) -> tuple[Reason, float, float] | None:
        """Why the group stands still, for how long, and the limit that this passed; None while it need not."""
        limit = max((self.limit_s(track) for track in self.tracks), default=0.0) + self._confirm_s
        if not self._waiting:
            silent = min((track.silent_s for track in self.tracks), default=0.0)
            return (Reason.ALL_SILENT, silent, limit) if len(self.tracks) > 1 and silent >= limit else None
        stuck = max(track.stuck_s for track in self._waiting)
        if stuck < limit:
            return None
        outside = [track for track in self.tracks if not track.page.in_collective]
        if any(track.page.phase is not Phase.IDLE for track in outside):
            return None  # it computes, within its limit, and others wait for it
        if outside:
            reason = Reason.NOT_JOINED
        elif len({track.page.entered_total for track in self.tracks}) == 1:
            reason = Reason.ALL_AT_ONE_POINT
        else:
            reason = Reason.UNTOLD
        return reason, stuck, limit

    def _blame_inside(self, track: Track, limit: float) -> tuple[Reason, float] | None:
        if track.silent_s < limit:
            return None
        others = [peer for peer in self.tracks if peer is not track]
        should_look_up = track.page.collective in self._looked_up
        stuck_in_kernel = track.halted_s >= limit and not all(peer.halted for peer in others)
        if (should_look_up or stuck_in_kernel) and self._turning(others):
            return Reason.SILENT_IN_COLLECTIVE, track.silent_s
        left_behind = bool(others) and all(peer.page.in_collective and _is_ahead(peer, track) for peer in others)
        if left_behind and self.behind_s(track) >= limit:
            return Reason.SILENT_IN_COLLECTIVE, self.behind_s(track)
        return None

    def _blame_idle(self, track: Track, limit: float) -> tuple[Reason, float] | None:
        if track.silent_s < limit:
            return None
        if self.behind_s(track) >= limit:
            return Reason.BEHIND, track.silent_s
        turning = self._turning(peer for peer in self.tracks if peer is not track)
        return (Reason.SILENT_IDLE, track.silent_s) if turning else None

    def _turning(self, tracks: Iterable[Track]) -> bool:
        """Somebody shows signs of life, so that it is not the whole machine that stands still."""
        return any(track.silent_s < self.limit_s(track) for track in tracks)

    def _stopped_reason(self, track: Track) -> Reason:
        if track.page.in_collective:
            return Reason.SILENT_IN_COLLECTIVE
        if self.behind_s(track) > 0.0:
            return Reason.BEHIND
        return Reason.SILENT_IDLE if track.page.phase is Phase.IDLE else Reason.STOPPED


def _is_ahead(peer: Track, track: Track) -> bool:
    return ahead(peer.page.entered_total, track.page.entered_total) > 0
