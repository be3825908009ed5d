"""Which GPUs a rank could run on, for the daemon (`PUT /watchdog/gpus`). Pure.

    {"gpus": [{"uuid": "GPU-…", "index": 3, "fit": false, "reason": "…", "verdict": "exclude"}]}

All GPUs that the driver lists; one that is not among them is not there. Verdicts say what is to be done about a GPU
that is in use; this says what may be done with any. In observe mode all are fit: to keep a GPU from being used would be
to act. `reason` and `verdict` say what is thought of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from watchdog.docket import Docket, Mode
from watchdog.verdict import Verdict

DEAF_S = 5.0
"""A GPU that was heard stays so for this long. NVML is initialised in less."""


@dataclass(frozen=True)
class Fitness:
    """One GPU. `fit`: a rank may be put on it. `reason`: what else is known, for people. It may have
    numbers that change all the time, so it is no part of `key`."""

    uuid: str
    index: int | None
    fit: bool
    reason: str
    verdict: Verdict
    signal: str | None

    @property
    def key(self) -> tuple[object, ...]:
        """What makes it news."""
        return self.uuid, self.index, self.fit, self.verdict, self.signal

    def as_json(self) -> dict[str, Any]:
        return {
            "uuid": self.uuid,
            "index": self.index,
            "fit": self.fit,
            "reason": self.reason[:1000],
            "verdict": self.verdict.value,
        }


class Hearing:
    """Of which GPUs events are heard. Short gaps do not count: NVML is initialised anew when any GPU comes or goes, and
    that says nothing against the others."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._first: float | None = None

    def note(self, listening: Iterable[str], present: Iterable[str], now: float) -> None:
        """`present`: GPUs that the driver lists. One that comes back must be heard anew."""
        there = frozenset(present)
        if there and self._first is None:
            self._first = now
        self._last = {uuid: last for uuid, last in self._last.items() if uuid in there}
        self._last.update((uuid, now) for uuid in listening if uuid in there)

    def heard(self, now: float) -> frozenset[str] | None:
        """None at the start, when nobody had the time to listen."""
        if not self._last and (self._first is None or now - self._first <= DEAF_S):
            return None
        return frozenset(uuid for uuid, last in self._last.items() if now - last <= DEAF_S)


def judge_fitness(docket: Docket, present: Iterable[str], heard: Collection[str]) -> tuple[Fitness, ...]:
    """`present`: GPUs that the driver lists, by UUID; `index:N` for one that has not told its UUID is left out.
    `heard`: those whose events are heard; before that, a GPU could fail without anybody noticing."""
    known = [uuid for uuid in sorted(present) if uuid in docket.gpus and not uuid.startswith("index:")]
    return tuple(_judge(docket, uuid, uuid in heard) for uuid in known)


def _judge(docket: Docket, uuid: str, heard: bool) -> Fitness:
    case = docket.gpus[uuid]
    judgement = case.judgement
    quarantined = docket.state.record(uuid).history.quarantined is not None
    fit = docket.mode is Mode.OBSERVE or (not judgement.verdict.removes and not quarantined and heard)
    reason = ": ".join(part for part in ((judgement.signal or "").replace(":", " "), judgement.reason) if part)
    if not fit and not judgement.verdict.removes:
        reason = "in quarantine until it is released" if quarantined else "its events are not heard yet"
    return Fitness(uuid, case.index, fit, reason, judgement.verdict, judgement.signal)
