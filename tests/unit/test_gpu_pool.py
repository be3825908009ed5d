"""Which GPU a rank gets, and when. What the controller makes of it: test_scaling.py."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_daemon.control.gpu_pool import NOT_THERE, GpuPool
from elastic_daemon.protocol import GpuSeen

UUIDS = ("GPU-a", "GPU-b", "GPU-c", "GPU-d")
PROBATION_S = 2.0


def seen(*fit: str, **unfit: str) -> list[GpuSeen]:
    return [GpuSeen(uuid, True) for uuid in fit] + [GpuSeen(f"GPU-{name}", False, why) for name, why in unfit.items()]


def pool(*uuids: str, ranks_per_gpu: int = 1, barred: dict[str, str] | None = None) -> GpuPool:
    return GpuPool(uuids, ranks_per_gpu, PROBATION_S, barred)


def test_ranks_get_their_homes_at_once() -> None:
    gpus = pool("GPU-a", "GPU-b", ranks_per_gpu=2)
    assert [gpus.assign(rank, 0.0) for rank in (3, 0, 2, 1, 4)] == ["GPU-b", "GPU-a", "GPU-b", "GPU-a", None]


def test_no_gpu_is_not_the_same_as_none_that_is_known() -> None:
    gpus = pool()
    assert gpus.is_known
    assert gpus.assign(0, 0.0) is None
    gpus.see(seen("GPU-a"), 0.0)
    assert gpus.assign(0, PROBATION_S) == "GPU-a"


def unknown(*started: int) -> GpuPool:
    """Ranks start before anything is known of GPUs."""
    gpus = GpuPool(None, 1, PROBATION_S)
    assert [gpus.assign(rank, 0.0) for rank in started] == [None] * len(started)
    return gpus


def test_where_gpus_are_not_known_no_rank_is_on_one() -> None:
    gpus = unknown(0)
    gpus.see(seen("GPU-a"), 0.0)
    assert not gpus.is_known
    assert (gpus.of(0), gpus.assign(0, 100.0)) == (None, None)


@pytest.mark.parametrize("heard_first", [True, False])
def test_they_are_learned_once_all_ranks_have_said_where_they_are(heard_first: bool) -> None:
    gpus = unknown(0, 1)
    if heard_first:
        gpus.see(seen("GPU-a", "GPU-b", "GPU-spare", d="hot"), 1.0)
    gpus.locate(1, "GPU-a")
    if not heard_first:
        gpus.see(seen("GPU-a", "GPU-b", "GPU-spare", d="hot"), 1.0)
    assert not gpus.is_known, "rank 0 may be on any of them"
    gpus.locate(0, "GPU-b")
    assert gpus.is_known
    assert (gpus.of(0), gpus.of(1), gpus.troubles) == ("GPU-b", "GPU-a", ("GPU-d: hot",))
    assert gpus.assign(2, 1.0) is None, "it has not been watched for long"
    assert gpus.assign(2, 1.0 + PROBATION_S) == "GPU-spare"
    gpus.locate(0, "GPU-elsewhere")
    assert gpus.assign(0, 1.0) == "GPU-b", "as if it had been known from the start"


def test_one_that_died_without_a_word_is_placed_by_what_the_others_say() -> None:
    gpus = unknown(0, 1)
    gpus.see(seen("GPU-a", "GPU-b"), 1.0)
    gpus.locate(0, "GPU-a")
    assert gpus.assign(1, 1.0 + PROBATION_S) == "GPU-b"
    gpus = unknown(0, 1)
    gpus.see(seen("GPU-a", "GPU-b"), 1.0)
    gpus.locate(0, "GPU-a")
    gpus.forget(1)
    gpus.see(seen("GPU-a", "GPU-b"), 2.0)
    assert gpus.is_known


def test_a_list_without_the_gpu_of_a_rank_teaches_nothing() -> None:
    gpus = unknown(0)
    gpus.locate(0, "GPU-part-of-another")
    gpus.see(seen("GPU-a"), 1.0)
    assert not gpus.is_known
    assert gpus.of(0) is None
    gpus.see([], 1.0)
    assert not gpus.is_known


def test_a_rank_whose_gpu_is_not_fit_gets_a_spare_one() -> None:
    gpus = pool("GPU-a", "GPU-b", "GPU-spare")
    for rank in (0, 1):
        gpus.assign(rank, 0.0)
    gpus.see(seen("GPU-a", "GPU-spare", b="xid 79"), 1.0)
    assert gpus.trouble("GPU-b") == "xid 79"
    assert gpus.assign(1, 1.0) == "GPU-spare", "it was there from the start: without probation"
    gpus.see(seen("GPU-a", "GPU-spare", "GPU-b"), 2.0)
    assert gpus.assign(1, 10.0) == "GPU-spare", "it stays where it is"


def test_one_that_appears_or_comes_back_is_on_probation() -> None:
    gpus = pool("GPU-a")
    gpus.assign(0, 0.0)
    gpus.see(seen("GPU-new"), 1.0)
    assert gpus.trouble("GPU-a") == NOT_THERE
    assert gpus.assign(0, 1.0) is None
    assert gpus.next_usable(1.0) == 1.0 + PROBATION_S
    assert gpus.room_for({0}) == 1, "once the probation is over"
    gpus.see(seen("GPU-new"), 2.0)
    assert gpus.next_usable(2.0) == 1.0 + PROBATION_S, "to be seen again does not begin it anew"
    gpus.see(seen(new="hot"), 2.5)
    gpus.see(seen("GPU-new"), 3.0)
    assert gpus.assign(0, 4.9) is None, "it does after a lapse"
    assert gpus.assign(0, 5.0) == "GPU-new"


def test_a_verdict_condemns_until_the_watchdog_finds_it_fit() -> None:
    gpus = pool("GPU-a")
    gpus.condemn("GPU-a", "xid 48")
    gpus.condemn("GPU-elsewhere", "xid 48")
    assert gpus.assign(0, 100.0) is None
    assert gpus.troubles == ("GPU-a: xid 48",)
    gpus.see(seen("GPU-a"), 100.0)
    assert gpus.trouble("GPU-a") == ""
    assert gpus.assign(0, 100.0 + PROBATION_S) == "GPU-a"


def test_a_barred_one_stays_out_until_it_is_released_however_fit_it_is() -> None:
    gpus = pool("GPU-a")
    gpus.assign(0, 0.0)
    gpus.bar("GPU-a", "no rank starts on it")
    gpus.see(seen("GPU-a"), 50.0)
    assert gpus.is_barred(0)
    assert gpus.trouble("GPU-a") == "no rank starts on it"
    assert (gpus.assign(0, 100.0), gpus.room_for({0})) == (None, 0)
    assert gpus.bars == ("GPU-a: no rank starts on it",)
    assert gpus.release("GPU-a")
    assert gpus.assign(0, 100.0) == "GPU-a"
    assert not gpus.release("GPU-a")
    assert not gpus.release("GPU-elsewhere")
    assert (gpus.bars, gpus.barred) == ((), {})


def test_what_was_barred_in_an_earlier_life_stays_so_wherever_it_comes_from() -> None:
    gpus = pool("GPU-a", "GPU-b", barred={"GPU-a": "no rank starts on it", "GPU-new": "nor on this one"})
    assert [gpus.assign(rank, 0.0) for rank in (0, 1)] == ["GPU-b", None]
    assert gpus.trouble("GPU-a") == "no rank starts on it"
    assert gpus.bars == ("GPU-a: no rank starts on it",), "the other is not there"
    gpus.see(seen("GPU-a", "GPU-b", "GPU-new"), 1.0)
    assert (gpus.assign(1, 100.0), gpus.room_for({1})) == (None, 0)
    assert gpus.release("GPU-new")
    assert gpus.assign(1, 100.0) == "GPU-new"
    assert dict(gpus.barred) == {"GPU-a": "no rank starts on it"}


def test_a_gpu_is_free_again_only_when_its_rank_has_left_for_good() -> None:
    gpus = pool("GPU-a", "GPU-b")
    for rank in (0, 1):
        gpus.assign(rank, 0.0)
    assert (gpus.room_for({2}), gpus.assign(2, 1.0)) == (0, None), "a rank that is lost keeps its GPU"
    gpus.forget(1)
    assert (gpus.room_for({2}), gpus.room_for({2, 3})) == (1, 1)
    assert gpus.assign(2, 1.0) == "GPU-b"


times = st.floats(0.0, 3.0)
ranks = st.integers(0, 5)
uuids = st.sampled_from([*UUIDS, "GPU-new", "GPU-newer"])
happenings = st.one_of(
    st.tuples(st.just("assign"), times, ranks),
    st.tuples(st.just("assign"), times, ranks),
    st.tuples(st.just("forget"), times, ranks),
    st.tuples(st.just("condemn"), times, uuids),
    st.tuples(st.just("bar"), times, uuids),
    st.tuples(st.just("release"), times, uuids),
    st.tuples(st.just("see"), times, st.dictionaries(uuids, st.booleans())),
)


class Observed:
    """A pool, and what is known of its GPUs by what happened to them alone."""

    def __init__(self, homes: tuple[str, ...], ranks_per_gpu: int) -> None:
        self.pool = pool(*homes, ranks_per_gpu=ranks_per_gpu)
        self.ranks_per_gpu = ranks_per_gpu
        self.now = 0.0
        self.fit_since = dict.fromkeys(homes, -PROBATION_S)
        self.barred: set[str] = set()
        self.on: dict[int, str] = {}

    def usable(self, uuid: str) -> bool:
        return uuid not in self.barred and self.now >= self.fit_since.get(uuid, float("inf")) + PROBATION_S

    def happen(self, what: str, thing: object) -> None:
        match what, thing:
            case "assign", int(rank):
                self.assign(rank)
            case "forget", int(rank):
                self.pool.forget(rank)
                self.on.pop(rank, None)
            case "condemn", str(uuid):
                self.pool.condemn(uuid, "verdict")
                self.fit_since.pop(uuid, None)
            case "bar", str(uuid):
                self.pool.bar(uuid, "keeps failing")
                self.barred.add(uuid)
            case "release", str(uuid):
                self.pool.release(uuid)
                self.barred.discard(uuid)
            case "see", dict(fit):
                self.pool.see([GpuSeen(uuid, fits, "" if fits else "bad") for uuid, fits in fit.items()], self.now)
                there = [uuid for uuid, fits in fit.items() if fits]
                self.fit_since = {uuid: self.fit_since.get(uuid, self.now) for uuid in there}

    def assign(self, rank: int) -> None:
        before, room = self.on.get(rank), self.pool.room_for({rank})
        others = Counter(uuid for other, uuid in self.on.items() if other != rank)
        free = [uuid for uuid in self.fit_since if self.usable(uuid) and others[uuid] < self.ranks_per_gpu]
        got = self.pool.assign(rank, self.now)
        if before is not None and self.usable(before):
            assert got == before, "an assignment is stable while its GPU is fit"
        assert (got is None) == (not free), f"{got} of {free}"
        if got is not None:
            assert got in free and room == 1
            self.on[rank] = got


@given(st.integers(1, 3), st.lists(happenings, max_size=60))
def test_no_gpu_gets_too_many_ranks_or_any_that_it_is_not_fit_for(
    ranks_per_gpu: int, history: list[tuple[str, float, object]]
) -> None:
    world = Observed(UUIDS, ranks_per_gpu)
    for what, passes, thing in history:
        world.now += passes
        world.happen(what, thing)
        on = [uuid for rank in range(6) if (uuid := world.pool.of(rank))]
        assert max(Counter(on).values(), default=0) <= ranks_per_gpu
        assert {rank: world.pool.of(rank) for rank in world.on} == world.on
        end = world.pool.next_usable(world.now)
        assert end is None or end > world.now


@pytest.mark.parametrize("ranks_per_gpu", [1, 2])
def test_there_is_room_for_no_more_than_can_be_assigned(ranks_per_gpu: int) -> None:
    gpus = pool(*UUIDS[:2], ranks_per_gpu=ranks_per_gpu)
    wanted = set(range(6))
    room = gpus.room_for(wanted)
    assert room == len([rank for rank in sorted(wanted) if gpus.assign(rank, 0.0)]) == 2 * ranks_per_gpu
