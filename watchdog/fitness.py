"""Which GPUs a rank could run on, for the daemon (`PUT /watchdog/gpus`). Pure.

    {"gpus": [{"uuid": "GPU-…", "index": 3, "slot": "00000000:C1:00.0", "fit": false, "reason": "…",
               "verdict": "exclude"}]}

All GPUs that the driver lists; one that is not among them is not there. Verdicts say what is to be done about a GPU
that is in use; this says what may be done with any. In observe mode all are fit that nobody else uses: to
keep a GPU from being used would be to act. `reason` and `verdict` say what is thought of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from watchdog.bindings import Bindings
from watchdog.docket import Docket, Mode
from watchdog.verdict import Verdict

DEAF_S = 5.0
"""A GPU that was heard stays so for this long. NVML is initialised in less."""
OCCUPIED_S = 1.5
"""How long a process must have been on a GPU: bindings come once a second, and it may be a rank that has just come."""
LEFT_S = 10.0
"""A process that was a rank may need this long to end, with what it holds of the GPU."""


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
    slot: str | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What makes it news."""
        return self.uuid, self.index, self.fit, self.verdict, self.signal

    def as_json(self) -> dict[str, Any]:
        return {
            "uuid": self.uuid,
            "index": self.index,
            "slot": self.slot,
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


class Occupancy:
    """On which GPUs processes of somebody else compute. That counts where no rank is bound, so that ranks which share a
    GPU never count, even where the driver names processes as another PID namespace does."""

    def __init__(self) -> None:
        self._bound: dict[str, float] = {}  # GPU -> when a rank was last on it
        self._since: dict[str, tuple[float, tuple[int, ...]]] = {}

    def note(self, processes: Mapping[str, Iterable[int]], bindings: Bindings, now: float) -> None:
        """`processes`: pids by GPU, as the driver names them."""
        if any(binding.gpu is None for binding in bindings.ranks):  # that rank may be on any of them
            self._since = {}
            return
        self._bound.update((binding.gpu, now) for binding in bindings.ranks if binding.gpu is not None)
        ours = {pid for binding in bindings.ranks for pid in binding.pids}
        theirs = {
            uuid: others
            for uuid, pids in processes.items()
            if (others := tuple(pid for pid in pids if pid not in ours))
            and now - self._bound.get(uuid, float("-inf")) > LEFT_S
        }
        self._since = {uuid: (self._since.get(uuid, (now,))[0], pids) for uuid, pids in theirs.items()}

    def occupied(self, now: float) -> dict[str, tuple[int, ...]]:
        """GPU -> pids."""
        return {uuid: pids for uuid, (since, pids) in self._since.items() if now - since >= OCCUPIED_S}


def judge_fitness(
    docket: Docket,
    present: Iterable[str],
    heard: Collection[str],
    occupied: Mapping[str, Collection[int]] | None = None,
) -> tuple[Fitness, ...]:
    """`present`: GPUs that the driver lists, by UUID; `index:N` for one that has not told its UUID is left out.
    `heard`: those whose events are heard; before that, a GPU could fail without anybody noticing.
    `occupied`: those on which somebody else computes."""
    known = [uuid for uuid in sorted(present) if uuid in docket.gpus and not uuid.startswith("index:")]
    return tuple(_judge(docket, uuid, uuid in heard, (occupied or {}).get(uuid, ())) for uuid in known)


def _judge(docket: Docket, uuid: str, heard: bool, strangers: Collection[int]) -> Fitness:
    case = docket.gpus[uuid]
    judgement = case.judgement
    thought = ": ".join(part for part in ((judgement.signal or "").replace(":", " "), judgement.reason) if part)
    acts = docket.mode is not Mode.OBSERVE
    if acts and judgement.verdict.removes:
        fit, reason = False, thought
    elif acts and docket.state.record(uuid).history.quarantined is not None:
        fit, reason = False, "in quarantine until it is released"
    elif acts and not heard:
        fit, reason = False, "its events are not heard yet"
    elif strangers:
        pids = ", ".join(map(str, sorted(strangers)[:8]))
        fit, reason = False, "; ".join(filter(None, (f"in use by a process that is no rank (pid {pids})", thought)))
    else:
        fit, reason = True, thought
    return Fitness(uuid, case.index, fit, reason, judgement.verdict, judgement.signal, case.slot)
