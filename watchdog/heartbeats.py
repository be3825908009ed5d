"""Heartbeats of the bound ranks: their pages read, and findings turned into evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from watchdog.bindings import Binding, Bindings
from watchdog.heartbeat.culprit import HeartbeatJudge
from watchdog.heartbeat.errors import HeartbeatError
from watchdog.heartbeat.findings import Finding, FindingKind
from watchdog.heartbeat.layout import ProcessState, Snapshot
from watchdog.heartbeat.nccl import describe
from watchdog.heartbeat.reader import PageReader
from watchdog.logs import log
from watchdog.ras import RasWitness
from watchdog.verdict import RankView


class Docket(Protocol):
    """Who is told."""

    views: dict[int, RankView]

    def see_rank(self, binding: Binding, signal: str, holds: bool, now: float, **detail: Any) -> None: ...


@dataclass(frozen=True)
class RankState:
    """One rank as `status` shows it. `finding` is one of FindingKind, `ok`, or `no heartbeat`."""

    rank: int
    incarnation: int
    gpu: str | None
    finding: str
    phase: str | None = None
    step: int | None = None
    silent_s: float | None = None
    reason: str | None = None
    nccl_error: str | None = None


class Heartbeats:
    def __init__(self, ras: RasWitness | None = None) -> None:
        self._judge = HeartbeatJudge()
        self._ras = ras or RasWitness()
        self._suspicious = False
        self._readers: dict[Path, PageReader] = {}
        self._wrong: dict[Path, str] = {}
        """What was last said about a page that cannot be read: once is enough."""
        self._changed: dict[int, tuple[Snapshot, float]] = {}
        """By incarnation: the page when it last changed."""
        self._standstill: str | None = None
        self.states: list[RankState] = []
        self.newest_epoch = 0
        """That the pages of bound ranks speak of."""

    def observe(self, bindings: Bindings, docket: Docket, now: float) -> None:
        """One look at all pages. To be called about ten times a second."""
        self._forget(bindings)
        pages: dict[int, Snapshot] = {}
        for binding in bindings.ranks:
            if (page := self._read(binding)) is not None:
                pages[binding.incarnation] = page
        self.newest_epoch = max((page.epoch for page in pages.values()), default=0)
        unheard = self._ras.unheard(self._suspicious, now)
        findings = self._judge.observe(now, list(pages.values()), bindings.epoch or None, unheard, bindings.shared)
        self._suspicious = any(one.kind in (FindingKind.HUNG, FindingKind.NOBODY) for one in findings)
        self._note_standstill(findings)
        self.states = []
        for binding in bindings.ranks:
            self._tell(binding, pages.get(binding.incarnation), findings, docket, bindings.epoch, now)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        self._ras.close()

    def _forget(self, bindings: Bindings) -> None:
        paths = {binding.heartbeat for binding in bindings.ranks}
        for path in [path for path in self._readers if path not in paths]:
            self._readers.pop(path).close()
        incarnations = {binding.incarnation for binding in bindings.ranks}
        self._changed = {one: seen for one, seen in self._changed.items() if one in incarnations}
        self._wrong = {path: error for path, error in self._wrong.items() if path in paths}

    def _read(self, binding: Binding) -> Snapshot | None:
        path = binding.heartbeat
        if path is None:
            return None
        try:
            if path not in self._readers:
                self._readers[path] = PageReader(path)
            page = self._readers[path].read()
        except HeartbeatError as error:
            if path in self._readers:
                self._readers.pop(path).close()
            if self._wrong.get(path) != str(error):
                self._wrong[path] = str(error)
                log.info("heartbeat_unreadable", rank=binding.rank, error=str(error))
            return None
        if (page.rank, page.incarnation) != (binding.rank, binding.incarnation):
            return None  # of a predecessor, about to be replaced
        return page

    def _tell(
        self,
        binding: Binding,
        page: Snapshot | None,
        findings: Sequence[Finding],
        docket: Docket,
        epoch: int,
        now: float,
    ) -> None:
        mine = [one for one in findings if one.incarnation == binding.incarnation]
        hung = next((one for one in mine if one.kind is FindingKind.HUNG and one.confirmed), None)
        slow = next((one for one in mine if one.kind is FindingKind.STRAGGLER), None)
        for signal, finding in (("hung", hung), ("straggler", slow)):
            detail = _detail(finding) if finding is not None else {}
            docket.see_rank(binding, signal, finding is not None, now, **detail)
        error = self._nccl_error(page, epoch)
        docket.see_rank(binding, "nccl_async_error", error is not None, now, error=error)
        silent = self._silent_s(page, now) if page is not None else None
        docket.views[binding.incarnation] = RankView(binding.rank, binding.incarnation, binding.gpu, silent)
        worst = mine[0] if mine else None
        self.states.append(
            RankState(
                binding.rank,
                binding.incarnation,
                binding.gpu,
                "no heartbeat" if page is None else worst.kind.value if worst else "ok",
                page.phase.name.lower() if page else None,
                page.step if page else None,
                silent,
                worst.reason.value if worst else None,
                error,
            )
        )

    def _nccl_error(self, page: Snapshot | None, epoch: int) -> str | None:
        """Of the group that the rank is in now: what an older one has left on the page is over."""
        if page is None or not page.async_error or page.epoch != epoch or not page.phase.serving:
            return None
        return describe(page.async_error)

    def _silent_s(self, page: Snapshot, now: float) -> float | None:
        """For how long nothing on the page has changed; None when its process is gone, which others see to."""
        if page.process is ProcessState.GONE:
            return None
        seen = self._changed.get(page.incarnation)
        if seen is None or _words(seen[0]) != _words(page):
            seen = self._changed[page.incarnation] = (page, now)
        return round(now - seen[1], 3)

    def _note_standstill(self, findings: Sequence[Finding]) -> None:
        """Nobody to blame is worth one line, and no verdict."""
        nobody = next((one for one in findings if one.kind is FindingKind.NOBODY and one.confirmed), None)
        reason = nobody.reason.value if nobody else None
        if nobody is not None and reason != self._standstill:
            log.warning("group_stands_still", epoch=nobody.epoch, reason=reason, seconds=round(nobody.seconds, 2))
        self._standstill = reason


def _words(page: Snapshot) -> tuple[object, ...]:
    return (page.sequence, page.last_beat_ns, page.entered, page.completed)


def _detail(finding: Finding) -> dict[str, Any]:
    detail: dict[str, Any] = {"reason": finding.reason.value, "epoch": finding.epoch}
    if finding.slowdown is not None:
        detail["slowdown"] = round(finding.slowdown, 2)
    else:
        detail |= {"seconds": round(finding.seconds, 2), "limit_s": round(finding.limit_s, 2)}
        if witnesses := finding.evidence.get("nccl_witnesses"):
            detail["nccl_errors_at_ranks"] = witnesses
        if finding.evidence.get("nccl_unheard"):
            detail["nccl_unheard"] = True
    return detail
