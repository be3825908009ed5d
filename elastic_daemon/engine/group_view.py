"""What the supervisor tells the front end of the group, and what following it has done to the requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elastic_daemon.requests import Handover


@dataclass(frozen=True)
class Membership:
    """What the supervisor says about the group. Requests of incarnations that are not members are void."""

    epoch: int
    serving: bool
    hold: bool
    reason: str
    ranks: dict[int, int]  # incarnation -> rank
    ready: dict[int, str]  # incarnation -> vLLM's ready response, base64
    draining: frozenset[int] = frozenset()  # incarnations whose requests go to the other members

    @property
    def takers(self) -> tuple[int, ...]:
        """Who gets requests. Everybody, if all are draining: there is nobody else."""
        return tuple(incarnation for incarnation in self.ranks if incarnation not in self.draining) or tuple(self.ranks)


@dataclass(frozen=True)
class Applied:
    """What a change of membership has done to the requests in flight.

    `handover`: once for each epoch, when it first serves. `moved`: how many were moved off each draining rank, now that
    it has none left and gets none; None if nothing drains, or nobody could take them. `given_up`: their clients are to
    be told.
    """

    handover: Handover | None = None
    moved: dict[int, int] | None = None
    given_up: tuple[str, ...] = ()


def membership_from_message(message: dict[str, Any]) -> Membership:
    members: Sequence[dict[str, Any]] = message["members"]
    return Membership(
        message["epoch"],
        message["status"] in ("ok", "degraded"),
        message["hold"],
        message["reason"],
        {member["incarnation"]: member["rank"] for member in members},
        {member["incarnation"]: member["response"] for member in members},
        frozenset(message["draining"]),
    )
