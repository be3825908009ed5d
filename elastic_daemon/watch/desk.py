"""Where the watchdog and the daemon meet: bindings to give, verdicts to take in."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from elastic_daemon import protocol as p
from elastic_daemon.membership import ALIVE
from elastic_daemon.telemetry.events import EventLog
from elastic_daemon.telemetry.metrics import Metrics
from elastic_daemon.watch.gpus import AllowList, Listed
from watchdog.heartbeat.page import page_path

KEPT_IDS = 4096
LONGEST_DETECTION_S = 60.0
"""An older time of judgement is no part of a recovery: clocks were set, or the verdict waited for somebody."""


class VerdictBody(BaseModel):
    """A verdict as it comes (docs/watchdog.md). `gpu`, or `rank` with `incarnation`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str = Field(min_length=1, max_length=200)
    gpu: str | None = Field(None, min_length=1, max_length=200)
    rank: int | None = None
    incarnation: int | None = None
    epoch: int
    verdict: p.VerdictKind
    signal: str | None = Field(None, max_length=100)
    reason: str = Field("", max_length=2000)
    act: bool
    held: str | None = Field(None, max_length=1000)
    at: float
    evidence: tuple[dict[str, Any], ...] = ()

    @model_validator(mode="after")
    def _one_target(self) -> VerdictBody:
        if (self.gpu is None) == (self.rank is None) or (self.rank is None) != (self.incarnation is None):
            raise ValueError("expected either gpu, or rank and incarnation")
        return self

    @property
    def subject(self) -> str:
        return self.gpu if self.gpu is not None else f"rank {self.rank}, incarnation {self.incarnation}"

    @property
    def why(self) -> str:
        """For people: 'xid 79: GPU has fallen off the bus'."""
        said = ": ".join(part for part in ((self.signal or "").replace(":", " "), self.reason) if part)
        return f"{said or self.verdict.value}{f' [{self.held}]' if self.held else ''}"


class GpuBody(BaseModel):
    """One GPU as the watchdog knows it (docs/watchdog.md)."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    uuid: str = Field(min_length=1, max_length=200)
    index: int | None = Field(None, ge=0)
    slot: str | None = Field(None, min_length=1, max_length=100)
    fit: bool
    reason: str = Field("", max_length=2000)
    verdict: p.VerdictKind


class GpusBody(BaseModel):
    """All GPUs that are there."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    gpus: tuple[GpuBody, ...] = Field(max_length=1024)

    @model_validator(mode="after")
    def _each_once(self) -> GpusBody:
        if len({gpu.uuid for gpu in self.gpus}) < len(self.gpus):
            raise ValueError("a uuid comes twice")
        return self


class Refused(Exception):
    """Answered with `status`."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Deployment(Protocol):
    """What the desk needs of the supervisor."""

    events: EventLog
    metrics: Metrics

    def snapshot(self) -> p.HealthSnapshot | None: ...

    @property
    def rank_pids(self) -> Mapping[p.Identity, int]: ...

    @property
    def min_ranks(self) -> int: ...

    def tell(self, event: p.Event) -> None: ...


class WatchdogDesk:
    def __init__(self, deployment: Deployment, runtime_dir: Path, allowed: AllowList | None = None) -> None:
        """`allowed`: which GPUs are ours; all without it."""
        self._deployment = deployment
        self._allowed = allowed or AllowList(None)
        self._runtime_dir = runtime_dir
        self._instance = secrets.token_hex(8)
        self._taken: deque[str] = deque(maxlen=KEPT_IDS)
        self._released: dict[str, float] = {}  # when, in seconds since 1970

    def bindings(self) -> dict[str, Any]:
        """The body of `GET /watchdog/bindings`."""
        snapshot = self._deployment.snapshot()
        pids = self._deployment.rank_pids
        ranks = [] if snapshot is None else [rank for rank in snapshot.ranks if rank.state in ALIVE]
        return {
            "instance": self._instance,
            "epoch": 0 if snapshot is None else snapshot.epoch,
            "min_ranks": self._deployment.min_ranks,
            "ranks": [
                {
                    "rank": rank.rank,
                    "incarnation": rank.incarnation,
                    "gpu": rank.gpu,
                    "pids": [pids[key]] if (key := (rank.rank, rank.incarnation)) in pids else [],
                    "heartbeat": str(page_path(self._runtime_dir, rank.incarnation)),
                }
                for rank in ranks
            ],
            "released": dict(self._released),
        }

    def release_gpu(self, uuid: str) -> None:
        """An operator takes a GPU out of quarantine: all that happened to it so far is forgiven. The watchdog learns of
        it with the next bindings, and again after its own restart; what it forgave already it does not forgive twice.
        """
        self._released[uuid] = time.time()
        self._deployment.events.record("gpu_released", {"gpu": uuid})
        self._deployment.tell(p.GpuReleased(uuid))

    def see_gpus(self, body: GpusBody) -> None:
        """Tell the controller which GPUs of ours there are. Raises Refused."""
        if self._deployment.snapshot() is None:
            raise Refused(503, "the daemon is not configured yet: say it again")
        listed = {gpu.uuid: Listed(gpu.index if gpu.index is not None else -1, gpu.uuid, gpu.slot) for gpu in body.gpus}
        ours = {gpu.uuid for gpu in self._allowed.admitted(listed.values())}
        for uuid, gpu in listed.items():
            if uuid not in ours and self._allowed.is_news(gpu):
                self._deployment.events.record("gpu_not_ours", {"gpu": uuid, "slot": gpu.slot})
        seen = (p.GpuSeen(gpu.uuid, gpu.fit, gpu.reason) for gpu in body.gpus if gpu.uuid in ours)
        self._deployment.tell(p.GpusSeen(tuple(seen)))

    def take(self, verdict: VerdictBody) -> None:
        """Take one in, once. What is to be done is under way when this returns. Raises Refused."""
        if verdict.id in self._taken:
            return
        snapshot = self._deployment.snapshot()
        epoch = 0 if snapshot is None else snapshot.epoch
        if verdict.epoch != epoch:
            raise Refused(409, f"the verdict is of epoch {verdict.epoch}, the daemon is in {epoch}: read the bindings")
        acts = verdict.act and verdict.verdict.acts
        if acts and snapshot is None:
            raise Refused(503, "the daemon is not configured yet: say it again")
        ranks = self._ranks(verdict, snapshot)
        self._taken.append(verdict.id)
        self._record(verdict)
        judged = time.monotonic() - min(max(0.0, time.time() - verdict.at), LONGEST_DETECTION_S)
        self._deployment.tell(
            p.TelemetryVerdict(verdict.subject, ranks, verdict.verdict, verdict.act, verdict.why, judged)
        )

    def _ranks(self, verdict: VerdictBody, snapshot: p.HealthSnapshot | None) -> tuple[p.Identity, ...]:
        """Whom it is about: nobody where a GPU has no rank on it. Raises Refused for a rank that is not there."""
        there = [] if snapshot is None else [rank for rank in snapshot.ranks if rank.state in ALIVE]
        if verdict.gpu is not None:
            return tuple((rank.rank, rank.incarnation) for rank in there if rank.gpu == verdict.gpu)
        for rank in there:
            if (rank.rank, rank.incarnation) == (verdict.rank, verdict.incarnation):
                return ((rank.rank, rank.incarnation),)
        raise Refused(404, f"rank {verdict.rank} has no incarnation {verdict.incarnation} that lives")

    def _record(self, verdict: VerdictBody) -> None:
        self._deployment.metrics.verdict(verdict.signal or "none", verdict.verdict.value)
        fields = verdict.model_dump(mode="json", exclude_none=True, exclude={"id", "epoch", "at"})
        self._deployment.events.record("verdict", {"epoch": verdict.epoch, **fields})
