"""`/health`: the controller's snapshot together with what only the supervisor knows. Pure."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from elastic_daemon.membership import IN_GROUP, Status
from elastic_daemon.protocol import HealthSnapshot, RankHealth, RecoveryReport

SERVING = (Status.OK, Status.DEGRADED, Status.RECOVERING)
"""Statuses that `/health` answers with 200: a load balancer must not give up on a recovery."""


@dataclass(frozen=True)
class WatchdogView:
    """`trouble`: why nobody watches now, None while somebody does or nobody is to."""

    mode: str
    state: str
    pid: int | None
    trouble: str | None


@dataclass(frozen=True)
class HealthView:
    """`epoch_start`: what to add to the monotonic times of `snapshot` to get wall-clock seconds.

    `snapshot` is None before the engine is configured, `target` what it will have. `url`: where requests are served.
    `refusing`: why the front end would refuse a request that came now, None if it would not.
    """

    snapshot: HealthSnapshot | None
    model: str
    target: int
    in_flight: int
    in_flight_by_rank: Mapping[int, int]
    pids: Mapping[tuple[int, int], int]
    epoch_start: float
    host: str = "localhost"
    url: str | None = None
    watchdog: WatchdogView = WatchdogView("off", "off", None, None)
    refusing: str | None = None

    @property
    def status(self) -> Status:
        return self.snapshot.status if self.snapshot is not None else Status.STARTING

    @property
    def http_status(self) -> int:
        return 200 if self.status in SERVING else 503

    @property
    def unready(self) -> str | None:
        """Why a request that comes now would not be served. None: it would, if need be after a recovery that holds it.

        Served means before its deadline: who would be refused at the door, for the queue is long, would not be.
        """
        snapshot = self.snapshot if self.snapshot is not None else _before_configured(self.target)
        if snapshot.status not in SERVING:
            return snapshot.reason or snapshot.status.value
        return self.refusing if snapshot.frontend_ready else "the front end is starting"

    def to_json(self) -> dict[str, Any]:
        """The body of section "health" in docs/api.md."""
        snapshot = self.snapshot if self.snapshot is not None else _before_configured(self.target)
        return {
            "status": snapshot.status.value,
            "reason": "; ".join(part for part in (snapshot.reason, self.watchdog.trouble) if part),
            "doing": snapshot.doing,
            "epoch": snapshot.epoch,
            "model": self.model,
            "url": self.url,
            "data_parallel_size": {"target": snapshot.target, "active": snapshot.active},
            "expert_safety": snapshot.expert_safety,
            "survivable_losses": snapshot.survivable_losses,
            "in_flight": self.in_flight,
            "ranks": [self._rank(rank) for rank in snapshot.ranks],
            "watchdog": {
                "mode": self.watchdog.mode,
                "state": self.watchdog.state,
                "pid": self.watchdog.pid,
                "reason": self.watchdog.trouble,
            },
            "last_recovery": _report(snapshot.last_recovery),
            "last_shrink": _report(snapshot.last_shrink),
            "last_grow": _report(snapshot.last_grow),
        }

    def _rank(self, rank: RankHealth) -> dict[str, Any]:
        pid = self.pids.get((rank.rank, rank.incarnation))
        since = datetime.fromtimestamp(rank.since + self.epoch_start, UTC)
        return {
            "rank": rank.rank,
            "state": rank.state.value,
            "host": self.host,
            "gpu": rank.gpu,
            "pids": [pid] if pid is not None else [],
            "since": since.isoformat(timespec="milliseconds"),
            "reason": rank.reason,
            "in_flight": self.in_flight_by_rank.get(rank.rank, 0) if rank.state in IN_GROUP else 0,
        }


def _before_configured(target: int) -> HealthSnapshot:
    return HealthSnapshot(
        status=Status.STARTING,
        reason="importing the engine",
        doing="importing the engine",
        epoch=0,
        target=target,
        active=0,
        expert_safety=None,
        survivable_losses=-1,
        ranks=(),
        last_recovery=None,
        last_shrink=None,
        last_grow=None,
        frontend_ready=False,
    )


def url_of(host: str, port: int, *, secure: bool = False) -> str:
    """How to reach, from the same machine, a server that listens on `host`."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:
            host = "127.0.0.1" if address.version == 4 else "::1"
    scheme = "https" if secure else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _report(report: RecoveryReport | None) -> dict[str, Any] | None:
    return report_json(report) if report is not None else None


def report_json(report: RecoveryReport) -> dict[str, Any]:
    counts = report.requests
    requests = (
        None
        if counts is None
        else {"kept": counts.kept, "replayed": counts.replayed, "restarted": counts.restarted, "lost": counts.lost}
    )
    return {
        "epoch": report.epoch,
        "kind": report.kind.value,
        "ranks": list(report.ranks),
        "cause": report.cause,
        "seconds": {phase: round(spent, 6) for phase, spent in report.seconds.items()},
        "requests": requests,
    }
