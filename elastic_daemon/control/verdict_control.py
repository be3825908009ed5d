"""What the watchdog says is acted on, and what was refused is tried again when nothing stands against it. Pure."""

from __future__ import annotations

from dataclasses import replace

from elastic_daemon import protocol as p
from elastic_daemon.control.control_state import STEPPING, Phase
from elastic_daemon.control.deadlines import Wait
from elastic_daemon.control.departure_control import DepartureControl
from elastic_daemon.control.verdicts import Decision, Measure, Situation, decide
from elastic_daemon.membership import MEMBERS, Rank


class VerdictControl(DepartureControl):
    def _on_verdict(self, event: p.TelemetryVerdict) -> None:
        rows = self._concerned(event)
        decision = decide(event, self._situation(rows), self._policy)
        self._hear(event, decision)
        if event.about_gpu and event.act:
            self._gpus.condemn(event.subject, event.reason)
        self._carry_out(decision, event, rows)

    def _wait_to_reconsider(self) -> None:
        """The watchdog says a thing once. What was refused is acted on as soon as it can be: a rank has joined, or
        automation is on again. As a step of its own, so that one step is never about two epochs."""
        if Wait.RECONSIDER not in self._deadlines and self._refused_in_vain is not None:
            self._deadlines.arm(Wait.RECONSIDER, self._now)

    @property
    def _refused_in_vain(self) -> tuple[p.TelemetryVerdict, list[Rank], Decision] | None:
        """A verdict that was refused and could be acted on now, whom it is about, and how."""
        if self._phase is not Phase.SERVING or self._departure is not None:
            return None
        for verdict in self._doubts.refused(self.epoch):
            rows = self._concerned(verdict)
            decision = decide(verdict, self._situation(rows), self._policy)
            if decision.acts:
                return verdict, rows, decision
        return None

    def _reconsider(self) -> None:
        if (found := self._refused_in_vain) is None:
            return
        verdict, rows, decision = found
        self._hear(verdict, decision)
        self._record("verdict_reconsidered", ranks=[row.rank for row in rows], reason=verdict.reason)
        self._carry_out(decision, replace(verdict, at=self._now), rows)

    def _concerned(self, verdict: p.TelemetryVerdict) -> list[Rank]:
        return [row for identity in verdict.ranks if (row := self._ranks.current(*identity))]

    def _situation(self, rows: list[Rank]) -> Situation:
        departure = self._departure
        return Situation(
            concerned=len(rows),
            members=sum(row.state in MEMBERS for row in rows),
            group=len(self._ranks.members),
            serving=self._phase in STEPPING,
            stopping=self._phase is Phase.STOPPING,
            may_drain=self._phase is Phase.SERVING and departure is None,
            leaving=departure is not None and departure.forced and {row.identity for row in rows} <= departure.ranks,
            automatic=self._automatic,
        )

    def _carry_out(self, decision: Decision, verdict: p.TelemetryVerdict, rows: list[Rank]) -> None:
        match decision.measure:
            case Measure.DRAIN:
                self._drain_for_verdict(verdict, rows)
            case Measure.EXCLUDE:
                reasons = {row.rank: verdict.reason for row in rows}
                self._lose(reasons, kill=True, evidence_at=verdict.at, for_good=verdict.about_gpu)
            case Measure.FENCE:
                cause = "; ".join(f"rank {row.rank}: {verdict.reason}" for row in rows)
                self._open_recovery(cause, verdict.at).add_cause(cause)
                self._new_epoch()
            case Measure.REFUSE:
                self._tell_refusal(verdict, rows, decision.why)
