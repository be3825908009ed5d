"""What to do about a verdict of the watchdog, and which ranks are in doubt. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from elastic_daemon.control.policy import Policy
from elastic_daemon.protocol import Identity, TelemetryVerdict, VerdictKind


class Measure(StrEnum):
    """What is done."""

    SHOW = "show"
    EXCLUDE = "exclude"  # the ranks are given up
    DRAIN = "drain"  # they leave in order
    FENCE = "fence"  # the group regroups: who does not answer the fence is given up, by its own silence
    REFUSE = "refuse"


@dataclass(frozen=True)
class Decision:
    measure: Measure
    why: str = ""  # of a refusal

    @property
    def acts(self) -> bool:
        return self.measure in (Measure.EXCLUDE, Measure.DRAIN, Measure.FENCE)


@dataclass(frozen=True)
class Situation:
    """`concerned`: current ranks that the verdict is about, `members` of them in the group of `group` ranks.

    `may_drain`: ranks can leave in order now. `leaving`: those concerned do already, within bounded time. `automatic`:
    verdicts are acted on.
    """

    concerned: int
    members: int
    group: int
    serving: bool
    stopping: bool
    may_drain: bool = False
    leaving: bool = False
    automatic: bool = True


def decide(verdict: TelemetryVerdict, now: Situation, policy: Policy) -> Decision:
    """Telemetry may be wrong, and a process that has died is not: so it never takes away the last place of an expert.

    A rank that hangs where none can be spared is fenced instead. The group stands still with it anyway, and whether it
    answers is proof of what the watchdog only infers.
    """
    if not verdict.act or not verdict.verdict.acts or not now.concerned:
        return Decision(Measure.SHOW)
    if now.leaving and verdict.verdict is VerdictKind.DRAIN:
        return Decision(Measure.SHOW)
    if now.stopping:
        return Decision(Measure.REFUSE, "the daemon is stopping")
    if not now.automatic:
        return Decision(Measure.REFUSE, "automation is off")
    left = now.group - now.members
    if not now.members or left * policy.slots >= policy.experts:
        in_order = verdict.verdict is VerdictKind.DRAIN and now.members and now.may_drain
        return Decision(Measure.DRAIN if in_order else Measure.EXCLUDE)
    if verdict.verdict is VerdictKind.RESTART_RANK and now.serving:
        return Decision(Measure.FENCE)
    return Decision(
        Measure.REFUSE, f"{policy.min_ranks} ranks are needed to hold every expert, and {left} would be left"
    )


@dataclass(frozen=True)
class _Doubt:
    """`refused`: it is to be acted on, and was not in `epoch`. `kept`: that, or the watchdog holds it back."""

    verdict: TelemetryVerdict
    reason: str
    refused: bool
    kept: bool
    epoch: int | None

    @property
    def ranks(self) -> tuple[Identity, ...]:
        return self.verdict.ranks


class Doubts:
    """Ranks that the watchdog has something against, by what it has it against: a GPU or the rank itself."""

    def __init__(self) -> None:
        self._by_subject: dict[str, _Doubt] = {}

    def hear(self, verdict: TelemetryVerdict, decision: Decision, epoch: int | None) -> None:
        """The newest word on a subject replaces what was said before. `epoch`: in which ranks step, None if they do
        not."""
        self._by_subject.pop(verdict.subject, None)
        if verdict.verdict is VerdictKind.OK or decision.acts:
            return
        refused = decision.measure is Measure.REFUSE
        held = verdict.verdict.acts and not verdict.act  # by the watchdog, whose reason says why
        reason = f"{verdict.reason}; kept: {decision.why}" if refused else verdict.reason
        self._by_subject[verdict.subject] = _Doubt(verdict, reason, refused, refused or held, epoch)

    def forget(self, is_current: Callable[[Identity], bool]) -> None:
        """Let go of what is about ranks of the past only."""
        self._by_subject = {
            subject: doubt for subject, doubt in self._by_subject.items() if any(map(is_current, doubt.ranks))
        }

    def of(self, rank: Identity) -> str | None:
        """Why this rank is in doubt."""
        return "; ".join(doubt.reason for doubt in self._by_subject.values() if rank in doubt.ranks) or None

    def refused(self, epoch: int) -> tuple[TelemetryVerdict, ...]:
        """What was refused and still holds in `epoch`. A GPU stays bad; a rank that has met the others since does not
        hang any more."""
        doubts = (doubt for doubt in self._by_subject.values() if doubt.refused)
        return tuple(doubt.verdict for doubt in doubts if doubt.verdict.about_gpu or doubt.epoch == epoch)

    @property
    def kept(self) -> tuple[tuple[tuple[Identity, ...], str], ...]:
        """Ranks that are kept against a verdict, and why: it was refused here, or held back by the watchdog."""
        return tuple((doubt.ranks, doubt.reason) for doubt in self._by_subject.values() if doubt.kept)
