"""How patient the controller is, and how large the deployment. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_daemon.placement import minimum_ranks


@dataclass(frozen=True)
class Policy:
    """`slots` are per rank and layer, `target` the ranks to begin with. Durations in seconds."""

    target: int
    experts: int
    slots: int
    start_timeout_s: float = 300.0  # process start -> standby
    max_ranks: int = 1024
    restore: bool = False  # whether lost ranks are started again and rejoin
    respread: bool = False  # whether experts are spread anew after each change of the group
    host_copies: bool = False  # whether experts with a single copy get one in host memory
    max_start_attempts: int = 3  # per rank: during start-up, and in a row before it serves again
    drain_timeout_s: float = 30.0  # a rank that the watchdog wants drained leaves after this in any case
    spread_delay_s: float = 0.5  # from a change of the group until its experts are spread anew: requests come first
    spread_timeout_s: float = 60.0
    join_delay_s: float = 0.05  # ranks that are ready almost at once join together
    comeback_window_s: float = 60.0  # losses of a rank within it delay its next start
    restart_backoff_s: float = 0.5  # doubles with every further attempt
    max_backoff_s: float = 10.0
    fault_grace_s: float = 0.5  # a fault is often the first sign of a death: how long to wait for the second
    quiesce_timeout_s: float = 1.0
    fence_timeout_s: float = 3.0
    regroup_timeout_s: float = 3.0
    max_regroup_failures: int = 5  # in a row, with the same members
    max_vain_faults: int = 10  # in a row without a death, before any request got a token
    sync_timeout_s: float = 5.0  # ranks resumed -> the front end has placed every request
    hold_timeout_s: float = 60.0  # how long requests are held while unavailable
    frontend_start_timeout_s: float = 180.0
    max_frontend_exits: int = 5  # within frontend_window_s
    frontend_window_s: float = 60.0

    @property
    def min_ranks(self) -> int:
        """Fewest ranks that hold every expert."""
        return minimum_ranks(self.experts, self.slots)

    def backoff(self, attempt: int) -> float:
        """Before the next try, after `attempt` failed ones."""
        return min(self.restart_backoff_s * 2.0 ** min(attempt - 1, 32), self.max_backoff_s)
