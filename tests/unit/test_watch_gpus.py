"""What the driver lists at the start, and which GPUs are this daemon's to use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_daemon.watch.gpus import AllowList, Listed, Listing


def heard(*lines: dict[str, Any]) -> Listing:
    listing = Listing()
    for line in lines:
        listing.hear(json.dumps(line).encode())
    return listing


def host(*uuids: str | None) -> list[Listed]:
    """GPUs in slots of their own; None: one that cannot be read."""
    return [Listed(index, uuid, f"slot-{index}" if uuid else None) for index, uuid in enumerate(uuids)]


def test_a_list_is_complete_when_each_gpu_has_answered() -> None:
    first = {"index": 2, "uuid": "GPU-c", "slot": None}
    assert not heard(first).complete
    listing = heard({"count": 3}, first, {"index": 0, "uuid": "GPU-a", "slot": "slot-0"})
    assert (listing.complete, listing.any_read) == (False, True)
    assert listing.gpus == (Listed(0, "GPU-a", "slot-0"), Listed(1), Listed(2, "GPU-c"))
    assert listing.unread == {"1": "no answer"}
    listing.hear(b'{"index": 1, "error": "GPU is lost"}\n')
    assert (listing.complete, listing.unread) == (True, {"1": "GPU is lost"})


def test_nothing_is_known_before_there_is_a_list() -> None:
    assert (heard().gpus, heard().complete, heard().any_read) == ((), False, False)
    assert heard({"count": 0}).complete
    listing = heard({"count": 1}, {"index": 0, "error": "GPU is lost"})
    assert (listing.complete, listing.any_read) == (True, False)


@pytest.mark.parametrize("line", [b"", b"{", b"3", b"[]", b"{}", b'{"index": 1}', b'{"count": "many"}'])
def test_lines_that_are_none(line: bytes) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        Listing().hear(line)


@pytest.mark.parametrize(
    ("variable", "left"),
    [
        (None, ("GPU-aa", "GPU-ab", "GPU-b")),
        ("2,0", ("GPU-b", "GPU-aa")),
        ("2,2", ("GPU-b",)),
        ("GPU-b, GPU-ab", ("GPU-b", "GPU-ab")),
        ("GPU-gone,GPU-b", ("GPU-b",)),
        ("GPU-gone", ()),
        ("1,7,0", ("GPU-ab", "GPU-aa")),
        ("0,-1,1", ("GPU-aa",)),
        ("GPU-a", None),
        ("", None),
        ("-1", None),
        ("MIG-b9f0", None),
    ],
)
def test_cuda_visible_devices(variable: str | None, left: tuple[str, ...] | None) -> None:
    assert AllowList(variable).begin(host("GPU-aa", "GPU-ab", "GPU-b")) == left


@pytest.mark.parametrize(
    ("variable", "left"),
    [
        (None, ("GPU-a", "GPU-c")),
        ("0,1,2", ("GPU-a", "GPU-c")),
        ("2", ("GPU-c",)),
        ("1", ()),
        ("GPU-b,GPU-c", ("GPU-c",)),
    ],
)
def test_a_gpu_that_cannot_be_read_hides_no_other(variable: str | None, left: tuple[str, ...]) -> None:
    assert AllowList(variable).begin(host("GPU-a", None, "GPU-c")) == left


def admitted(variable: str | None, start: Sequence[Listed], later: Sequence[Listed]) -> list[str | None]:
    allowed = AllowList(variable)
    allowed.begin(start)
    first = [gpu.uuid for gpu in allowed.admitted(later)]
    assert [gpu.uuid for gpu in allowed.admitted(later)] == first, "another look changes nothing"
    return first


START = host("GPU-a", "GPU-b", "GPU-c", "GPU-d")


def test_without_the_variable_all_are_ours() -> None:
    later = [*START, Listed(4, "GPU-new", "slot-4"), Listed(5, "GPU-newer")]
    assert admitted(None, START, later) == [gpu.uuid for gpu in later]


def test_an_index_is_a_slot_and_not_whoever_has_that_index_now() -> None:
    shifted = [Listed(0, "GPU-a", "slot-0"), Listed(1, "GPU-c", "slot-2"), Listed(2, "GPU-d", "slot-3")]
    assert admitted("0,1", START, shifted) == ["GPU-a"]
    replaced = host("GPU-a", "GPU-new", "GPU-c", "GPU-newer")
    assert admitted("0,1", START, replaced) == ["GPU-a", "GPU-new"]


def test_a_uuid_is_that_gpu_wherever_it_is_and_no_other() -> None:
    assert admitted("GPU-b", START, host("GPU-a", "GPU-new", "GPU-b")) == ["GPU-b"]
    assert admitted("GPU-e,GPU-b", START, [*START, Listed(4, "GPU-e", "slot-4")]) == ["GPU-b", "GPU-e"]


def test_where_the_driver_tells_no_slots_none_takes_the_place_of_another() -> None:
    start = [Listed(0, "GPU-a"), Listed(1, "GPU-b")]
    assert admitted("0", start, [Listed(0, "GPU-new"), Listed(1, "GPU-b")]) == []
    assert admitted("0", start, start) == ["GPU-a"]


def test_one_that_could_not_be_read_at_its_index_comes_later() -> None:
    start = host("GPU-a", None, "GPU-c", "GPU-d")
    assert admitted("0,1", start, host("GPU-a", "GPU-b", "GPU-c", "GPU-d")) == ["GPU-a", "GPU-b"]
    assert admitted("0,2", start, host("GPU-a", "GPU-b", "GPU-c", "GPU-d")) == ["GPU-a", "GPU-c"]
    both = host("GPU-a", None, None, "GPU-d")
    assert admitted("0,1", both, host("GPU-a", "GPU-b", "GPU-c", "GPU-d")) == ["GPU-a", "GPU-b"]


def test_so_does_one_that_was_not_there_where_more_are_named_than_were_there() -> None:
    start = [Listed(0, "GPU-a", "slot-0"), Listed(1, "GPU-c", "slot-2")]
    whole = host("GPU-a", "GPU-b", "GPU-c", "GPU-d")
    assert admitted("0,1,2", start, whole) == ["GPU-a", "GPU-b", "GPU-c"], "one place, whoever comes first"
    allowed = AllowList("0,1,2")
    allowed.begin(start)
    assert [gpu.uuid for gpu in allowed.admitted(whole)] == ["GPU-a", "GPU-b", "GPU-c"]
    newest = host("GPU-a", "GPU-newest", "GPU-c", "GPU-d")
    assert [gpu.uuid for gpu in allowed.admitted(newest)] == ["GPU-a", "GPU-newest", "GPU-c"], "it is its slot now"


def test_parts_of_gpus_are_not_ours_to_give_away() -> None:
    assert admitted("MIG-b9f0", START, START) == []


def test_a_start_without_a_list_goes_by_the_first_that_comes() -> None:
    allowed = AllowList("1")
    assert [gpu.uuid for gpu in allowed.admitted(reversed(START))] == ["GPU-b"]
    assert [gpu.uuid for gpu in allowed.admitted(host("GPU-new", "GPU-newer"))] == ["GPU-newer"]


def test_strangers_that_come_are_news_once() -> None:
    allowed = AllowList("0")
    allowed.begin(START)
    assert not any(map(allowed.is_news, START[1:])), "they were there at the start"
    assert [allowed.is_news(Listed(4, "GPU-new", "slot-4")) for _ in range(2)] == [True, False]


slots = st.integers(0, 5)
lists = st.dictionaries(slots, st.sampled_from([f"GPU-{name}" for name in "abcdefgh"]), max_size=6).map(
    lambda found: [
        Listed(index, uuid, f"slot-{slot}")
        for index, (slot, uuid) in enumerate(
            sorted({uuid: (slot, uuid) for slot, uuid in sorted(found.items())}.values())
        )
    ]
)


@given(lists, st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True), st.lists(lists, max_size=6))
def test_whatever_comes_no_slot_of_others_is_ever_used(
    start: list[Listed], named: list[int], later: list[list[Listed]]
) -> None:
    allowed = AllowList(",".join(map(str, named)))
    begun = allowed.begin(start) or ()
    ours = {gpu.slot for gpu in start if gpu.index in named}
    others = {gpu.slot for gpu in start} - ours
    assert begun == tuple(start[index].uuid for index in named if index < len(start))
    newcomers: set[str | None] = set()
    for listed in later:
        for gpu in allowed.admitted(listed):
            assert gpu.slot not in others or gpu.uuid in begun, "a GPU of ours may be put elsewhere, no other there"
            if gpu.uuid not in begun and gpu.slot not in ours:
                newcomers.add(gpu.slot)
    assert len(newcomers) <= sum(index >= len(start) for index in named), "as many as were missing at the start"
