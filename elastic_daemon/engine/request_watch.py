"""What is seen of requests on their way, beside where they run: how they queue, how long clients wait, their spans."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

from elastic_daemon.gates.admission import Queue
from elastic_daemon.telemetry.client_gaps import ClientGaps

if TYPE_CHECKING:
    from elastic_daemon.telemetry.tracing import AttemptTraces


class RequestWatch:
    def __init__(self) -> None:
        self.queue = Queue()
        self.traces: AttemptTraces | None = None
        """Spans of attempts; None where no traces are wanted."""
        self._gaps = ClientGaps()
        self._closed_gaps: list[float] = []

    def take_gaps(self) -> list[float]:
        """Seconds that clients have waited for their next token across a change of the group, since the last call."""
        gaps, self._closed_gaps = self._closed_gaps, []
        return gaps

    def attempt(self, request_id: str, request: EngineCoreRequest, rank: int, epoch: int, tokens: int) -> None:
        """An attempt goes to `rank`; the client has `tokens` already."""
        if self.traces is not None:
            self.traces.begin(request_id, rank, epoch, tokens, request.trace_headers)

    def attempts_over(self, request_ids: Iterable[str], reason: str) -> None:
        """Attempts have ended, and others may follow."""
        if self.traces is not None:
            self.traces.interrupt(request_ids, reason)

    def group_changed(self, request_ids: Iterable[str]) -> None:
        """What these requests get next comes from another group, or from another rank."""
        self._gaps.interrupt(request_ids)

    def delivered(self, request_id: str, output: EngineCoreOutput, now: float) -> None:
        self.queue.begin(request_id, now)
        if output.new_token_ids and (gap := self._gaps.delivered(request_id, now)) is not None:
            self._closed_gaps.append(gap)
        if self.traces is not None:
            self.traces.token(request_id, len(output.new_token_ids))
        if output.finished:
            self.ended((request_id,), str(output.finish_reason))

    def ended(self, request_ids: Collection[str], reason: str) -> None:
        """Requests have ended, however far they got."""
        self.queue.leave(request_ids)
        for request_id in request_ids:
            self._gaps.forget(request_id)
            if self.traces is not None:
                self.traces.end(request_id, reason)
