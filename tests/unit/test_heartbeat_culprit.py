"""Who is named, over schedules of simulated ranks."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.heartbeat_world import Hang, Where, World, watch
from watchdog.heartbeat.culprit import HeartbeatJudge
from watchdog.heartbeat.findings import Finding, FindingKind, Reason
from watchdog.heartbeat.layout import WORD_MASK, Granularity, Phase, ProcessState, Snapshot
from watchdog.heartbeat.straggler import StragglerPolicy, StragglerWatch

DETECTION_S = 3.0
STALL_S = 0.5
FIRST = st.sampled_from([0, WORD_MASK - 100, WORD_MASK])


def stalls(seed: int, ranks: int, end_s: float, share: float) -> dict[int, list[tuple[float, float]]]:
    """Half-second stalls of single ranks, and of all at once."""
    rng = random.Random(seed)
    found: dict[int, list[tuple[float, float]]] = {rank: [] for rank in range(ranks)}
    now = rng.uniform(0.0, 1.0)
    while now < end_s:
        stalled = range(ranks) if rng.random() < 0.2 else [rank for rank in range(ranks) if rng.random() < share]
        for rank in stalled:
            found[rank].append((now, STALL_S))
        now += STALL_S + rng.uniform(0.4, 2.0)
    return found


def idle_gaps(seed: int) -> dict[int, float]:
    rng = random.Random(seed)
    return {rng.randrange(300): rng.uniform(0.1, 3.0) for _ in range(3)}


def accusations(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.kind is not FindingKind.STRAGGLER]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    ranks=st.integers(2, 6),
    work_s=st.floats(0.002, 0.05),
    slowdown=st.floats(1.0, 5.0),
    look_up=st.booleans(),
    first=FIRST,
)
def test_no_healthy_rank_is_ever_accused(
    seed: int, ranks: int, work_s: float, slowdown: float, look_up: bool, first: int
) -> None:
    world = World(
        seed,
        ranks,
        work_s,
        slowdown={seed % ranks: slowdown},
        stalls=stalls(seed, ranks, 14.0, 0.3),
        idle=idle_gaps(seed),
        look_up=look_up,
        first=first,
        end_s=14.0,
    )
    reader_stalls = [(time, STALL_S) for time, _ in world.stalls[0]] + [(12.0, 1.5)]
    for now, findings in watch(world, HeartbeatJudge(), reader_stalls=reader_stalls):
        if now < world.end_s:
            assert not accusations(findings), (now, findings)


HANGS = [
    (where, stopped, look_up)
    for where in Where
    for stopped in (False, True)
    for look_up in (False, True)
    if where is not Where.INSIDE or stopped or look_up  # else nothing tells the ranks apart
]


@pytest.mark.parametrize(("where", "stopped", "look_up"), HANGS)
@settings(max_examples=20)
@given(
    seed=st.integers(0, 10_000),
    ranks=st.integers(2, 6),
    work_s=st.floats(0.002, 0.03),
    at=st.integers(0, 200),
    first=FIRST,
)
def test_the_one_that_hangs_is_named_in_time(
    where: Where, stopped: bool, look_up: bool, seed: int, ranks: int, work_s: float, at: int, first: int
) -> None:
    culprit = seed % ranks
    hang = Hang(culprit, at, where, stopped)
    world = World(seed, ranks, work_s, hangs=(hang,), look_up=look_up, first=first, end_s=12.0)
    begin = world.hung_at[culprit]
    confirmed_after = None
    for now, findings in watch(world, HeartbeatJudge()):
        if now > begin + DETECTION_S + 1.0:
            break
        for finding in accusations(findings):
            assert finding.kind is FindingKind.HUNG, (now - begin, finding)
            assert finding.rank == culprit
            assert now >= begin + 1.0
            if finding.confirmed and confirmed_after is None:
                confirmed_after = now - begin
    assert confirmed_after is not None
    assert confirmed_after <= DETECTION_S


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), at=st.integers(0, 150), count=st.integers(1, 3), stopped=st.booleans())
def test_all_that_hang_at_once_are_named(seed: int, at: int, count: int, stopped: bool) -> None:
    culprits = set(random.Random(seed).sample(range(5), count))
    world = World(seed, 5, hangs=tuple(Hang(rank, at, stopped=stopped) for rank in culprits), end_s=12.0)
    named: set[int | None] = set()
    for _, findings in watch(world, HeartbeatJudge()):
        named |= {finding.rank for finding in accusations(findings) if finding.confirmed}
    assert named == culprits


@pytest.mark.parametrize("slowdown", [3.0, 6.0])
def test_a_straggler_is_named_and_not_accused(slowdown: float) -> None:
    world = World(5, 4, 0.01, slowdown={2: slowdown}, end_s=12.0)
    named = []
    for now, findings in watch(world, HeartbeatJudge()):
        if now < world.end_s:
            assert not accusations(findings)
            named += findings
    assert {finding.rank for finding in named} == {2}
    assert not any(finding.confirmed for finding in named)
    assert named[-1].slowdown == pytest.approx(slowdown, rel=0.15)


def named_of(work: Mapping[int, int], starved: Mapping[int, int], shared: bool = False, **fields: object) -> set[int]:
    """Four ranks with so much work, in ms, for each of two collectives in 0.1 s, and so much of it starved."""
    stragglers = StragglerWatch(StragglerPolicy())
    named: Mapping[int, float] = {}
    for tick in range(200):
        counted: dict[str, object] = {"completed": (tick, tick, 0, 0), "timed": 2 * tick, **fields}
        pages = [
            page(
                rank,
                worked_ns=2 * tick * 10**6 * work.get(rank, 1),
                starved_ns=2 * tick * 10**6 * starved.get(rank, 0),
                **counted,
            )
            for rank in range(4)
        ]
        named = stragglers.observe(pages, 3, 0.1, shared)
    return set(named)


@pytest.mark.parametrize("granularity", Granularity)
def test_who_does_not_time_collectives_is_no_straggler(granularity: Granularity) -> None:
    """The work of hosts per step is time in which they waited for their devices, wherever they first needed them."""
    named = named_of({2: 4}, {}, granularity=granularity)
    assert named == (set() if granularity is Granularity.STEP else {2})


def test_ranks_that_take_turns_on_a_device_are_not_compared() -> None:
    assert named_of({2: 4}, {}, shared=True, granularity=Granularity.DEVICE) == set()


def test_a_page_without_times_names_nobody() -> None:
    assert named_of({2: 4}, {}, timed=0) == set()


def test_a_device_that_waits_for_its_host_is_not_slow() -> None:
    assert named_of({2: 4}, {2: 3}, granularity=Granularity.DEVICE) == set()


def test_a_device_is_compared_with_peers_and_their_hosts() -> None:
    """Rank 2 computes for 4 ms, its host being ahead; the others launch as slowly, and their devices wait for that."""
    work = dict.fromkeys(range(4), 4)
    assert named_of(work, {0: 3, 1: 3, 3: 3}, granularity=Granularity.DEVICE) == set()


def page(rank: int, **fields: object) -> Snapshot:
    values: dict[str, object] = {"incarnation": 10 + rank, "pid": 100 + rank, "epoch": 3, "phase": Phase.DECODE}
    return Snapshot(rank, **(values | fields))  # type: ignore[arg-type]


def observe(
    judge: HeartbeatJudge, pages: list[Snapshot], seconds: float, beating: frozenset[int] = frozenset()
) -> list[Finding]:
    """The same pages for so long; the sequence of the `beating` ranks goes on."""
    findings: list[Finding] = []
    start = getattr(judge, "test_now", 0.0)
    for tick in range(int(seconds * 10) + 1):
        judge.test_now = start + tick / 10  # type: ignore[attr-defined]
        seen = [replace(p, sequence=p.sequence + 2 * tick) if p.rank in beating else p for p in pages]
        findings = judge.observe(judge.test_now, seen)  # type: ignore[attr-defined]
    return findings


WAITING = {"entered": (6, 0, 0, 0), "completed": (5, 0, 0, 0)}
BEHIND = {"entered": (5, 0, 0, 0), "completed": (5, 0, 0, 0)}


def test_all_at_one_point_accuses_nobody() -> None:
    [finding] = observe(HeartbeatJudge(), [page(rank, **WAITING) for rank in range(4)], 5.0)
    assert (finding.kind, finding.rank, finding.reason) == (FindingKind.NOBODY, None, Reason.ALL_AT_ONE_POINT)
    assert finding.confirmed


def test_all_silent_at_once_accuses_nobody() -> None:
    [finding] = observe(HeartbeatJudge(), [page(rank, phase=Phase.IDLE) for rank in range(4)], 5.0)
    assert (finding.kind, finding.reason) == (FindingKind.NOBODY, Reason.ALL_SILENT)


def test_idle_ranks_whose_loops_turn_are_not_hung() -> None:
    pages = [page(0, **WAITING), *(page(rank, phase=Phase.IDLE, **BEHIND) for rank in (1, 2))]
    [finding] = observe(HeartbeatJudge(), pages, 5.0, beating=frozenset({1, 2}))
    assert (finding.kind, finding.reason) == (FindingKind.NOBODY, Reason.NOT_JOINED)


def test_a_rank_that_compiles_is_waited_for() -> None:
    pages = [page(0, **WAITING), page(1, **WAITING), page(2, phase=Phase.COMPILING, **BEHIND)]
    assert observe(HeartbeatJudge(), pages, 120.0) == []


@pytest.mark.parametrize("phase", [Phase.LOADING, Phase.PARKED, Phase.REGROUPING, Phase.STARTING, Phase.STOPPED])
def test_ranks_outside_the_group_are_not_compared(phase: Phase) -> None:
    pages = [page(0, phase=Phase.IDLE, **WAITING | BEHIND), page(1, phase=phase)]
    assert observe(HeartbeatJudge(), pages, 30.0, beating=frozenset({0})) == []


@pytest.mark.parametrize("completed", [WORD_MASK, 0])
def test_the_one_behind_is_named_at_the_wrap_of_the_counters(completed: int) -> None:
    entered = (completed + 1) & WORD_MASK
    waiting = {"entered": (entered, 0, 0, 0), "completed": (completed, 0, 0, 0)}
    behind = {"entered": (completed, 0, 0, 0), "completed": (completed, 0, 0, 0)}
    [finding] = observe(HeartbeatJudge(), [page(0, **waiting), page(1, **behind), page(2, **waiting)], 3.0)
    assert (finding.kind, finding.rank, finding.confirmed) == (FindingKind.HUNG, 1, True)


def test_stalls_of_an_idle_loop_just_before_its_beat() -> None:
    judge = HeartbeatJudge()
    beats = [0.0]
    while beats[-1] < 30.0:
        beats += [beats[-1] + 0.25, beats[-1] + 0.25 + 0.25 + STALL_S]
    for tick in range(280):
        now = tick / 10
        turned = sum(beat <= now for beat in beats)
        pages = [page(0, phase=Phase.IDLE, sequence=2 * tick), page(1, phase=Phase.IDLE, sequence=2 * turned)]
        assert judge.observe(now, pages) == []


def test_a_stale_epoch_is_not_compared() -> None:
    pages = [page(0, phase=Phase.IDLE), page(1, epoch=2, phase=Phase.DECODE, process=ProcessState.STOPPED)]
    assert observe(HeartbeatJudge(), pages, 30.0, beating=frozenset({0})) == []


def test_an_older_incarnation_does_not_speak_for_its_rank() -> None:
    pages = [page(0, phase=Phase.IDLE), page(1, phase=Phase.IDLE, incarnation=50), page(1, process=ProcessState.GONE)]
    assert observe(HeartbeatJudge(), pages, 10.0, beating=frozenset({0, 1})) == []


def test_a_death_is_seen_at_once_and_its_peers_are_not_accused() -> None:
    judge = HeartbeatJudge()
    observe(judge, [page(0, **WAITING), page(1, **BEHIND)], 0.1)
    pages = [page(0, **WAITING), page(1, process=ProcessState.GONE, **BEHIND)]
    [finding] = observe(judge, pages, 0.0)
    assert (finding.kind, finding.rank, finding.confirmed) == (FindingKind.DEAD, 1, True)
    assert [finding.kind for finding in observe(judge, pages, 10.0)] == [FindingKind.DEAD]


def test_what_an_earlier_life_left_is_not_a_death() -> None:
    assert observe(HeartbeatJudge(), [page(0, process=ProcessState.GONE)], 5.0) == []


def test_an_end_on_purpose_is_not_a_death() -> None:
    judge = HeartbeatJudge()
    observe(judge, [page(0, phase=Phase.IDLE)], 0.1)
    assert observe(judge, [page(0, phase=Phase.STOPPED, process=ProcessState.GONE)], 1.0) == []


def test_several_inside_that_nothing_tells_apart() -> None:
    inside = {"entered": (5, 0, 0, 0), "completed": (4, 0, 0, 0)}
    pages = [page(0, **inside), page(1, **inside), page(2, **WAITING)]
    [finding] = observe(HeartbeatJudge(), pages, 5.0)
    assert (finding.kind, finding.reason) == (FindingKind.NOBODY, Reason.UNTOLD)


def test_the_only_one_left_behind_inside_is_named() -> None:
    pages = [page(0, entered=(5, 0, 0, 0), completed=(4, 0, 0, 0)), page(1, **WAITING), page(2, **WAITING)]
    [finding] = observe(HeartbeatJudge(), pages, 5.0)
    assert (finding.kind, finding.rank) == (FindingKind.HUNG, 0)


@pytest.mark.parametrize("jump_s", [-5000.0, -0.3, 30.0, 1e9])
def test_a_jump_of_the_clock_accuses_nobody(jump_s: float) -> None:
    judge = HeartbeatJudge()
    pages = [page(0, **WAITING), page(1, **BEHIND)]
    for tick in range(6):
        assert judge.observe(100.0 + tick / 10, pages) == []
    assert judge.observe(100.5 + jump_s, pages) == []
    assert judge.observe(100.6 + jump_s, pages) == []


def test_a_torn_page_of_a_stopped_writer_is_hung() -> None:
    pages = [page(0, **WAITING), page(1, sequence=41, torn=True, process=ProcessState.STOPPED, **BEHIND)]
    [finding] = observe(HeartbeatJudge(), pages, 3.0)
    assert (finding.kind, finding.rank, finding.evidence["torn"]) == (FindingKind.HUNG, 1, True)
