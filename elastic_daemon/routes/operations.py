"""Operators' orders: handed to the controller, awaited, and remembered.

The controller answers every order at once with a first report, be it a refusal, and reports each change after that.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

from elastic_daemon import protocol as p
from elastic_daemon.errors import OrderUnanswered

KEPT = 256
"""Reports that are remembered."""

FIRST_REPORT_S = 5.0
"""How long the first report may take. It comes while the controller is told, unless there is none."""

GRACE_S = 30.0
"""Beyond an order's own deadline: what was begun has to be undone first."""

HTTP_STATUS = {
    p.OperationState.RUNNING: 200,
    p.OperationState.DONE: 200,
    p.OperationState.INVALID: 400,
    p.OperationState.TIMED_OUT: 408,
    p.OperationState.BUSY: 409,
    p.OperationState.ROLLED_BACK: 500,
}

Order = p.ScaleOrder | p.RankOrder


def new_id() -> str:
    """Of an operation: short, unique, and no path of its own."""
    return f"op-{secrets.token_hex(4)}"


class OperationDesk:
    """`tell` hands an event to the controller, which calls `changed` back, at the latest when the loop next turns."""

    def __init__(self, tell: Callable[[p.Event], None]) -> None:
        self._tell = tell
        self._reports: dict[str, p.OperationReport] = {}
        self._news = asyncio.Event()
        self._closed: str | None = None

    async def submit(self, order: Order, wait: bool) -> p.OperationReport:
        """Give an order. Returns its first report, or with `wait` the one that it ends with.

        With `wait` that may still be a running one, `GRACE_S` after the order's deadline.

        Raises:
            OrderUnanswered: the daemon stops, or does not take orders.
        """
        if self._closed is not None:
            raise OrderUnanswered(self._closed)
        self._tell(order)
        first = await self._report(order.operation, FIRST_REPORT_S, lambda report: True)
        if first is None:
            raise OrderUnanswered(f"the controller has not taken the order within {FIRST_REPORT_S:g} s")
        if not wait or first.state.ended:
            return first
        ended = await self._report(order.operation, order.timeout_s + GRACE_S, lambda report: report.state.ended)
        return ended or self._reports[order.operation]

    def changed(self, report: p.OperationReport) -> None:
        self._reports[report.operation] = report
        self._forget()
        self._wake()

    def get(self, operation: str) -> p.OperationReport | None:
        return self._reports.get(operation)

    def all(self) -> tuple[p.OperationReport, ...]:
        """The latest ones, oldest first."""
        return tuple(self._reports.values())

    @property
    def busy(self) -> bool:
        return any(not report.state.ended for report in self._reports.values())

    def close(self, reason: str) -> None:
        """Take no more orders, and let nobody wait any longer."""
        self._closed = reason
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _forget(self) -> None:
        """The oldest go first, but none that runs."""
        ended = [operation for operation, report in self._reports.items() if report.state.ended]
        for operation in ended[: max(0, len(self._reports) - KEPT)]:
            del self._reports[operation]

    async def _report(
        self, operation: str, timeout_s: float, enough: Callable[[p.OperationReport], bool]
    ) -> p.OperationReport | None:
        """The first report that is `enough`; None: not within `timeout_s`. Raises OrderUnanswered once closed."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    news = self._news
                    report = self._reports.get(operation)
                    if report is not None and enough(report):
                        return report
                    if self._closed is not None:
                        raise OrderUnanswered(f"{self._closed}; operation {operation} was under way")
                    await news.wait()
        except TimeoutError:
            return None
