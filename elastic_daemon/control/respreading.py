"""Experts on the move while the group serves: the books. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from elastic_daemon.placement import Placement
from elastic_daemon.protocol import Identity


class Purpose(StrEnum):
    SAFETY = "safety"  # as many copies as slots allow
    EVACUATION = "evacuation"  # who stays comes to hold every expert


@dataclass
class Spread:
    """`waiting`: members that have not reported yet."""

    serial: int
    purpose: Purpose
    placement: Placement
    loads: int
    waiting: set[Identity]
    began: float
    bytes: int = 0
