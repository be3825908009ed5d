"""How a recovery ends, how the front end lives, and how the daemon stops: what the controller needs of both. Pure."""

from __future__ import annotations

from elastic_daemon import protocol as p
from elastic_daemon.control.control_state import CHANGING, ControlState, Frontend, Phase
from elastic_daemon.control.deadlines import Wait

EXIT_STOPPED, EXIT_START, EXIT_FRONTEND = 0, 3, 4


class ServiceControl(ControlState):
    def _finish(self, requests: p.RequestCounts | None) -> None:
        """The recovery is over; a start that has never served counts as its first."""
        assert self._recovery is not None
        self._lap()
        report = self._recovery.report(self.epoch, not self._last, requests, self._now)
        self._recovery = None
        self._phase = Phase.SERVING
        self._deadlines.disarm(Wait.SYNC)
        self._last_recovery = self._last[report.kind] = report
        self._emit(p.RecoveryDone(report))
        self._watch_frontend()

    def _start_frontend(self) -> None:
        self._frontend = Frontend.STARTING
        self._emit(p.StartFrontend())
        self._watch_frontend()

    def _watch_frontend(self) -> None:
        """Its time to start runs from when the ranks first serve: it may have to wait for them. It runs once."""
        watched = Wait.FRONTEND_START in self._deadlines
        if self._frontend is Frontend.STARTING and self._phase is Phase.SERVING and not watched:
            self._deadlines.arm(Wait.FRONTEND_START, self._now + self._policy.frontend_start_timeout_s)

    def _on_frontend_exited(self, status: str) -> None:
        """Costs its requests; ranks and weights are untouched."""
        self._frontend = Frontend.DOWN
        self._deadlines.disarm(Wait.FRONTEND_START)
        self._record("frontend_exited", status=status)
        if self._ending:
            return self._exit(EXIT_STOPPED, "the front end is gone, and its requests with it")
        exits, window = self._frontend_exits, self._policy.frontend_window_s
        exits.append(self._now)
        while exits[0] < self._now - window:
            exits.popleft()
        if len(exits) > self._policy.max_frontend_exits:
            return self._exit(EXIT_FRONTEND, f"the front end ended {len(exits)} times in {window:g} s, last: {status}")
        self._deadlines.arm(Wait.FRONTEND_RESTART, self._now + self._policy.backoff(len(exits)))
        if self._phase is Phase.RESUMING:
            self._finish(None)
        self._publish()

    def _on_stop(self, timeout_s: float) -> None:
        deadline = self._now + timeout_s
        if self._phase is Phase.STOPPING:  # asked again: may shorten the wait
            deadline = min(deadline, *self._deadlines.of(Wait.DRAIN).values())
        elif self._phase in CHANGING and self._frontend is Frontend.READY:
            self._stop_by = deadline if self._stop_by is None else min(deadline, self._stop_by)
            self._record("stop_waits", reason="the group is changing, and requests wait for it")
            return self._deadlines.arm(Wait.DRAIN, self._stop_by)
        elif self._phase not in (Phase.RESUMING, Phase.SERVING) or self._frontend is not Frontend.READY:
            return self._exit(EXIT_STOPPED, "stopped on request; nothing was being served")
        elif self._recovery is not None:
            self._finish(None)
        self._phase = Phase.STOPPING
        self._trouble = "stop requested"
        self._deadlines.clear()
        self._deadlines.arm(Wait.DRAIN, deadline)
        self._publish()

    def _stop_when_serving(self) -> None:
        """A stop that was asked for while the group changed: its requests go on first, and then to their end."""
        if self._stop_by is None or self._phase in CHANGING or self._phase is Phase.RESUMING:
            return
        stop_by, self._stop_by = self._stop_by, None
        self._on_stop(max(stop_by - self._now, 0.0))

    def _exit(self, code: int, reason: str) -> None:
        self._phase, self._stop_by = Phase.EXITED, None
        self._trouble = reason
        self._deadlines.clear()
        self._record("exit", code=code, reason=reason)
        self._publish()
        self._emit(p.StopAll())
        self._emit(p.Exit(code, reason))
