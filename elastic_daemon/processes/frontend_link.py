"""The supervisor's end of the front end: what it is told of the membership, and what it says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from elastic_daemon import protocol as p
from elastic_daemon.config import Settings
from elastic_daemon.processes.control_server import Peer
from elastic_daemon.processes.messages import Message
from elastic_daemon.telemetry.events import EventLog
from elastic_daemon.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)

ADOPT_TIMEOUT_S = 10.0
"""A front end that has not adopted new settings after this long is not waited for."""

SYNCED_FIELDS = ("epoch", "kept", "replayed", "restarted", "lost", "delivered")


class FrontendLink:
    """Whoever connects as a front end is the only one there is, and is told at once how things are."""

    def __init__(self, events: EventLog, metrics: Metrics, tell: Callable[[p.Event], None], stop_timeout_s: float):
        """`stop_timeout_s`: how long its requests may take to finish when the daemon stops."""
        self.published: p.Snapshot | None = None
        self.in_flight = 0
        self.in_flight_by_rank: dict[int, int] = {}
        self.refusing: str | None = None
        """Why it would refuse a request that came now, as of its last word."""
        self._events = events
        self._metrics = metrics
        self._tell = tell
        self._stop_timeout_s = stop_timeout_s
        self._refused = 0  # by the front end that there is
        self._settings: Message | None = None
        self._unadopted = 0  # how often the front end that there is was sent settings without saying that it has them
        self._waiting: list[tuple[Callable[[], None], asyncio.TimerHandle]] = []
        self._peer: Peer | None = None
        self._ready: dict[int, str] = {}  # by incarnation: how vLLM's client gets to know a rank

    def connected(self, peer: Peer) -> None:
        self._peer = peer
        self._refused = 0
        self.refusing = None
        self._unadopted = 0
        self._send_settings()  # they may have changed since it was forked
        self._send_membership()

    def adopt(self, settings: Message, stop_timeout_s: float) -> None:
        """What changes while it serves, for this front end and those after it. Secret."""
        self._settings = settings
        self._stop_timeout_s = stop_timeout_s
        self._send_settings()

    def when_adopted(self, then: Callable[[], None]) -> None:
        """Call `then` once the front end goes by the settings that it was sent, is gone, or has had time enough."""
        if not self._unadopted:
            return then()
        self._waiting.append((then, asyncio.get_running_loop().call_later(ADOPT_TIMEOUT_S, self._adoption_overdue)))

    def _adoption_overdue(self) -> None:
        log.warning("settings_not_adopted", seconds=ADOPT_TIMEOUT_S)
        self._all_adopted()

    def _all_adopted(self) -> None:
        waiting, self._waiting = self._waiting, []
        for then, timer in waiting:
            timer.cancel()
            then()

    def gone(self) -> None:
        """It has ended, and its requests with it: as many as it last told of."""
        self._peer = None
        self._note_lost(self.in_flight)
        self.in_flight, self.in_flight_by_rank = 0, {}
        self.refusing = None
        self._unadopted = 0
        self._all_adopted()

    def introduce(self, incarnation: int, response: str) -> None:
        """What a rank has to say to it, once it is a member."""
        self._ready[incarnation] = response

    def forget(self, incarnation: int) -> None:
        self._ready.pop(incarnation, None)

    def publish(self, snapshot: p.Snapshot) -> None:
        self.published = snapshot
        self._send_membership()
        if snapshot.status == "stopping" and self._peer is not None:
            self._peer.send("drain", timeout_s=self._stop_timeout_s)

    def hear(self, peer: Peer, message: Message) -> None:
        if peer is not self._peer:
            return  # a predecessor
        match message["type"]:
            case "ready":
                self._tell(p.FrontendReady())
            case "synced":
                self._tell(p.FrontendSynced(*(message[field] for field in SYNCED_FIELDS)))
            case "moved":
                self._note_moves(message["requests"])
                self._tell(p.FrontendMoved(message["epoch"], tuple(message["draining"])))
            case "stats":
                self.in_flight = message["in_flight"]
                self._metrics.refused(message["refused"] - self._refused)
                self._refused = message["refused"]
                self.refusing = message["refusing"]
                self.in_flight_by_rank = {int(rank): count for rank, count in message["by_rank"].items()}
                for gap in message["gaps"]:
                    self._metrics.client_gap(gap)
            case "adopted":
                self._unadopted -= 1
                if not self._unadopted:
                    self._all_adopted()
            case "drained":
                self._note_lost(message["lost"])
                self._tell(p.DrainComplete())

    def _note_lost(self, requests: int) -> None:
        if requests:
            self._metrics.lost(requests)
            self._events.record("requests_lost", {"count": requests})

    def _note_moves(self, requests: list[Message]) -> None:
        for moved in requests:
            if moved["count"]:
                self._metrics.moved(moved["count"])
                self._events.record("requests_moved", {"rank": moved["rank"], "count": moved["count"]})

    def _send_settings(self) -> None:
        if self._settings is not None and self._peer is not None:
            self._peer.send("settings", **self._settings)
            self._unadopted += 1

    def _send_membership(self) -> None:
        snapshot = self.published
        if snapshot is None or self._peer is None:
            return
        members = [
            {"rank": rank, "incarnation": incarnation, "response": self._ready[incarnation]}
            for rank, incarnation in snapshot.active
            if incarnation in self._ready  # else it has just ended, and the next membership says so
        ]
        self._peer.send(
            "membership",
            epoch=snapshot.epoch,
            status=snapshot.status,
            reason=snapshot.reason,
            hold=snapshot.hold,
            members=members,
            draining=[incarnation for _, incarnation in snapshot.draining],
        )


def frontend_settings(settings: Settings) -> Message:
    """What a front end needs of the settings, at its start and after a reload."""
    return {
        "access": settings.access.to_message(),
        "hold_timeout_s": settings.hold_timeout,
        "log_level": settings.log_level,
        "max_waiting": settings.max_waiting,
        "queue_timeout_s": settings.queue_timeout,
        "max_body_bytes": settings.max_body_size,
    }
