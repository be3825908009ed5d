"""A supervisor behind its HTTP routes, in a state that the test sets."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx

from elastic_daemon.app import make_control_app
from elastic_daemon.membership import RankState, Status
from elastic_daemon.protocol import HealthSnapshot, RankHealth
from elastic_daemon.routes.health import HealthView
from tests.unit.operator_plane import OperatorPlane

SNAPSHOT = HealthSnapshot(
    status=Status.OK,
    reason="all ranks serve",
    doing="serving",
    epoch=3,
    target=2,
    active=2,
    expert_safety=1,
    survivable_losses=1,
    ranks=(RankHealth(0, RankState.ACTIVE, 0.0, None, 1), RankHealth(1, RankState.ACTIVE, 0.0, None, 2)),
    last_recovery=None,
    last_shrink=None,
    last_grow=None,
    frontend_ready=True,
)


class Plane(OperatorPlane):
    """A supervisor whose state the test sets."""

    def __init__(self) -> None:
        super().__init__()
        self.snapshot: HealthSnapshot | None = SNAPSHOT
        self.refusing: str | None = None
        self.answers: dict[str, dict[int, Any] | Exception] = {}

    def health(self) -> HealthView:
        pids = {(0, 1): 10, (1, 2): 11}
        return HealthView(self.snapshot, "tiny-moe", 2, 5, {0: 2, 1: 3}, pids, 1e9, refusing=self.refusing)

    async def ask_ranks(self, question: str) -> dict[int, Any]:
        if isinstance(answer := self.answers[question], Exception):
            raise answer
        return answer


@contextlib.asynccontextmanager
async def asking(plane: Plane) -> AsyncIterator[httpx.AsyncClient]:
    """A client of its control routes."""
    transport = httpx.ASGITransport(make_control_app(plane))
    async with httpx.AsyncClient(transport=transport, base_url="http://daemon") as client:
        yield client
