"""Experts move while the group serves: spread anew after each change of it, copied to host memory where copies are few.

Pure. At most one move is under way. A new epoch voids it: what ranks then say they hold is what counts.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from elastic_daemon import protocol as p
from elastic_daemon.control.control_state import Phase
from elastic_daemon.control.deadlines import Wait
from elastic_daemon.control.group_control import GroupControl
from elastic_daemon.control.respreading import Purpose, Spread
from elastic_daemon.membership import Rank
from elastic_daemon.placement import Placement, copies, respread


class SpreadControl(GroupControl):
    def _on_respread(self, event: p.RankRespread, row: Rank) -> None:
        self._set_column(row, event.column)  # also when it is late
        spread = self._spread
        if spread is None or event.serial != spread.serial:
            return
        spread.waiting.discard(row.identity)
        spread.bytes += event.bytes
        if not spread.waiting:
            self._spread = None
            self._deadlines.disarm(Wait.SPREAD)
            seconds, moved = round(self._now - spread.began, 4), spread.bytes
            self._record("experts_spread", epoch=self.epoch, purpose=spread.purpose, bytes=moved, seconds=seconds)
            if spread.purpose is Purpose.SAFETY:
                self._store_single_copies()

    def _on_column(self, event: p.ColumnChanged, row: Rank) -> None:
        """vLLM's balancing has moved experts."""
        self._set_column(row, event.column)
        self._wait_to_store()

    def _on_stored(self, event: p.RankStored) -> None:
        self._host_copies.update(event.experts)
        count, seconds = len(event.experts), round(event.seconds, 4)
        self._record("experts_stored", rank=event.rank, experts=count, bytes=event.bytes, seconds=seconds)

    def _set_column(self, row: Rank, column: p.Column) -> None:
        if self._placement is None or row.rank not in self._placement.ranks or self._column_error(column):
            return
        self._placement = self._placement.with_columns({row.rank: np.array(column)})

    def _spread_late(self) -> None:
        """Whoever is late holds what it holds: nothing is wrong but the time."""
        spread, self._spread = self._spread, None
        if spread is not None:
            ranks = sorted(rank for rank, _ in spread.waiting)
            self._record("spread_late", epoch=self.epoch, purpose=spread.purpose, ranks=ranks)
            self._wait_to_store()

    def _wait_to_spread(self) -> None:
        """After a change of the group, once it serves."""
        if self._spread_due and Wait.SPREAD_START not in self._deadlines:
            self._deadlines.arm(Wait.SPREAD_START, self._now + self._policy.spread_delay_s)

    def _spread_for_safety(self) -> None:
        if self._phase is not Phase.SERVING or self._departure is not None or self._spread is not None:
            return  # comes again when it is over
        self._spread_due = False
        if not self._policy.respread:
            return self._store_single_copies()
        assert self._placement is not None
        members = [row.rank for row in self._ranks.members]
        plan = respread(self._placement.restricted(members), members, self._host_copies)
        if plan.loads:
            self._begin_spread(plan.placement, Purpose.SAFETY, len(plan.loads))
        else:
            self._store_single_copies()

    def _begin_spread(self, placement: Placement, purpose: Purpose, loads: int) -> None:
        members = self._ranks.members
        self._spread_serial += 1
        waiting = {row.identity for row in members}
        self._spread = Spread(self._spread_serial, purpose, placement, loads, waiting, self._now)
        self._deadlines.arm(Wait.SPREAD, self._now + self._policy.spread_timeout_s)
        self._record("spreading_experts", epoch=self.epoch, purpose=purpose, loads=loads)
        for row in members:
            self._emit(p.Respread(row.rank, self.epoch, self._spread_serial, placement))

    def _wait_to_store(self) -> None:
        """More may move at once: each layer is told of by itself."""
        if self._policy.host_copies and Wait.STORE not in self._deadlines:
            self._deadlines.arm(Wait.STORE, self._now + self._policy.spread_delay_s)

    def _store_single_copies(self) -> None:
        """Experts that one more loss could take from all GPUs get a copy in host memory. Each is stored once."""
        if not self._policy.host_copies or self._placement is None:
            return
        wanted = defaultdict(list)
        for layer, expert in np.argwhere(copies(self._placement) == 1).tolist():
            if (layer, expert) not in self._host_copies:
                for rank, column in self._placement.columns.items():
                    held = np.flatnonzero(column[layer] == expert)
                    if len(held):
                        wanted[rank].append((layer, int(held[0]), expert))
                        break
        for rank, experts in wanted.items():
            self._emit(p.StoreExperts(rank, self.epoch, tuple(experts)))
