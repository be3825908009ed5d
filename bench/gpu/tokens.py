"""What tokens changed, and whether two that took each other's place were near-ties. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bench.load import Outcome
from elastic_daemon.drill.report import StreamResult, first_difference

NEAR_TIE = 0.125
"""Nats. Logits between 16 and 32 are this far apart in bfloat16: two tokens nearer than that are in no sure order."""

KEPT = 20
"""Changes that are kept in full; all are counted."""


@dataclass(frozen=True)
class TokenChange:
    """The first token of a stream that is not as in the undisturbed run; None for a stream that ended before it.

    Gaps: how much likelier the token that came was than the other one, in either run; None where the other one was not
    among the likeliest, no logprobs were asked for, or logprobs do not decide which token comes.
    """

    prompt: str
    position: int
    expected: int | None
    actual: int | None
    expected_gap: float | None
    actual_gap: float | None

    @property
    def near_tie(self) -> bool | None:
        """None where it cannot be told."""
        if self.expected_gap is None or self.actual_gap is None:
            return None
        return max(abs(self.expected_gap), abs(self.actual_gap)) <= NEAR_TIE

    def __str__(self) -> str:
        known = {True: "near-tie", False: "not a near-tie", None: "gap not known"}[self.near_tie]
        gaps = ", ".join("-" if gap is None else f"{gap:.4f}" for gap in (self.expected_gap, self.actual_gap))
        return (
            f"{self.prompt[:30]!r}: token {self.position} is {self.actual}, not {self.expected}; "
            f"{known} (logprob gaps {gaps})"
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "near_tie": self.near_tie}


def token_change(expected: StreamResult, actual: StreamResult) -> TokenChange | None:
    """None where all tokens are the same."""
    if expected.token_ids == actual.token_ids:
        return None
    at = first_difference(expected.token_ids, actual.token_ids)
    one, other = _token(expected, at), _token(actual, at)
    return TokenChange(expected.prompt, at, one, other, _gap(expected, at, one, other), _gap(actual, at, other, one))


def _token(stream: StreamResult, at: int) -> int | None:
    return stream.token_ids[at] if at < len(stream.token_ids) else None


def _gap(stream: StreamResult, at: int, chosen: int | None, other: int | None) -> float | None:
    likeliest = stream.logprobs[at] if stream.sampling.ranked and at < len(stream.logprobs) else {}
    if chosen is None or other is None or chosen not in likeliest or other not in likeliest:
        return None
    return likeliest[chosen] - likeliest[other]


@dataclass
class Judged(Outcome):
    """How streams ended, with the tokens that changed. `ties`: how many of the changes were near-ties."""

    changes: list[TokenChange] = field(default_factory=list)
    ties: int = 0

    def count(self, expected: StreamResult, actual: StreamResult) -> None:
        super().count(expected, actual)
        if actual.error is None and (change := token_change(expected, actual)) is not None:
            self.ties += bool(change.near_tie)
            if len(self.changes) < KEPT:
                self.changes.append(change)

    def add(self, other: Outcome) -> None:
        super().add(other)
        if isinstance(other, Judged):
            self.ties += other.ties
            self.changes = (self.changes + other.changes)[:KEPT]

    def to_json(self) -> dict[str, Any]:
        return {
            "streams": self.streams,
            "lost": self.lost,
            "refused": self.refused,
            "changed": self.changed,
            "near_ties": self.ties,
            "changes": [change.to_json() for change in self.changes],
            "examples": self.examples[:KEPT],
        }
