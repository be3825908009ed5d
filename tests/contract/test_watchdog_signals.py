"""Every signal of `signals.toml`: made by the simulated driver, read through the real pynvml, judged, and told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.contract import test_watchdog_nvml
from tests.contract.watchdog_daemon import Watchdog, until, watching_quickly
from watchdog.signals import SignalClass, load_table
from watchdog.simulator import Simulator, Throttle

pytestmark = pytest.mark.contract

TABLE = load_table()
FORGOTTEN_XID, STRANGE_ACTION = 9999, 200
"""Neither is in the table."""
GONE = {"gpu_lost", "gpu_missing"}


@dataclass(frozen=True)
class Case:
    """`signals`: all that the watchdog must have seen of the GPU. `cause`: the one that decides, where one must."""

    fault: Callable[[Simulator, str], object]
    verdict: str
    signals: frozenset[str]
    cause: str | None = None


def case(verdict: str, fault: Callable[[Simulator, str], object], cause: str | None, *others: str) -> Case:
    return Case(fault, verdict, frozenset({*others, *([cause] if cause else [])}), cause)


def recovery(verdict: str, action: int) -> Case:
    def fault(simulator: Simulator, gpu: str) -> None:
        simulator.recovery_action(gpu, action)

    signals = (f"recovery_action:{action}", "recovery_action_changed")
    return case(verdict, fault, None, *signals) if verdict == "suspect" else case(verdict, fault, *signals)


CASES = {
    # First: once a GPU has been lost, NVML may be initialised anew before the next loss is read.
    "lost": case("exclude", lambda s, g: s.lose(g), None, *GONE),
    "lost, and said so": case("exclude", lambda s, g: s.lose(g, event=True), "gpu_unavailable"),
    "reset required": case("exclude", lambda s, g: s.reset_required(g), "reset_required"),
    "error": case("suspect", lambda s, g: s.driver_error(g), "driver_error"),
    **{f"action {action}": recovery("exclude", action) for action in (1, 2, 6, 7)},
    **{f"action {action}": recovery("drain", action) for action in (3, 4, STRANGE_ACTION)},
    "action 5": recovery("suspect", 5),
    "remap failure": case("exclude", lambda s, g: s.remap_failure(g), "row_remap_failure"),
    "remap pending": case("suspect", lambda s, g: s.remap_pending(g), "row_remap_pending"),
    "uncorrectable ECC": case("drain", lambda s, g: s.ecc(g), None, "ecc_double_bit", "ecc_uncorrected"),
    "corrected ECC": case("suspect", lambda s, g: s.ecc(g, corrected=True), "ecc_single_bit"),
    "much corrected ECC": case(
        "suspect", lambda s, g: s.ecc(g, 80, corrected=True), None, "ecc_single_bit", "ecc_corrected_rate"
    ),
    "NVLink down": case("drain", lambda s, g: s.nvlink_down(g, 3), "nvlink_down"),
    "NVLink errors": case("drain", lambda s, g: s.nvlink_errors(g, 3, 60), "nvlink_error_rate"),
    "fabric": case("drain", lambda s, g: s.fabric_unhealthy(g), "fabric_unhealthy"),
    "PCIe replays": case("drain", lambda s, g: s.pcie_replays(g, 60), "pcie_replay_rate"),
    "thermal": case("drain", lambda s, g: s.throttle(g, Throttle.THERMAL), "thermal_slowdown"),
    "power brake": case("drain", lambda s, g: s.throttle(g, Throttle.POWER_BRAKE), "power_brake"),
    "software thermal": case("suspect", lambda s, g: s.throttle(g, Throttle.SW_THERMAL), "sw_thermal_slowdown"),
    "slowdown": case("suspect", lambda s, g: s.throttle(g, Throttle.HW_SLOWDOWN), "hw_slowdown"),
    "hot": case("suspect", lambda s, g: s.temperature(g, 97), "temperature"),
    "xid 13": case("suspect", lambda s, g: s.xid(g, 13), "xid:13"),
    "xid 74": case("suspect", lambda s, g: s.xid(g, 74), "xid:74"),
    "forgotten xid": case("suspect", lambda s, g: s.xid(g, FORGOTTEN_XID), f"xid:{FORGOTTEN_XID}"),
}
ALONE = {
    "driver_late": test_watchdog_nvml.test_wedged_driver_excludes_within_two_seconds_and_others_are_still_read,
    "driver_wedged": test_watchdog_nvml.test_wedged_driver_excludes_within_two_seconds_and_others_are_still_read,
    "driver_slow": test_watchdog_nvml.test_slow_driver_is_suspect_only,
}
"""Tests of their own: what they break takes long to mend."""

NOT_OF_THE_DRIVER = {"hung", "straggler", "nccl_async_error", "repeat_offender", "quarantine"}
EVERY_XID = len(CASES)
"""The GPU after those of the cases."""


@pytest.fixture(scope="module")
def watchdog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watchdog]:
    """A GPU for each case, so that evidence of other faults does not mix in."""
    with watching_quickly(tmp_path_factory.mktemp("signals"), len(CASES) + 1) as watchdog:
        yield watchdog


def seen(watchdog: Watchdog, uuid: str) -> set[str]:
    """Signals that the watchdog has seen of a GPU: the driver's events, and all that it has counted in a verdict. But
    for those that a busy machine adds."""
    events = [line for line in watchdog.events("driver_event") if line["gpu"] == uuid]
    shown = [*watchdog.gpu(uuid)["evidence"]]
    for _, verdict in watchdog.daemon.of(gpu=uuid):
        shown += verdict["evidence"]
    found = {f"xid:{line['number']}" if line["signal"] == "xid" else line["signal"] for line in events}
    return (found | {one["signal"] for one in shown}) - ALONE.keys()


def in_table(signal: str) -> str:
    """The entry of the table that a signal has its rule from."""
    return signal if signal in TABLE.rules else f"{signal.partition(':')[0]}:other"


@pytest.mark.parametrize("name", CASES)
def test_what_the_driver_says_is_seen_and_judged(watchdog: Watchdog, name: str) -> None:
    wanted = CASES[name]
    uuid = watchdog.gpus[list(CASES).index(name)]
    watchdog.until_listening()
    assert not seen(watchdog, uuid)
    watchdog.daemon.verdicts.clear()
    wanted.fault(watchdog.sim, uuid)
    try:
        cause: dict[str, Any] = {"signal": wanted.cause} if wanted.cause else {}
        _, verdict = watchdog.verdict(gpu=uuid, verdict=wanted.verdict, **cause)
        assert verdict["evidence"] and verdict["reason"]
        until(lambda: wanted.signals <= seen(watchdog, uuid), f"{set(wanted.signals)}", 5, watchdog.explain)
        if wanted.verdict == "suspect":
            time.sleep(1.0)  # hysteresis of this table is shorter
            assert not watchdog.daemon.of(gpu=uuid, act=True)
        assert seen(watchdog, uuid) - wanted.signals <= (GONE if "lost" in name else set())
    finally:
        watchdog.sim.heal(uuid)


def test_every_xid_is_read_with_its_number(watchdog: Watchdog) -> None:
    uuid = watchdog.gpus[EVERY_XID]
    codes = [
        int(code)
        for kind, _, code in (signal.partition(":") for signal in TABLE.rules)
        if kind == "xid" and code.isdigit()
    ]
    watchdog.until_listening()
    for code in codes:
        watchdog.sim.xid(uuid, code)
    until(lambda: {f"xid:{code}" for code in codes} <= seen(watchdog, uuid), "all Xids", 10, watchdog.explain)
    counted = {one["signal"] for _, body in watchdog.daemon.of(gpu=uuid) for one in body["evidence"]}
    ignored = {f"xid:{code}" for code in codes if TABLE.rule(f"xid:{code}").cls is SignalClass.IGNORE}
    assert ignored and not counted & ignored


def test_every_signal_has_a_case() -> None:
    """A new entry of the table needs one here, or a good reason."""
    cases = {in_table(signal) for case in CASES.values() for signal in case.signals}
    xids = {signal for signal in TABLE.rules if signal.startswith("xid:")}
    assert "xid:other" in cases
    assert cases | xids | ALONE.keys() | NOT_OF_THE_DRIVER == TABLE.rules.keys()
    assert not NOT_OF_THE_DRIVER & (cases | ALONE.keys())
