"""Which GPUs ranks start on, start without, and move to. The pool itself: test_gpu_pool.py."""

from __future__ import annotations

from dataclasses import replace

from elastic_daemon import protocol as p
from elastic_daemon.control.control_state import Phase
from elastic_daemon.control.gpu_pool import GpuPool
from elastic_daemon.membership import RankState, Status
from tests.unit.driver import LAYERS, POLICY, Shell, events, of

A, B, C, D, SPARE = UUIDS = ("GPU-a", "GPU-b", "GPU-c", "GPU-d", "GPU-spare")
PROBATION_S = 2.0
RESTORING = replace(POLICY, restore=True)
XID = "xid 79: GPU has fallen off the bus"


def pool(*uuids: str) -> GpuPool:
    return GpuPool(uuids, 1, PROBATION_S)


def on(*uuids: str) -> Shell:
    """Four ranks serve on the first four of these."""
    return Shell(RESTORING, pool(*uuids)).serve()


def without(uuid: str) -> tuple[p.GpuSeen, ...]:
    """One of the first four is not fit."""
    return tuple(p.GpuSeen(other, other != uuid, "" if other != uuid else XID) for other in (A, B, C, D))


def condemn(shell: Shell, rank: int, kind: p.VerdictKind = p.VerdictKind.EXCLUDE) -> list[p.Action]:
    gpu = gpu_of(shell, rank)
    assert gpu is not None
    return shell.send(p.TelemetryVerdict(gpu, (shell.identity(rank),), kind, True, XID, shell.now))


def gpu_of(shell: Shell, rank: int) -> str | None:
    return {row.rank: row.gpu for row in shell.controller.snapshot(shell.now).ranks}[rank]


def short() -> Shell:
    """The GPU of rank 3 is not fit when the daemon starts."""
    gpus = pool(A, B, C, D)
    gpus.see(without(D), 0.0)
    shell = Shell(RESTORING, gpus)
    shell.send(p.FrontendReady())
    return shell


def test_a_rank_whose_gpu_is_not_fit_is_not_waited_for() -> None:
    shell = short()
    assert [(start.rank, start.gpu) for start in of(p.StartRank, shell.actions)] == [(0, A), (1, B), (2, C)]
    assert events("rank_waits_for_gpu", shell.actions) == [{"rank": 3}]
    shell.ready(0, 1)
    assert [regroup.rank for regroup in of(p.Regroup, shell.ready(2))] == [0, 1, 2]
    shell.regrouped(0, 1, 2)
    shell.synced()
    assert (shell.controller.status, shell.controller.target) == (Status.DEGRADED, 4)
    assert shell.controller.reason == "rank 3: no usable GPU; waits for a usable GPU"
    assert (shell.state(3), gpu_of(shell, 3)) == (RankState.EXCLUDED, None)


def test_it_joins_once_its_gpu_is_fit() -> None:
    shell = short()
    shell.settle()
    assert shell.serving == [0, 1, 2]
    shell.see(A, B, C, D)
    seen = shell.now
    [start] = of(p.StartRank, shell.tick())
    assert (start.rank, start.gpu, shell.now) == (3, D, seen + PROBATION_S)
    assert shell.settle().serving == [0, 1, 2, 3]


def test_ranks_without_gpus_are_waited_for_only_where_too_few_are_left_and_not_for_ever() -> None:
    shell = Shell(RESTORING, pool(A))
    shell.ready(0)
    assert shell.controller.phase is Phase.STARTING
    [end] = of(p.Exit, shell.tick())
    assert shell.now == RESTORING.start_timeout_s
    assert (end.code, end.reason[:40]) == (3, "rank 1 has no usable GPU: none is left; ")


def test_gpus_that_appear_in_time_let_it_start_after_all() -> None:
    shell = Shell(RESTORING, pool(A))
    shell.ready(0)
    shell.see(A, B)
    assert [(start.rank, start.gpu) for start in of(p.StartRank, shell.tick())] == [(1, B)]
    assert [regroup.rank for regroup in of(p.Regroup, shell.ready(1))] == [0, 1]


def test_a_verdict_on_a_rank_that_starts_moves_it_to_another_gpu() -> None:
    shell = Shell(RESTORING, pool(*UUIDS))
    condemn(shell, 2)
    shell.ready(0, 1, 3)
    assert shell.controller.phase is Phase.STARTING, "it is waited for"
    assert [(start.rank, start.gpu) for start in of(p.StartRank, shell.tick())] == [(2, SPARE)]


def test_a_start_that_takes_too_long_goes_on_without_who_is_missing() -> None:
    shell = Shell(RESTORING)
    shell.send(p.FrontendReady())
    shell.ready(0)
    assert not of(p.Regroup, shell.ready(1)), "two are enough, but there is time"
    assert [regroup.rank for regroup in of(p.Regroup, shell.tick())] == [0, 1]
    assert shell.now == RESTORING.start_timeout_s
    shell.regrouped(0, 1)
    shell.synced()
    assert shell.controller.status is Status.DEGRADED
    assert shell.settle().serving == [0, 1, 2, 3], "they come later"


def test_a_rank_whose_gpu_is_condemned_goes_on_with_a_spare_one() -> None:
    shell = on(*UUIDS)
    condemn(shell, 2)
    shell.recover(0, 1, 3)
    [start] = of(p.StartRank, shell.tick())
    assert (start.rank, start.gpu) == (2, SPARE)
    assert shell.settle().controller.status is Status.OK
    assert gpu_of(shell, 2) == SPARE
    shell.see(*UUIDS)
    shell.exited(2)
    shell.settle()
    assert gpu_of(shell, 2) == SPARE, "it does not move back"


def test_one_that_was_drained_for_its_gpu_does_too() -> None:
    shell = on(*UUIDS)
    condemn(shell, 2, p.VerdictKind.DRAIN)
    assert shell.settle().controller.status is Status.OK
    assert gpu_of(shell, 2) == SPARE


def test_a_replacement_is_used_after_its_probation() -> None:
    shell = on(A, B, C, D)
    condemn(shell, 2)
    shell.settle()
    assert (shell.serving, shell.controller.reason) == ([0, 1, 3], f"rank 2: {XID}; waits for a usable GPU")
    shell.see(A, B, D, "GPU-new")
    assert "the probation of a GPU" in shell.controller.describe()
    appeared = shell.now
    [start] = of(p.StartRank, shell.tick())
    assert (start.rank, start.gpu, shell.now) == (2, "GPU-new", appeared + PROBATION_S)
    assert shell.settle().controller.status is Status.OK


def test_one_that_fails_in_its_probation_is_not_used() -> None:
    shell = on(A, B, C, D)
    condemn(shell, 2)
    shell.settle()
    shell.see(A, B, D, "GPU-new")
    shell.send(p.Tick(), after=1.0)
    shell.see(A, B, D, GPU_new="hot")
    assert shell.settle().serving == [0, 1, 3]
    assert not [start for start in of(p.StartRank, shell.actions) if start.gpu == "GPU-new"]


def test_where_a_rank_restarts_for_other_reasons_it_stays() -> None:
    shell = on(*UUIDS)
    condemn(shell, 2, p.VerdictKind.RESTART_RANK)
    shell.settle()
    assert (shell.serving, gpu_of(shell, 2)) == ([0, 1, 2, 3], C)


def test_a_gpu_on_which_no_rank_starts_is_barred_until_it_is_released() -> None:
    shell = on(A, B, C, D)
    shell.exited(2)
    shell.settle(failing={2})
    [barred] = events("gpu_barred", shell.actions)
    assert (barred["gpu"], barred["rank"]) == (C, 2)
    assert shell.start_of(2).incarnation == 4 + RESTORING.max_start_attempts
    why = "rank 2 did not start on it in 3 attempts, the last: signal 9"
    assert shell.controller.reason == f"rank 2: signal 9; waits for a usable GPU; {C}: {why}"
    shell.see(A, B, C, D)
    assert shell.settle().serving == [0, 1, 3], "that it is healthy is known"
    assert of(p.StoreBarred, shell.actions) == [p.StoreBarred({C: why})]
    actions = shell.send(p.GpuReleased(C))
    assert of(p.StoreBarred, actions) == [p.StoreBarred({})]
    [start] = of(p.StartRank, actions)
    assert (start.rank, start.gpu) == (2, C)
    assert not of(p.StoreBarred, shell.send(p.GpuReleased(C))), "nothing to forgive"
    assert shell.settle().serving == [0, 1, 2, 3]


def test_a_restart_of_the_daemon_forgives_nothing() -> None:
    shell = Shell(RESTORING, GpuPool((A, B, C, D), 1, PROBATION_S, {C: "no rank starts on it"}))
    shell.send(p.FrontendReady())
    assert {start.rank: start.gpu for start in of(p.StartRank, shell.actions)} == {0: A, 1: B, 2: D}
    shell.settle()
    assert (shell.serving, shell.controller.status) == ([0, 1, 2], Status.DEGRADED)
    assert shell.controller.reason == f"rank 3: no usable GPU; waits for a usable GPU; {C}: no rank starts on it"
    shell.send(p.GpuReleased(C))
    assert shell.settle().controller.status is Status.OK
    assert (gpu_of(shell, 3), shell.controller.reason) == (C, "")


def test_to_release_a_rank_releases_the_gpu_it_failed_on() -> None:
    shell = on(A, B, C, D)
    shell.exited(2)
    shell.settle(failing={2})
    shell.send(p.RankOrder("order-1", 2, p.RankDeed.RELEASE, 10.0))
    assert of(p.StoreBarred, shell.actions)[-1] == p.StoreBarred({})
    assert shell.settle().serving == [0, 1, 2, 3]


def test_its_rank_is_tried_elsewhere_first() -> None:
    shell = on(*UUIDS)
    shell.exited(2)
    shell.recover(0, 1, 3)
    for _ in range(RESTORING.max_start_attempts):
        shell.tick()
        shell.exited(2)
    assert [barred["gpu"] for barred in events("gpu_barred", shell.actions)] == [C]
    assert (shell.start_of(2).gpu, shell.state(2)) == (SPARE, RankState.STARTING), "at once"
    shell.settle()
    assert (shell.serving, gpu_of(shell, 2)) == ([0, 1, 2, 3], SPARE)


def test_it_gets_as_many_attempts_on_each() -> None:
    shell = on(*UUIDS)
    shell.exited(2)
    shell.settle(failing={2})
    assert [barred["gpu"] for barred in events("gpu_barred", shell.actions)] == [C, SPARE]
    assert shell.start_of(2).incarnation == 4 + 2 * RESTORING.max_start_attempts


def test_a_newcomer_that_no_gpu_lets_start_is_not_wanted_any_more() -> None:
    shell = on(*UUIDS)
    shell.scale(5)
    shell.settle(failing={4})
    report = shell.report()
    assert (report.state, shell.controller.target) == (p.OperationState.ROLLED_BACK, 4)
    assert "did not start on it in 3 attempts, the last: signal 9" in report.message
    shell.scale(5)
    assert shell.report().state is p.OperationState.INVALID
    assert f"1 more ranks need a GPU, and 0 can have one; {SPARE}: rank 4 did not start" in shell.report().message


def test_a_rank_that_dies_while_it_retires_leaves_its_gpu_to_others() -> None:
    shell = on(A, B, C, D)
    shell.scale(3, retire=(1,))
    shell.exited(1)
    shell.settle()
    assert (shell.serving, gpu_of(shell, 1)) == ([0, 2, 3], None)
    condemn(shell, 3)
    shell.settle()
    assert (shell.serving, gpu_of(shell, 3)) == ([0, 2, 3], B)


def test_gpus_that_are_not_known_at_the_start_are_learned_from_ranks_and_the_watchdog() -> None:
    shell = Shell(RESTORING)
    shell.send(p.FrontendReady())
    shell.see(*UUIDS)
    for rank, uuid in enumerate((B, A, C, D)):
        assert gpu_of(shell, 0) is None
        shell.send(p.RankReady(rank, shell.incarnation(rank), LAYERS, shell.column(rank), uuid))
    shell.settle()
    assert (shell.serving, [gpu_of(shell, rank) for rank in range(4)]) == ([0, 1, 2, 3], [B, A, C, D])
    condemn(shell, 2)
    assert shell.settle().controller.status is Status.OK
    assert gpu_of(shell, 2) == SPARE


def test_where_gpus_are_not_known_a_rank_that_was_excluded_for_its_gpu_stays_out() -> None:
    shell = Shell(RESTORING).serve()
    verdict = p.TelemetryVerdict("GPU-2", (shell.identity(2),), p.VerdictKind.EXCLUDE, True, XID, 0.0)
    shell.send(verdict)
    shell.settle()
    assert (shell.serving, shell.controller.reason) == ([0, 1, 3], f"rank 2: {XID}")
