"""Which paths belong to the supervisor, whoever accepts the connection."""

from __future__ import annotations

CONTROL_PATHS = frozenset({"/health", "/livez", "/readyz", "/metrics", "/events", "/experts", "/experts/verify"})


def is_control_path(path: str) -> bool:
    return path in CONTROL_PATHS
