"""What the front end says: that it goes by new settings, if somebody is there to say so; what it would refuse."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from elastic_daemon.config import Settings
from elastic_daemon.processes import frontend_link
from elastic_daemon.processes.control_server import Peer
from elastic_daemon.processes.frontend_link import FrontendLink, frontend_settings
from elastic_daemon.telemetry.events import EventLog
from elastic_daemon.telemetry.metrics import Metrics


class FakePeer:
    def __init__(self) -> None:
        self.sent: list[str] = []

    def send(self, type_: str, **_: Any) -> None:
        self.sent.append(type_)


class Link(FrontendLink):
    def __init__(self) -> None:
        self.log = EventLog()
        super().__init__(self.log, Metrics(), lambda event: None, 5.0)
        self.over = 0

    def connect(self) -> Peer:
        peer = cast(Peer, FakePeer())
        self.connected(peer)
        return peer

    def reload(self) -> None:
        self.adopt(frontend_settings(Settings()), 5.0)
        self.when_adopted(self._count)

    def _count(self) -> None:
        self.over += 1


def sent(peer: Peer) -> list[str]:
    return cast(FakePeer, peer).sent


async def test_it_is_over_when_the_front_end_has_adopted_all_that_it_was_sent() -> None:
    link = Link()
    peer = link.connect()
    link.reload()
    link.reload()
    assert sent(peer) == ["settings", "settings"]
    link.hear(peer, {"type": "adopted"})
    assert link.over == 0, "those of the second reload are on their way"
    link.hear(peer, {"type": "adopted"})
    assert link.over == 2


def test_without_a_front_end_nobody_is_waited_for() -> None:
    link = Link()
    link.reload()
    assert link.over == 1


async def test_one_that_ends_is_not_waited_for_and_the_next_one_is_told() -> None:
    link = Link()
    first = link.connect()
    link.reload()
    link.gone()
    assert link.over == 1
    second = link.connect()
    assert sent(second) == ["settings"]
    link.reload()
    link.hear(first, {"type": "adopted"})
    link.hear(second, {"type": "adopted"})
    assert link.over == 1, "what it was told first, it says first"
    link.hear(second, {"type": "adopted"})
    assert link.over == 2


def test_what_it_would_refuse_ends_with_it() -> None:
    link = Link()
    stats = {"type": "stats", "in_flight": 2, "by_rank": {}, "refused": 1, "gaps": []}
    first = link.connect()
    assert link.refusing is None
    link.hear(first, {**stats, "refusing": "2 requests wait already"})
    assert link.refusing == "2 requests wait already"
    link.hear(first, {**stats, "refusing": None})
    assert link.refusing is None
    link.hear(first, {**stats, "refusing": "3 requests wait already"})
    link.gone()
    assert link.refusing is None
    second = link.connect()
    link.hear(first, {**stats, "refusing": "of a predecessor"})
    assert link.refusing is None
    link.hear(second, {**stats, "refusing": "4 requests wait already"})
    link.connect()
    assert link.refusing is None


@pytest.mark.parametrize("lost", [0, 3])
def test_what_the_end_of_a_drain_cost_is_counted_once(lost: int) -> None:
    link = Link()
    peer = link.connect()
    stats = {"type": "stats", "by_rank": {}, "refused": 0, "refusing": None, "gaps": []}
    link.hear(peer, {**stats, "in_flight": 3})
    link.hear(peer, {**stats, "in_flight": 0})
    link.hear(peer, {"type": "drained", "lost": lost})
    link.gone()
    counts = [event.fields["count"] for event in link.log.after(0) if event.name == "requests_lost"]
    assert counts == ([lost] if lost else [])


async def test_one_that_says_nothing_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend_link, "ADOPT_TIMEOUT_S", 0.01)
    link = Link()
    peer = link.connect()
    with capture_logs() as logs:
        link.reload()
        async with asyncio.timeout(5):
            while not link.over:
                await asyncio.sleep(0.005)
    assert [(line["event"], line["log_level"]) for line in logs] == [("settings_not_adopted", "warning")]
    link.hear(peer, {"type": "adopted"})
    assert link.over == 1, "once"
