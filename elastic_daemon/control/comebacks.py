"""When a rank that was lost is started again. Pure."""

from __future__ import annotations

from collections import Counter, deque

from elastic_daemon.control.policy import Policy


class Comebacks:
    """Losses and failed starts of each rank.

    A rank that served and was lost may always come back, later and later if that happens often. One whose new process
    fails before it serves is tried a few times and then left to the operator.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._failures: Counter[int] = Counter()
        self._losses: dict[int, deque[float]] = {}

    def adopt(self, policy: Policy) -> None:
        self._policy = policy

    def served(self, rank: int) -> None:
        """It is a member that steps: its failures before are forgiven."""
        self._failures[rank] = 0

    def forgive(self, rank: int) -> None:
        """An operator wants it back, or it is to be tried elsewhere."""
        self._failures[rank] = 0
        self._losses.pop(rank, None)

    def after_loss(self, rank: int, now: float, *, had_served: bool) -> float | None:
        """When to start it again; None: not without an operator."""
        losses = self._losses.setdefault(rank, deque())
        losses.append(now)
        while losses[0] < now - self._policy.comeback_window_s:
            losses.popleft()
        if not had_served:
            self._failures[rank] += 1
            if self._failures[rank] >= self._policy.max_start_attempts:
                return None
        return now + self._policy.backoff(len(losses))
