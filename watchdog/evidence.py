"""Evidence: what was seen of each GPU and rank, as plain data; and how readings of the driver become evidence. Pure.

A signal is either an occurrence (an event, which has no end) or a condition (it holds from one time to another).
Times are CLOCK_MONOTONIC seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from watchdog.signals import SignalTable

KEPT_TIMES = 32
"""Occurrences of one signal whose times are kept."""
FORGET_S = 24 * 3600.0


@dataclass(frozen=True)
class Evidence:
    """One signal of one GPU or rank.

    `times`: of the latest occurrences, oldest first, or the start of a condition. `until`: None for an occurrence, the
    end of a condition, infinity while it holds. `detail` is for people.
    """

    signal: str
    times: tuple[float, ...]
    until: float | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> float:
        return self.times[0]

    @property
    def active(self) -> bool:
        """A condition that holds."""
        return self.until == float("inf")

    def last(self, now: float) -> float:
        """When it was last seen."""
        return self.times[-1] if self.until is None else min(self.until, now)

    def count_since(self, time: float) -> int:
        return sum(one >= time for one in self.times)


class EvidenceLog:
    """All evidence on one GPU or rank."""

    def __init__(self) -> None:
        self._found: dict[str, Evidence] = {}

    def occur(self, signal: str, now: float, **detail: Any) -> None:
        old = self._found.get(signal)
        times = ((*old.times, now) if old and old.until is None else (now,))[-KEPT_TIMES:]
        self._found[signal] = Evidence(signal, times, None, detail)

    def hold(self, signal: str, holds: bool, now: float, **detail: Any) -> bool:
        """Say whether a condition holds. Returns whether that is news."""
        old = self._found.get(signal)
        if holds:
            if old is not None and old.active:
                self._found[signal] = Evidence(signal, old.times, old.until, detail)
                return False
            self._found[signal] = Evidence(signal, (now,), float("inf"), detail)
            return True
        if old is not None and old.active:
            self._found[signal] = Evidence(signal, old.times, now, old.detail)
            return True
        return False

    def all(self, now: float) -> tuple[Evidence, ...]:
        """Latest first. What is a day old is forgotten."""
        self._found = {name: one for name, one in self._found.items() if one.last(now) > now - FORGET_S}
        return tuple(sorted(self._found.values(), key=lambda one: -one.last(now)))

    def forget(self) -> None:
        self._found.clear()


HW_SLOWDOWN, SW_THERMAL, HW_THERMAL, POWER_BRAKE = 0x8, 0x20, 0x40, 0x80
"""nvmlClocksEventReason* (nvml.h)."""
FABRIC_COMPLETED = 3
_ROUTE_UNHEALTHY_SHIFT, _CONFIGURATION_SHIFT = 4, 8
"""NVML_GPU_FABRIC_HEALTH_MASK_SHIFT_* (nvml.h): two bits, 1 is bad; and four bits, from 2 on bad."""


class Counter:
    """How much a counter rose within a window. A counter that falls was reset, or wrapped: it starts anew."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def rise(self, value: int, now: float, window_s: float) -> int:
        samples = self._samples
        if samples and value < samples[-1][1]:
            samples.clear()
        if not samples or value != samples[-1][1]:
            samples.append((now, value))
        while len(samples) > 1 and samples[1][0] <= now - window_s:
            samples.popleft()
        return value - samples[0][1]


class Observer:
    """Turns the readings of one GPU (see nvml.py) into its evidence."""

    def __init__(self, table: SignalTable, log: EvidenceLog) -> None:
        self._table = table
        self._log = log
        self._counters = {name: Counter() for name in ("corrected", "replays", "link_errors")}
        self._uncorrected: int | None = None
        self._links = 0
        self._fabric_completed = False
        self._recovery: str | None = None
        self.reading: Mapping[str, Any] = {}

    def observe(self, reading: Mapping[str, Any], now: float) -> None:
        self.reading = reading
        hold = self._log.hold
        status = reading["status"]
        hold("gpu_lost", status == "lost", now, error=reading.get("error"))
        hold("reset_required", status == "reset_required", now, error=reading.get("error"))
        hold("driver_error", status == "error", now, error=reading.get("error"))
        if status in ("ok", "reset_required") and "recovery" in reading:
            self._see_recovery(reading["recovery"], now)
        if status != "ok":
            return
        hold("gpu_missing", False, now)
        if "failure" in reading:
            hold("row_remap_failure", bool(reading["failure"]), now)
        if "pending" in reading:
            hold("row_remap_pending", bool(reading["pending"]), now)
        if "ecc" in reading:
            self._see_uncorrected(reading["ecc"], now)
        if "reasons" in reading:
            self._see_reasons(reading["reasons"], now)
        if "celsius" in reading:
            hot = reading["celsius"] >= self._table.threshold("temperature")
            hold("temperature", hot, now, celsius=reading["celsius"])
        for name, signal in (("corrected", "ecc_corrected_rate"), ("replays", "pcie_replay_rate"),
                             ("link_errors", "nvlink_error_rate")):  # fmt: skip
            if name in reading:
                rule = self._table.rule(signal)
                rise = self._counters[name].rise(reading[name], now, rule.per_s)
                hold(signal, rise >= self._table.threshold(signal), now, rise=rise, seconds=rule.per_s)
        if "links" in reading:
            self._links |= reading["links"]  # a link that was never up is one that is not there
            down = self._links & ~reading["links"]
            hold("nvlink_down", bool(down), now, links=[link for link in range(down.bit_length()) if down >> link & 1])
        if "fabric" in reading:
            self._see_fabric(*reading["fabric"], now=now)

    def _see_recovery(self, action: int, now: float) -> None:
        signal = f"recovery_action:{action}" if action else None
        if self._recovery is not None and signal != self._recovery:
            self._log.hold(self._recovery, False, now)
        if signal is not None:
            self._log.hold(signal, True, now, action=action)
        self._recovery = signal

    def _see_uncorrected(self, total: int, now: float) -> None:
        """Errors of before this watchdog began are not news; those since are one occurrence each time."""
        if self._uncorrected is not None and total > self._uncorrected:
            self._log.occur("ecc_uncorrected", now, errors=total - self._uncorrected, total=total)
        self._uncorrected = total

    def _see_reasons(self, reasons: int, now: float) -> None:
        hold = self._log.hold
        hold("thermal_slowdown", bool(reasons & HW_THERMAL), now, reasons=hex(reasons))
        hold("power_brake", bool(reasons & POWER_BRAKE), now, reasons=hex(reasons))
        hold("sw_thermal_slowdown", bool(reasons & SW_THERMAL), now, reasons=hex(reasons))
        only_general = bool(reasons & HW_SLOWDOWN) and not reasons & (HW_THERMAL | POWER_BRAKE)
        hold("hw_slowdown", only_general, now, reasons=hex(reasons))

    def _see_fabric(self, state: int, status: int, health: int, *, now: float) -> None:
        """Judged once registration was complete: before, the fabric manager may just be at work."""
        self._fabric_completed |= state == FABRIC_COMPLETED and status == 0
        bad = (
            state != FABRIC_COMPLETED
            or status != 0
            or health >> _ROUTE_UNHEALTHY_SHIFT & 0x3 == 1
            or health >> _CONFIGURATION_SHIFT & 0xF >= 2
        )
        detail = {"state": state, "status": status, "health": hex(health)}
        self._log.hold("fabric_unhealthy", bad and self._fabric_completed, now, **detail)
