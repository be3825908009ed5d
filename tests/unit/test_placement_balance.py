"""Properties of respread with load and hosts, of evacuate, and balance beside vLLM's policy on recorded loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.placement import LOST, works
from elastic_daemon.placement import (
    EMPTY,
    NotEnoughSlots,
    Placement,
    PlacementError,
    RepairPlan,
    SlotLoad,
    Source,
    balancedness,
    copies,
    evacuate,
    expert_safety,
    initial,
    minimum_ranks,
    missing,
    rebalance,
    repair,
    respread,
)
from elastic_daemon.placement.balance import TOLERANCE, WORTH, rank_loads
from elastic_daemon.placement.order import plan_between
from elastic_daemon.placement.tables import Tables
from tests.unit.placements import arbitrary, check_steps, fresh, holders, no_deadline, placement_of, with_members

LOADS: dict[str, npt.NDArray[np.int32]] = dict(np.load(Path(__file__).parent / "data" / "expert_loads.npz"))

few_and_slow = settings(
    deadline=None, max_examples=5, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow]
)


@st.composite
def load_for(draw: st.DrawFn, placement: Placement) -> npt.NDArray[np.float64]:
    """Skewed more or less, with idle experts and idle layers among them."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    load = random.lognormal(0, draw(st.sampled_from([0.0, 0.5, 1.0, 2.5])), (placement.layers, placement.experts))
    load[random.random(load.shape) < draw(st.sampled_from([0.0, 0.3, 0.9]))] = 0
    return np.round(load * 1000)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Placement, list[int], npt.NDArray[np.float64], dict[int, str]]:
    placement, members = draw(with_members())
    hosts = {rank: draw(st.sampled_from("abc")) for rank in members}
    return placement, members, draw(load_for(placement)), hosts


@st.composite
def large(draw: st.DrawFn) -> tuple[Placement, list[int], npt.NDArray[np.float64], dict[int, str]]:
    """Up to 72 ranks, 256 experts and 58 layers: some ranks went, some of those came back."""
    ranks, experts = draw(st.sampled_from([(72, 256), (64, 256), (16, 128), (9, 160)]))
    slots = -(-experts // ranks) + draw(st.integers(0, 4))
    hosts = {rank: f"host{rank // 8}" for rank in range(ranks)}
    placement = initial(experts, draw(st.sampled_from([3, 58])), range(ranks), slots, hosts)
    spared = ranks - minimum_ranks(experts, slots)
    gone = draw(st.lists(st.integers(0, ranks - 1), max_size=min(spared, 9), unique=True))
    back = gone[: draw(st.integers(0, len(gone)))]
    placement = repair(placement, set(range(ranks)) - set(gone)).placement
    return placement, sorted({*placement.ranks, *back}), draw(load_for(placement)), hosts


def started(placement: Placement, members: list[int]) -> Placement:
    new = dict.fromkeys(set(members) - set(placement.ranks), placement.empty_column())
    return placement.with_columns(new).restricted(members)


def guaranteed(placement: Placement, ranks: int) -> int:
    return min(ranks, ranks * placement.slots_per_rank // placement.experts)


def confined(placement: Placement, hosts: dict[int, str]) -> int:
    """(layer, expert) pairs with several copies, all of them on one host."""
    per_host = np.array(
        [copies(placement.restricted([r for r in placement.ranks if hosts[r] == host])) for host in set(hosts.values())]
    )
    return int(((per_host > 0).sum(axis=0) == 1)[copies(placement) > 1].sum())


def check_respread(
    placement: Placement, members: list[int], load: npt.NDArray[np.float64], hosts: dict[int, str]
) -> None:
    start = started(placement, members)
    plan = respread(placement, members, load=load, hosts=hosts)
    check_steps(start, plan)
    goal = guaranteed(placement, len(members))
    assert expert_safety(plan.placement) >= goal - 1
    assert EMPTY not in plan.placement.physical_to_logical()
    again = respread(plan.placement, members, load=load, hosts=hosts)
    assert len(again.loads) <= max(2 * placement.layers, plan.placement.physical_to_logical().size // 10)


@no_deadline
@given(cases())
def test_respread_with_load_keeps_every_guarantee(
    case: tuple[Placement, list[int], npt.NDArray[np.float64], dict[int, str]],
) -> None:
    check_respread(*case)


@few_and_slow
@given(large())
def test_respread_keeps_every_guarantee_at_production_sizes(
    case: tuple[Placement, list[int], npt.NDArray[np.float64], dict[int, str]],
) -> None:
    check_respread(*case)


@no_deadline
@given(cases())
def test_a_layer_changes_for_balance_only_if_that_is_worth_it(
    case: tuple[Placement, list[int], npt.NDArray[np.float64], dict[int, str]],
) -> None:
    placement, members, load, hosts = case
    start = respread(placement, members, hosts=hosts).placement
    end = respread(start, members, load=load, hosts=hosts).placement
    before, after = (rank_loads(Tables(which), load) for which in (start, end))
    for layer in range(load.shape[0]):
        mean, gain = before[layer].mean(), before[layer].max() - after[layer].max()
        same = np.array_equal(start.physical_to_logical()[layer], end.physical_to_logical()[layer])
        assert same or (gain > WORTH * mean * 0.999 and before[layer].max() > (1 + TOLERANCE) * mean * 0.999)


@no_deadline
@given(cases())
def test_loss_of_a_host_loses_no_expert_where_that_is_possible(
    case: tuple[Placement, list[int], npt.NDArray[np.float64], dict[int, str]],
) -> None:
    placement, members, load, hosts = case
    room = [sum(hosts[r] == host for r in members) * placement.slots_per_rank for host in set(hosts.values())]
    possible = sum(min(slots, placement.experts) for slots in room) >= 2 * placement.experts
    if guaranteed(placement, len(members)) < 2 or not possible:
        return
    for tokens in (None, load):
        result = respread(placement, members, load=tokens, hosts=hosts).placement
        assert confined(result, hosts) == 0
        for host in set(hosts.values()):
            assert missing(result.without([r for r in members if hosts[r] == host])) == ()


@pytest.mark.parametrize("slots", [4, 5, 8])
def test_initial_and_respread_at_full_size_confine_no_expert_to_a_host(slots: int) -> None:
    hosts = {rank: f"host{rank // 8}" for rank in range(72)}
    placement = initial(256, 58, range(72), slots, hosts)
    assert confined(placement, hosts) == 0
    load = LOADS["zipf_strong"]
    assert confined(respread(placement, range(72), load=load, hosts=hosts).placement, hosts) == 0
    # So that one who never heard of hosts is put right, too.
    assert confined(respread(initial(256, 58, range(72), slots), range(72), hosts=hosts).placement, hosts) == 0


def test_peers_on_the_same_host_are_asked_first() -> None:
    placement = placement_of(2, {0: [0, 1], 1: [0, 1], 2: [0, 1]})
    plan = respread(placement, range(4), hosts={0: "a", 1: "a", 2: "b", 3: "b"})
    assert {(load.rank, load.peer) for load in plan.loads} == {(3, 2)}


def test_hot_experts_get_the_copies_beyond_the_guaranteed_ones() -> None:
    load = np.array([[100, 1, 1, 1, 1, 1]])
    placement = initial(6, 1, range(4), 2)
    plan = respread(placement, range(4), load=load)
    assert copies(plan.placement)[0].tolist() == [3, 1, 1, 1, 1, 1]
    assert balancedness(plan.placement, load) > balancedness(placement, load)


def circle(*ranks: list[int], into: list[list[int]]) -> tuple[list[tuple[int, int, int | None]], Placement]:
    """(rank, expert, peer) of each load between two tables of one layer, and where they lead."""
    start = placement_of(1 + max(map(max, ranks)), dict(enumerate(ranks)))
    plan = plan_between(start, np.array([into]))
    check_steps(start, plan)
    return [(load.rank, load.expert, load.peer) for load in plan.loads], plan.placement


def test_a_circle_of_single_copies_waits_in_a_slot_to_spare() -> None:
    loads, reached = circle([0, 1], [2, 3], [4, 5], [6, 5], into=[[2, 1], [0, 3], [4, 5], [6, 5]])
    assert loads == [(2, 0, 0), (0, 2, 1), (1, 0, 0), (2, 5, 2)]
    assert reached == placement_of(7, {0: [2, 1], 1: [0, 3], 2: [4, 5], 3: [6, 5]})


def test_a_circle_goes_through_a_slot_of_the_same_rank_without_a_detour() -> None:
    loads, reached = circle([0, 1], [2, 5], [4, 5], into=[[2, 1], [0, 5], [4, 5]])
    assert loads == [(1, 0, 0), (0, 2, 1), (1, 5, 1)]
    assert reached == placement_of(6, {0: [2, 1], 1: [5, 0], 2: [4, 5]})


def test_a_circle_without_a_slot_to_spare_stays_as_it_was() -> None:
    loads, reached = circle([0, 1], [2, 3], into=[[2, 1], [0, 3]])
    assert loads == []
    assert reached == placement_of(4, {0: [0, 1], 1: [2, 3]})


def test_nothing_moves_for_a_tiny_gain() -> None:
    placement = initial(16, 1, range(4), 5)
    shares = copies(placement).astype(float)  # as many tokens as copies: every slot has the same load
    assert balancedness(placement, shares) == pytest.approx(1)
    shares[0, 0] *= 1 + TOLERANCE
    assert respread(placement, range(4), load=shares).loads == ()
    shares[0, 0] *= 10
    assert respread(placement, range(4), load=shares).loads != ()


def test_little_moves_when_the_load_drifts() -> None:
    load = LOADS["lognormal"]
    random = np.random.default_rng(5)
    placement = respread(initial(256, 58, range(72), 8), range(72), load=load).placement
    moved = len(respread(placement, range(72), load=load * random.lognormal(0, 0.02, load.shape)).loads)
    assert moved < 0.05 * placement.physical_to_logical().size


@pytest.mark.parametrize("load", [np.ones((2, 3)), np.full((1, 4), -1.0), np.full((1, 4), np.nan)])
def test_load_that_is_none_is_refused(load: npt.NDArray[np.float64]) -> None:
    with pytest.raises(PlacementError, match="load must be"):
        respread(initial(4, 1, range(2), 3), range(2), load=load)


def test_balancedness_by_hand() -> None:
    placement = placement_of(3, {0: [0, 1], 1: [0, 2]}, {0: [0, 1], 1: [0, 2]})
    assert balancedness(placement, [[4, 1, 5], [0, 3, 1]]) == pytest.approx((5 + 2) / (7 + 3))
    assert balancedness(placement, np.zeros((2, 3))) == 1.0


CASES = [
    ("zipf_mild", 72, 4),
    ("zipf_strong", 72, 4),
    ("hot_few", 72, 4),
    ("lognormal", 72, 4),
    ("zipf_mild", 72, 5),
    ("zipf_strong", 72, 5),
    ("hot_few", 72, 5),
    ("lognormal", 72, 5),
    ("zipf_strong", 72, 8),
    ("hot_few", 72, 8),
    ("lognormal", 16, 18),
    ("zipf_64", 8, 10),
    ("hot_64", 8, 10),
    ("lognormal_128", 8, 18),
    ("tiny_moe_all_tasks", 4, 8),
    ("tiny_moe_add", 4, 8),
    ("tiny_moe_count", 4, 8),
    ("tiny_moe_count", 4, 6),
]


def vllm_rebalance(load: npt.NDArray[np.int32], table: npt.NDArray[np.int64], ranks: int) -> npt.NDArray[np.int64]:
    torch = pytest.importorskip("torch")
    policy = pytest.importorskip("vllm.distributed.eplb.policy").DefaultEplbPolicy
    groups = nodes = 1
    new = policy.rebalance_experts(
        torch.from_numpy(load), table.shape[1], groups, nodes, ranks, torch.from_numpy(table.copy())
    )
    return np.asarray(new)


def placed(table: npt.NDArray[np.int64], experts: int, ranks: int) -> Placement:
    return Placement(experts, dict(enumerate(np.split(table, ranks, axis=1))))


def test_balance_is_that_of_vllms_policy_with_fewer_moves_and_more_safety() -> None:
    gained = []
    for name, ranks, slots in CASES:
        load = LOADS[name][:16]
        layers, experts = load.shape
        old = initial(experts, layers, range(ranks), slots).physical_to_logical()
        ours, theirs = rebalance(load, old, ranks), vllm_rebalance(load, old, ranks)
        placement, other = placed(ours, experts, ranks), placed(theirs, experts, ranks)
        gained.append(balancedness(placement, load) - balancedness(other, load))
        assert gained[-1] > -0.03, (name, ranks, slots)
        assert (ours != old).sum() < 0.7 * (theirs != old).sum(), (name, ranks, slots)
        assert expert_safety(placement) == guaranteed(placement, ranks) - 1 >= expert_safety(other)
    assert np.mean(gained) >= -0.01


def test_theirs_gives_up_safety_that_ours_keeps() -> None:
    load = LOADS["zipf_strong"]
    old = initial(256, 58, range(72), 8).physical_to_logical()
    assert expert_safety(placed(vllm_rebalance(load, old, 72), 256, 72)) == 0
    assert expert_safety(placed(rebalance(load, old, 72), 256, 72)) == 1


def test_rebalance_refuses_a_table_that_does_not_fit() -> None:
    with pytest.raises(PlacementError, match="do not fit 3 ranks"):
        rebalance(np.ones((1, 4)), np.zeros((1, 8), dtype=np.int64), 3)


@no_deadline
@given(st.one_of(fresh(), arbitrary()), st.data())
def test_evacuate_gives_those_that_stay_everything(placement: Placement, data: st.DataObject) -> None:
    leaving = data.draw(st.lists(st.sampled_from(placement.ranks), unique=True))
    staying = [rank for rank in placement.ranks if rank not in leaving]
    if len(staying) < minimum_ranks(placement.experts, placement.slots_per_rank):
        with pytest.raises(NotEnoughSlots):
            evacuate(placement, leaving)
        return
    plan = evacuate(placement, leaving)
    check_steps(placement, respread(placement, placement.ranks))
    assert missing(plan.placement.restricted(staying)) == ()
    assert all(np.array_equal(plan.placement.columns[r], placement.columns[r]) for r in leaving)
    assert plan.placement == placement.after(plan.loads)
    assert len(plan.loads) == len(missing(placement.restricted(staying)))
    for load in plan.loads:
        senders = holders(placement, load.layer, load.expert)
        assert load.rank in staying
        assert load.peer in senders if senders else (load.source is Source.CHECKPOINT and load.peer is None)


def test_evacuate_by_hand() -> None:
    placement = placement_of(4, {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]})
    assert evacuate(placement, [3]).loads == ()
    plan = evacuate(placement, [2, 3, 9])
    assert plan.loads == (
        SlotLoad(rank=0, layer=0, slot=0, expert=2, evicts=0, source=Source.PEER, peer=2),
        SlotLoad(rank=1, layer=0, slot=1, expert=3, evicts=1, source=Source.PEER, peer=3),
    )
    assert plan.placement.ranks == (0, 1, 2, 3)


@pytest.mark.parametrize("slots", LOST)
def test_plans_of_the_largest_size_keep_every_expert(slots: int) -> None:
    """How long they take is measured by `bench.placement`."""
    for name, work in works(slots).items():
        answer = work()
        after = answer.placement if isinstance(answer, RepairPlan) else answer
        assert isinstance(after, Placement)
        assert not missing(after), name
