"""Ranks leave in order. Pure.

A *departure* takes members out of the group without a client noticing: their requests move to the others, then the
experts that only they hold, then all end their step, and the group closes up around them.
"""

from __future__ import annotations

from collections.abc import Iterable

from elastic_daemon import protocol as p
from elastic_daemon.control.capacity_control import CapacityControl
from elastic_daemon.control.control_state import STEPPING, Phase
from elastic_daemon.control.deadlines import Wait
from elastic_daemon.control.departure import Departure, Step
from elastic_daemon.control.respreading import Purpose
from elastic_daemon.control.verdicts import Decision, Measure
from elastic_daemon.membership import IN_GROUP, Rank, RankState
from elastic_daemon.placement import evacuate


class DepartureControl(CapacityControl):
    def _depart(self, rows: Iterable[Rank], departure: Departure, deadline: float | None) -> None:
        """Begin a departure. No other may be under way. `deadline`: None where an operation sees to it."""
        for row in rows:
            self._ranks.move(row.rank, RankState.DRAINING, self._now, departure.cause)
            self._record("rank_draining", rank=row.rank, incarnation=row.incarnation, reason=departure.cause)
        self._departure = departure
        if deadline is not None:
            self._deadlines.arm(Wait.DEPARTURE, deadline)
        if self._phase is Phase.SERVING:
            self._publish()

    @property
    def _departing(self) -> tuple[Rank, ...]:
        departure = self._departure
        ranks = departure.ranks if departure is not None else frozenset()
        return tuple(row for row in self._ranks.where(RankState.DRAINING) if row.identity in ranks)

    def _on_moved(self, event: p.FrontendMoved) -> None:
        incarnations = {row.incarnation for row in self._departing}
        if self._departure is not None and event.epoch == self.epoch and incarnations <= set(event.draining):
            self._departure.moved = True

    def _advance_departure(self) -> None:
        departure, rows = self._departure, self._departing
        if departure is None:
            return
        if not rows:  # left, or lost on the way
            self._departure = None
            return self._deadlines.disarm(Wait.DEPARTURE)
        if self._phase not in (Phase.SERVING, Phase.UNAVAILABLE):
            return
        if not self._holds_all(len(self._ranks.members) - len(rows)):
            return self._stay()
        if departure.step is Step.REQUESTS and departure.moved:
            departure.step = Step.EXPERTS
            self._evacuate(rows)
        if departure.step is Step.EXPERTS and self._spread is None:
            departure.step = Step.LEAVING
        if departure.overdue or (departure.step is Step.LEAVING and self._phase is Phase.UNAVAILABLE):
            self._leave(departure, rows)
        elif departure.step is Step.LEAVING:
            self._quiesce()

    def _change_group(self) -> None:
        """What the members were asked to stop for, now that they have, or had the time to. It may be off meanwhile."""
        self._phase = Phase.SERVING
        departure, rows = self._departure, self._departing
        if departure is not None and rows and self._holds_all(len(self._ranks.members) - len(rows)):
            self._leave(departure, rows)
        elif self._can_grow:
            self._enlist()
        else:
            self._open_recovery("the change that ranks stopped for is off")
            self._new_epoch()

    def _on_quiesced(self, event: p.RankQuiesced) -> None:
        if self._phase is not Phase.QUIESCING:
            return
        self._deadlines.disarm(Wait.QUIESCE, event.rank)
        if not self._deadlines.of(Wait.QUIESCE):
            self._change_group()

    def _quiesce_overdue(self, ranks: tuple[int, ...]) -> None:
        """The fence frees whoever is stuck, at the price of a step."""
        self._deadlines.clear(Wait.QUIESCE)
        if self._phase is Phase.QUIESCING:
            self._record("quiesce_overdue", epoch=self.epoch, ranks=ranks)
            self._change_group()

    def _evacuate(self, rows: tuple[Rank, ...]) -> None:
        assert self._placement is not None
        if self._spread is not None:  # in favour of this one; whoever still works on it finds out by the serial
            self._spread = None
        plan = evacuate(self._placement, [row.rank for row in rows])
        if plan.loads:
            self._begin_spread(plan.placement, Purpose.EVACUATION, len(plan.loads))

    def _leave(self, departure: Departure, rows: tuple[Rank, ...]) -> None:
        """The group closes up around them."""
        self._departure = None
        self._deadlines.disarm(Wait.DEPARTURE)
        self._fault_run.lost_member()
        recovery = self._open_recovery(departure.cause, departure.verdict.at if departure.verdict else None)
        recovery.lose((row.identity for row in rows), departure.cause)
        for row in rows:
            self._ranks.move(row.rank, departure.after, self._now, departure.cause)
            self._record("rank_left", rank=row.rank, incarnation=row.incarnation, reason=departure.cause)
            self._emit(p.KillRank(row.rank, row.incarnation, departure.cause, doubtful=False))
            if departure.after is RankState.RETIRED:
                self._gpus.forget(row.rank)
        self._new_epoch()

    def _stay(self) -> None:
        """The departure is off: they serve on."""
        departure, rows = self._departure, self._departing
        assert departure is not None
        for row in rows:
            self._ranks.move(row.rank, RankState.ACTIVE, self._now)
            self._record("rank_stays", rank=row.rank, incarnation=row.incarnation)
        if departure.verdict is not None:
            why = self._too_few(len(rows))
            self._hear(departure.verdict, Decision(Measure.REFUSE, why))
            self._tell_refusal(departure.verdict, rows, why)
        self._departure = None
        self._deadlines.disarm(Wait.DEPARTURE)
        self._spread_due = self._spreads  # some of what they held may have moved
        self._publish()

    def _hear(self, verdict: p.TelemetryVerdict, decision: Decision) -> None:
        """A verdict that is not acted on is shown until the watchdog takes it back."""
        self._doubts.hear(verdict, decision, self.epoch if self._phase in STEPPING else None)
        self._show_doubts()

    def _tell_refusal(self, verdict: p.TelemetryVerdict, rows: Iterable[Rank], why: str) -> None:
        ranks, told = [row.rank for row in rows], verdict.verdict.value
        self._record("verdict_refused", ranks=ranks, verdict=told, reason=verdict.reason, why=why)

    def _departure_overdue(self) -> None:
        assert self._departure is not None
        self._departure.overdue = True

    def _drain_for_verdict(self, event: p.TelemetryVerdict, rows: Iterable[Rank]) -> None:
        """A GPU is going bad: what still works on it moves away first."""
        members = [row for row in rows if row.state in IN_GROUP]
        if others := {row.rank: event.reason for row in rows if row.state not in IN_GROUP}:
            self._lose(others, kill=True, for_good=True)
        ranks = frozenset(row.identity for row in members)
        departure = Departure(ranks, event.reason, RankState.EXCLUDED, forced=True, verdict=event)
        self._depart(members, departure, self._now + self._policy.drain_timeout_s)

    def _too_few(self, leaving: int) -> str:
        needed = self._policy.min_ranks
        return f"{needed} ranks are needed to hold every expert, and {len(self._ranks.members) - leaving} would be left"
