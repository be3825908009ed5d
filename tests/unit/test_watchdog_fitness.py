"""Which GPUs the watchdog calls fit, what counts as heard, and what as in use by somebody else."""

from __future__ import annotations

from pathlib import Path

from tests.unit.test_watchdog_docket import FINE, TABLE, WALL
from watchdog.bindings import Binding, Bindings
from watchdog.docket import Docket, Mode, Present
from watchdog.fitness import DEAF_S, LEFT_S, OCCUPIED_S, Hearing, Occupancy, judge_fitness
from watchdog.state import State
from watchdog.verdict import Policy

GPUS = ("GPU-a", "GPU-b", "GPU-c")


def docket(directory: Path, policy: Policy | None = None, mode: Mode = Mode.ACT) -> Docket:
    made = Docket(TABLE, policy or Policy(), mode, State.load(directory))
    made.see_gpus({gpu: Present(index, "a GPU", (), f"slot-{index}") for index, gpu in enumerate(GPUS)}, (), 0.0)
    for gpu in GPUS:
        made.gpu(gpu).observer.observe(FINE, 0.0)
    return made


def fit(case: Docket, present: tuple[str, ...] = GPUS, heard: tuple[str, ...] = GPUS) -> dict[str, tuple[bool, str]]:
    return {one.uuid: (one.fit, one.reason) for one in judge_fitness(case, present, heard)}


def test_healthy_and_doubtful_gpus_are_fit(tmp_path: Path) -> None:
    case = docket(tmp_path)
    case.see_event("GPU-b", "xid", 74, 1.0)
    case.review(1.0, WALL)
    found = judge_fitness(case, GPUS, GPUS)
    assert [(one.index, one.fit, one.verdict.value) for one in found] == [
        (0, True, "ok"), (1, True, "suspect"), (2, True, "ok"),
    ]  # fmt: skip
    assert found[1].reason == "xid 74: NVLink error"
    assert found[0].as_json() == {
        "uuid": "GPU-a", "index": 0, "slot": "slot-0", "fit": True, "reason": "", "verdict": "ok",
    }  # fmt: skip


def test_a_gpu_that_is_to_be_removed_is_not(tmp_path: Path) -> None:
    case = docket(tmp_path)
    case.see_event("GPU-a", "xid", 79, 1.0)
    case.review(1.0, WALL)
    assert fit(case)["GPU-a"] == (False, "xid 79: GPU has fallen off the bus")
    case.review(100.0, WALL + 99)
    assert fit(case)["GPU-a"] == (True, ""), "probation is over"


def test_nor_one_in_quarantine_until_it_is_released(tmp_path: Path) -> None:
    case = docket(tmp_path, Policy(quarantine_failures=1))
    case.see_event("GPU-a", "xid", 79, 1.0)
    case.review(1.0, WALL)
    case.review(100.0, WALL + 99)
    is_fit, reason = fit(case)["GPU-a"]
    assert not is_fit and "quarantine" in reason
    assert case.state.release("GPU-a", WALL + 100)
    case.review(101.0, WALL + 101)
    assert fit(case)["GPU-a"] == (True, "")


def test_nor_one_that_is_not_heard_and_absent_ones_are_left_out(tmp_path: Path) -> None:
    case = docket(tmp_path)
    case.review(1.0, WALL)
    found = fit(case, ("GPU-c", "GPU-a", "index:4"), ("GPU-a", "GPU-b"))
    assert found == {"GPU-a": (True, ""), "GPU-c": (False, "its events are not heard yet")}


def observing(tmp_path: Path, quarantined: str) -> Docket:
    """In observe mode, after a life in which a GPU came into quarantine; GPU-a has failed since."""
    before = docket(tmp_path, Policy(quarantine_failures=1))
    before.see_event(quarantined, "xid", 79, 1.0)
    before.review(1.0, WALL)
    before.state.save()
    case = docket(tmp_path, mode=Mode.OBSERVE)
    case.see_event("GPU-a", "xid", 79, 100.0)
    case.review(100.0, WALL + 100)
    return case


def test_in_observe_mode_no_gpu_is_kept_from_use(tmp_path: Path) -> None:
    case = observing(tmp_path, quarantined="GPU-c")
    found = fit(case, heard=GPUS[:1])
    assert [is_fit for is_fit, _ in found.values()] == [True] * 3
    assert found["GPU-a"][1] == "xid 79: GPU has fallen off the bus", "it is said"
    assert "quarantine" in found["GPU-c"][1]


def test_numbers_in_a_reason_are_no_news(tmp_path: Path) -> None:
    case = docket(tmp_path)
    keys = []
    for now in (1.0, 70.0, 80.0, 90.0):
        case.gpu("GPU-a").log.hold("thermal_slowdown", True, now, reasons="0x40")
        case.review(now, WALL + now)
        (one, *_) = judge_fitness(case, GPUS, GPUS)
        keys.append((one.key, one.reason))
    assert keys[2][0] == keys[3][0] and keys[2][1] != keys[3][1]
    assert keys[0][0] != keys[2][0], "it went from suspect to drain"


def test_short_deafness_is_forgiven_and_a_gpu_that_comes_back_must_be_heard_anew() -> None:
    hearing = Hearing()
    hearing.note((), (), 0.0)
    assert hearing.heard(100.0) is None, "nothing is known before the driver has listed anything"
    hearing.note((), GPUS, 100.0)
    assert hearing.heard(100.5) is None
    assert hearing.heard(100.0 + DEAF_S + 0.1) == frozenset(), "nobody listens"
    hearing.note(GPUS, GPUS, 101.0)
    hearing.note((), GPUS, 102.0)
    assert hearing.heard(103.0) == frozenset(GPUS)
    assert hearing.heard(101.0 + DEAF_S + 0.1) == frozenset()
    hearing.note((), GPUS[:2], 103.0)
    hearing.note((), GPUS, 103.1)
    assert hearing.heard(103.2) == frozenset(GPUS[:2])


def bound(*gpus: str | None, pids: tuple[int, ...] = (11,)) -> Bindings:
    return Bindings(1, tuple(Binding(rank, 10 + rank, gpu, pids) for rank, gpu in enumerate(gpus)), instance="first")


def test_nor_one_on_which_somebody_else_computes(tmp_path: Path) -> None:
    case = docket(tmp_path)
    case.review(1.0, WALL)
    (_, found, _) = judge_fitness(case, GPUS, GPUS, {"GPU-b": (4712, 4711)})
    assert (found.fit, found.reason) == (False, "in use by a process that is no rank (pid 4711, 4712)")
    (_, free, _) = judge_fitness(case, GPUS, GPUS, {})
    assert free.fit and free.key != found.key, "that is news"


def test_in_observe_mode_such_a_process_alone_keeps_a_gpu_from_use(tmp_path: Path) -> None:
    case = observing(tmp_path, quarantined="GPU-b")
    found = judge_fitness(case, GPUS, (), {"GPU-a": (4711,), "GPU-b": (4711,)})
    assert [one.fit for one in found] == [False, False, True]
    taken = "in use by a process that is no rank (pid 4711)"
    assert found[0].reason == f"{taken}; xid 79: GPU has fallen off the bus"
    assert found[1].reason.startswith(taken), "quarantine is not why"


def test_a_process_counts_where_it_stays_and_no_rank_is_bound() -> None:
    occupancy = Occupancy()
    occupancy.note({"GPU-a": [4711], "GPU-b": [4711], "GPU-c": []}, bound("GPU-a"), 0.0)
    assert occupancy.occupied(0.0) == {}, "it may be a rank that has just been started"
    occupancy.note({"GPU-a": [4711], "GPU-b": [4711], "GPU-c": []}, bound("GPU-a"), OCCUPIED_S)
    assert occupancy.occupied(OCCUPIED_S) == {"GPU-b": (4711,)}
    occupancy.note({"GPU-a": [4711], "GPU-b": []}, bound("GPU-a"), OCCUPIED_S + 1)
    assert occupancy.occupied(OCCUPIED_S + 1) == {}
    occupancy.note({"GPU-b": [4711]}, bound("GPU-a"), OCCUPIED_S + 2)
    assert occupancy.occupied(OCCUPIED_S + 2) == {}, "it counts from anew"


def test_ranks_and_what_is_left_of_them_do_not_count() -> None:
    occupancy = Occupancy()
    for now in (0.0, 5.0):  # in another PID namespace, so that no pid is known
        occupancy.note({"GPU-a": [1, 2], "GPU-b": [11]}, bound("GPU-a", "GPU-a"), now)
        assert occupancy.occupied(now) == {}, "ranks may share a GPU; pid 11 is a rank's, wherever it is"
    occupancy.note({"GPU-a": [1]}, bound(), 5.0 + LEFT_S)
    assert occupancy.occupied(5.0 + LEFT_S) == {}, "it is ending"
    for later in (0.1, 0.1 + OCCUPIED_S):
        occupancy.note({"GPU-a": [1]}, bound(), 5.0 + LEFT_S + later)
    assert occupancy.occupied(5.0 + LEFT_S + later) == {"GPU-a": (1,)}, "it does not end"


def test_nothing_counts_while_a_rank_may_be_anywhere() -> None:
    occupancy = Occupancy()
    for now in (0.0, 5.0):
        occupancy.note({"GPU-a": [4711]}, bound(None), now)
        assert occupancy.occupied(now) == {}
