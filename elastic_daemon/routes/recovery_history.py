"""The latest recoveries, for `/recoveries`."""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime
from typing import Any

from elastic_daemon.protocol import RecoveryReport
from elastic_daemon.routes.health import report_json

KEPT = 64


class RecoveryHistory:
    def __init__(self) -> None:
        self._rows: deque[dict[str, Any]] = deque(maxlen=KEPT)

    def record(self, report: RecoveryReport, active: int, wall: float) -> None:
        """`active`: ranks in the group that it led to; `wall`: Unix seconds of its end."""
        ended = datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds")
        self._rows.append({**report_json(report), "active": active, "ended": ended})

    def to_json(self) -> list[dict[str, Any]]:
        """Oldest first."""
        return list(self._rows)
