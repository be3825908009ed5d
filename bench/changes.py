"""What one change of the group took, and what its clients saw of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from bench.load import Traffic, Window
from elastic_daemon.config import Settings
from elastic_daemon.drill.report import Delay

BEFORE_S, AFTER_S = 0.05, 0.25
"""Around a regroup: clients' longest waits begin a step before it and end a step after it."""

SETTLED_S = 1.5
"""After a regroup in which experts are spread anew, while the group serves."""

PROBATION_S = float(Settings.model_fields["gpu_probation"].default)
"""The daemons measured here have the default."""

QUIET_S = 2.0
"""Undisturbed, before each change."""


class Kind(StrEnum):
    REJOIN = "rejoin"  # a rank is killed and comes back
    REPLACEMENT = "replacement"  # a new GPU appears in place of a lost one
    SPARE = "spare"  # a GPU is lost, and a spare one takes its place
    DOWN = "down by one"
    UP = "up by one"
    MANY = "4 -> 2 -> 6 -> 4"

    @property
    def begins_with_loss(self) -> bool:
        return self in (Kind.REJOIN, Kind.SPARE)


@dataclass(frozen=True)
class Change:
    """One change. Monotonic seconds. `at`: the kill, the loss, the order, or when the new GPU appeared.

    `regroups`: from the start to the end of each; `kinds`: what the daemon calls it; `parts`: its own account of the
    seconds. `starting`: from the first start
    of a rank's process until all are on standby, None where nobody was started. `full_at`: all wanted ranks serve.
    `delays`: the worst scheduling delay of this process in each regroup, and `delay` in all of it.
    """

    kind: Kind
    at: float
    full_at: float
    regroups: tuple[Window, ...]
    kinds: tuple[str, ...]
    parts: tuple[Mapping[str, float], ...]
    starting: Window | None
    delays: tuple[float, ...]
    delay: float

    @property
    def seconds(self) -> float:
        return self.full_at - self.at

    @property
    def before(self) -> Window:
        return Window(self.at - QUIET_S, self.at)

    @property
    def whole(self) -> Window:
        """From the order on, until clients see that it is over."""
        return Window(self.at, self.full_at + AFTER_S)

    def of_kind(self, kind: str) -> list[tuple[Window, float]]:
        """Regroups of a kind, each with its scheduling delay."""
        rows = zip(self.kinds, self.regroups, self.delays, strict=True)
        return [(window, delay) for found, window, delay in rows if found == kind]


def around(regroup: Window) -> Window:
    return Window(regroup.since - BEFORE_S, regroup.until + AFTER_S)


def settling(regroup: Window) -> Window:
    return Window(regroup.until + AFTER_S, regroup.until + SETTLED_S)


def worst_delay(delays: Iterable[Delay], window: Window) -> float:
    """Of timers that were due in the window or fired in it."""
    inside = (one.seconds for one in delays if one.at > window.since and one.at - one.seconds < window.until)
    return max(inside, default=0.0)


def change_of(
    kind: Kind, at: float, events: Sequence[Mapping[str, Any]], clock_s: float, delays: Sequence[Delay]
) -> Change:
    """The books of a change that is over.

    `events`: of the daemon, since just before it. `clock_s`: monotonic time minus time of day.
    Raises ValueError where the group has not changed.
    """
    regroups, kinds, parts = [], [], []
    began = at
    for event in events:
        now = event["time"] + clock_s
        if event["event"] == "recovery_started":
            began = now
        elif event["event"] == "recovery_done":
            regroups.append(Window(began, now))
            kinds.append(event["kind"])
            parts.append(event["seconds"])
    if not regroups:
        raise ValueError(f"{kind}: the group has not changed")
    starts = [event["time"] + clock_s for event in events if event["event"] == "rank_starting"]
    ready = [event["time"] + clock_s for event in events if event["event"] == "rank_standby"]
    full_at = regroups[-1].until
    return Change(
        kind=kind,
        at=at,
        full_at=full_at,
        regroups=tuple(regroups),
        kinds=tuple(kinds),
        parts=tuple(parts),
        starting=Window(min(starts), max(ready)) if starts and ready else None,
        delays=tuple(worst_delay(delays, around(regroup)) for regroup in regroups),
        delay=worst_delay(delays, Window(at, full_at + AFTER_S)),
    )


@dataclass(frozen=True)
class Seen:
    """What clients saw of a change. Seconds; `share`: tokens per second while ranks started, relative to before.

    `joins`, `losses`: the longest wait around each regroup that let ranks in, and that lost or dismissed some;
    `settling`: after the last one; `whole`: from the order on. `phases`: of a change in which ranks started. `grows`,
    `shrinks`: the daemon's own account of each regroup.
    """

    kind: Kind
    seconds: float
    joins: tuple[float, ...]
    join_delays: tuple[float, ...]
    losses: tuple[float, ...]
    loss_delays: tuple[float, ...]
    settling: float
    whole: float
    delay: float
    share: float | None
    phases: Mapping[str, float]
    grows: tuple[Mapping[str, float], ...] = ()
    shrinks: tuple[Mapping[str, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def seen(change: Change, traffic: Traffic) -> Seen:
    """To be called when the load is over: it would delay the clients."""
    joins, losses = change.of_kind("grow"), change.of_kind("shrink")
    share = None
    if change.starting is not None and (before := traffic.rate(change.before)) > 0:
        share = traffic.rate(change.starting) / before
    return Seen(
        kind=change.kind,
        seconds=change.seconds,
        joins=tuple(traffic.longest_wait(around(window)) for window, _ in joins),
        join_delays=tuple(delay for _, delay in joins),
        losses=tuple(traffic.longest_wait(around(window)) for window, _ in losses),
        loss_delays=tuple(delay for _, delay in losses),
        settling=traffic.longest_wait(settling(change.regroups[-1])),
        whole=traffic.longest_wait(change.whole),
        delay=change.delay,
        share=share,
        phases=phases(change),
        grows=tuple(part for kind, part in zip(change.kinds, change.parts, strict=True) if kind == "grow"),
        shrinks=tuple(part for kind, part in zip(change.kinds, change.parts, strict=True) if kind == "shrink"),
    )


def phases(change: Change) -> dict[str, float]:
    """How long it took until the first process was started, until all were on standby, and until they served."""
    if change.starting is None:
        return {}
    waited = change.starting.since - change.at
    first = {"until a start": waited}
    if change.kind is Kind.REPLACEMENT:
        first = {"until the GPU is known": waited - PROBATION_S, "probation": PROBATION_S}
    return first | {"start to standby": change.starting.seconds, "join": change.full_at - change.starting.until}
