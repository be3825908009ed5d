"""The prober and its children: who is killed, counted and kept, and what is not started then."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.nvml_children import GPUS, World
from watchdog import probe
from watchdog.probe import ProbePolicy

A, B, C = GPUS
POLICY = ProbePolicy()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return watched(monkeypatch)


def watched(monkeypatch: pytest.MonkeyPatch) -> World:
    """All GPUs are read, and their events waited for."""
    world = World()
    monkeypatch.setattr(probe, "Child", world.start)
    world.run(2.0)
    assert world.prober.pids.keys() == {"poll", "events"}
    assert world.prober.listening == set(GPUS)
    return world


def test_a_child_that_sigkill_ends_leaves_room_for_another(world: World) -> None:
    world.hung.add(A)
    world.run(2.0)
    assert world.prober.stuck == {}
    assert world.conditions == {(A, "driver_wedged"): True}
    assert A in [child.only for child in world.started]
    assert all(world.now - world.read[gpu] < 0.5 for gpu in (B, C)), "the others are read"
    world.heal()
    world.run(POLICY.retry[1] + POLICY.settled)
    assert world.conditions[A, "driver_wedged"] is False
    assert not world.prober.isolated
    assert world.prober.listening == set(GPUS)


def test_one_that_survives_it_is_kept_and_nothing_more_is_started_for_its_gpu(world: World) -> None:
    first = world.prober.pids["poll"]
    world.stuck.add(A)
    world.run(3.0)
    assert world.prober.stuck == {A: (first,)}
    assert world.details[-1]["stuck_in_kernel"]
    before = len(world.started)
    world.run(300.0)
    assert world.prober.stuck == {A: (first,)}
    assert len(world.started) == before, "an hour of this would fill the machine"
    assert A not in {gpu for child in world.living for gpu in child.gpus}
    assert all(world.now - world.read[gpu] < 0.5 for gpu in (B, C))
    world.heal()
    world.run(2.0)
    assert world.prober.stuck == {}
    assert world.conditions[A, "driver_wedged"] is False, "a new child has got an answer"


def test_readers_and_listeners_that_one_gpu_catches_are_both_counted(world: World) -> None:
    pids = world.prober.pids
    world.stuck.add(A)
    next(child for child in world.living if child.role == "events").open_again()
    world.run(3.0)
    assert {gpu: sorted(stuck) for gpu, stuck in world.prober.stuck.items()} == {A: sorted(pids.values())}
    assert len(world.caught(A)) == 2
    world.run(60.0)
    assert len(world.caught(A)) == 2
    assert world.prober.listening == {B, C}


def test_who_waits_for_events_is_told_at_once_what_to_leave_alone(world: World) -> None:
    """It opens the driver anew by itself when any GPU is lost, and must not be caught too."""
    events = next(child for child in world.living if child.role == "events")
    world.stuck.add(A)
    while not world.caught(A):
        world.step()
    assert events.skip == {A}
    events.open_again()
    world.run(3.0)
    assert [child.role for child in world.caught(A)] == ["poll"]
    assert world.prober.listening == {B, C}


def test_a_gpu_gets_no_child_of_its_own_while_the_one_for_all_is_there(world: World) -> None:
    """A listener was late there. The reader has been told to leave, and hangs in its last call."""
    world.hung.add(B)
    world.step()
    world.hung.add(A)
    next(child for child in world.living if child.role == "events").open_again()
    both = False
    for _ in range(30):
        world.step()
        there = [child.only for child in world.living if child.kind == "poll" and child.at and child.at[0] == A]
        both = both or (None in there and A in world.prober.isolated)
        assert len(there) <= 1
    assert both, "this has not come to the point"
    assert world.conditions == {(A, "driver_wedged"): True, (B, "driver_wedged"): True}


def test_a_gpu_that_catches_its_own_child_on_the_way_back_is_not_given_back(world: World) -> None:
    """It was slow, and has been well for a while; its child was to make room for the one that reads all."""
    world.hung.add(A)
    world.run(1.0)
    world.heal()
    world.run(1.0)
    own = next(child for child in world.living if child.only == A)
    while own.killed is None:
        world.step()
        assert world.now < 200
    own.at = (A, world.now)
    world.stuck.add(A)
    world.run(3.0)
    assert world.prober.stuck == {A: (own.pid,)}
    assert [child.pid for child in world.caught(A)] == [own.pid]
    assert world.conditions[A, "driver_wedged"]


def test_a_driver_that_cannot_be_initialised_has_one_child_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    monkeypatch.setattr(probe, "Child", world.start)
    world.stuck.add("")
    world.run(120.0)
    assert sorted(world.prober.stuck) == ["events", "poll"]
    assert sorted(pid for pids in world.prober.stuck.values() for pid in pids) == [1, 2]
    assert len(world.started) == 2
    world.heal()
    world.run(2 * POLICY.retry[1])
    assert world.prober.listening == set(GPUS)


def test_one_without_a_processor_is_not_stuck_so_soon(world: World) -> None:
    reader = next(child for child in world.living if child.role == "poll")
    world.stuck.add(A)
    while reader.killed is None:
        world.step()
    reader.waits_for_processor = True
    world.run(POLICY.starved_deadline - 0.5)
    assert world.prober.stuck == {}
    world.run(1.0)
    assert world.prober.stuck == {A: (reader.pid,)}


def test_the_end_leaves_those_behind(world: World) -> None:
    world.stuck.add(A)
    world.run(3.0)
    world.prober.close()
    assert not world.living
    assert world.prober.stuck == {}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["hangs", "sticks", "heals", "events", "all heal"]),
            st.sampled_from(GPUS),
            st.floats(0.1, 15.0),
        ),
        max_size=12,
    )
)
def test_nobody_goes_where_one_is_stuck(steps: list[tuple[str, str, float]]) -> None:
    """Whatever GPUs do: of each kind one at the most is caught by a GPU, all are counted, and nobody follows them."""
    with pytest.MonkeyPatch.context() as patch:
        world = watched(patch)
        for what, gpu, seconds in steps:
            if what == "hangs":
                world.hung.add(gpu)
            elif what == "sticks":
                world.stuck.add(gpu)
            elif what == "heals":
                world.hung.discard(gpu)
                world.stuck.discard(gpu)
            elif what == "all heal":
                world.heal()
            else:
                for child in world.living:
                    if child.role == "events":
                        child.open_again()
            for _ in range(round(seconds / 0.1)):
                caught = {gpu: world.caught(gpu) for gpu in GPUS}
                world.step()
                for child, touched in world.touched:
                    assert touched not in GPUS or not set(caught[touched]) & world.living - {child}, "it followed"
                for one in GPUS:
                    kinds = Counter(child.kind for child in world.caught(one))
                    assert all(count == 1 for count in kinds.values()), kinds
                    old = [child.pid for child in world.caught(one) if world.now - (child.killed or 0) > 0.6]
                    assert set(old) <= set(world.prober.stuck.get(one, ()))
        world.heal()
        world.run(POLICY.retry[1] + POLICY.settled + 5.0)
        assert (world.prober.stuck, world.prober.isolated) == ({}, {})
        assert world.prober.listening == set(GPUS)
        assert all(world.now - world.read[gpu] < 0.5 for gpu in GPUS)
