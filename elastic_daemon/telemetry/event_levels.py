"""How loud each event is in the log: the levels by which an operator searches. Pure.

Error: it costs service, or requests. Warning: somebody should look at it. Info: everything else.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, Final


class Level(IntEnum):
    INFO = logging.INFO
    WARNING = logging.WARNING
    ERROR = logging.ERROR


LEVELS: Final[Mapping[str, Level]] = {
    **dict.fromkeys(
        (
            "certificate_unreadable",
            "frontend_not_in_step",
            "gpu_barred",
            "gpu_not_ours",
            "gpus_unknown",
            "gpus_unread",
            "operation_ended",
            "quiesce_overdue",
            "rank_excluded",
            "rank_fault",
            "rank_left_out",
            "rank_stays",
            "rank_waits_for_gpu",
            "regroup_failed",
            "reload_failed",
            "spread_late",
            "supervisor_stalled",
            "target_ignored",
            "verdict",
            "verdict_reconsidered",
            "verdict_refused",
            "watchdog_down",
        ),
        Level.WARNING,
    ),
    **dict.fromkeys(
        ("exit", "frontend_exited", "hold_over", "requests_given_up", "requests_lost", "stopped", "unavailable"),
        Level.ERROR,
    ),
}
"""Of the events that are not info."""

ORDINARY: Final[Mapping[str, tuple[str, frozenset[object]]]] = {
    "exit": ("code", frozenset({0})),
    "operation_ended": ("state", frozenset({"done", "invalid"})),
    "stopped": ("code", frozenset({0})),
    "verdict": ("verdict", frozenset({"ok"})),
}
"""Events that are info after all where this field has one of these values."""


def level_of(name: str, fields: Mapping[str, Any]) -> Level:
    """The level of one event."""
    field, values = ORDINARY.get(name, ("", frozenset()))
    if field in fields and fields[field] in values:
        return Level.INFO
    return LEVELS.get(name, Level.INFO)
