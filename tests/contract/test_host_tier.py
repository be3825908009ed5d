"""From slots to host memory and back: what a rank stores, and where a regroup's loads come from."""

from __future__ import annotations

import queue
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elastic_daemon.engine import storing, tiers
from elastic_daemon.engine.experts import ExpertSlots, SlotContent
from elastic_daemon.engine.host_copies import HostCopies
from elastic_daemon.engine.storing import Storing
from elastic_daemon.engine.tiers import load_slots
from elastic_daemon.placement import Source

pytestmark = pytest.mark.contract

COLUMN = np.array([[4, 1, 2], [3, 0, 5]])
WAIT_S = 10.0


class Slots(ExpertSlots):
    """Real slots, of layers that have nothing but parameters. "From the checkpoint" they get the expert's number."""

    def __init__(self, column: Any) -> None:
        self._layers: Any = [torch.nn.Module() for _ in column]
        for layer, row in zip(self._layers, column, strict=True):
            layer.w = torch.nn.Parameter(torch.tensor(row).float()[:, None].expand(-1, 8).contiguous())
            layer.scale = torch.nn.Parameter(torch.tensor(row).double())
        self.from_checkpoint: list[SlotContent] = []

    def load(self, contents: Iterable[SlotContent]) -> int:
        self.from_checkpoint += contents
        return 1000

    def held(self, layer: int, slot: int) -> set[float]:
        return {float(value) for part in self._row(layer, slot).values() for value in part.flatten()}


class Rank:
    """A main thread that stages whenever it is woken, as an engine core does."""

    def __init__(self, directory: Path) -> None:
        self.slots = Slots(COLUMN)
        self.copies = HostCopies(directory, "model", "rank-2")
        self.woken: queue.Queue[None] = queue.Queue()
        self.sent: queue.Queue[dict[str, Any]] = queue.Queue()
        send = lambda type_, **rest: self.sent.put({"type": type_, **rest})  # noqa: E731
        self.storing = Storing(2, self.slots, self.copies, lambda: COLUMN, send, lambda: self.woken.put(None))

    def turn(self) -> None:
        self.woken.get(timeout=WAIT_S)
        self.storing.stage()


@pytest.fixture
def rank(tmp_path: Path) -> Rank:
    return Rank(tmp_path)


def wish(rank: Rank, experts: list[tuple[int, int]]) -> None:
    rank.storing.order(7, experts)
    rank.storing.stage()


def load(layer: int, slot: int, expert: int, source: Source) -> dict[str, Any]:
    return {"layer": layer, "slot": slot, "expert": expert, "source": source.value}


def test_stored_experts_are_told_and_can_be_loaded_into_another_slot(rank: Rank) -> None:
    wish(rank, [(0, 4), (1, 0)])
    told = rank.sent.get(timeout=WAIT_S)
    assert (told["type"], told["epoch"], told["experts"]) == ("stored", 7, [(0, 4), (1, 0)])
    assert told["bytes"] == 2 * (8 * 4 + 8)
    other = Slots(np.full_like(COLUMN, 9))
    loaded = load_slots(0, other, rank.copies, [load(0, 2, 4, Source.HOST), load(1, 1, 0, Source.HOST)])
    assert (other.held(0, 2), other.held(1, 1)) == ({4.0}, {0.0})
    assert other.held(0, 1) == {9.0}
    assert {source: tier.bytes for source, tier in loaded.tiers.items()} == {Source.HOST: told["bytes"]}
    assert not loaded.unusable and not other.from_checkpoint


def test_no_more_than_a_batch_between_two_steps(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "STAGED_BYTES", 1)
    wish(rank, [(0, 4), (0, 1), (1, 5)])
    batches = []
    for _ in range(3):
        batches.append(rank.sent.get(timeout=WAIT_S)["experts"])
        assert rank.sent.empty(), "the next batch waits until the main thread is between two steps"
        rank.turn()
    assert batches == [[(0, 4)], [(0, 1)], [(1, 5)]]


def test_an_expert_that_has_moved_to_another_slot_or_away(rank: Rank) -> None:
    wish(rank, [(0, 5), (1, 3)])
    assert rank.sent.get(timeout=WAIT_S)["experts"] == [(1, 3)]


def test_after_a_fence_nothing_more_is_read(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "STAGED_BYTES", 1)
    wish(rank, [(0, 4), (0, 1)])
    rank.storing.void()
    rank.turn()
    assert rank.sent.get(timeout=WAIT_S)["experts"] == [(0, 4)]
    assert rank.sent.empty()
    wish(rank, [(0, 2)])
    assert rank.sent.get(timeout=WAIT_S)["experts"] == [(0, 2)]


def test_what_cannot_be_written_is_not_told_and_ends_the_order(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full file system would fail for each of thousands of experts."""
    monkeypatch.setattr(storing, "STAGED_BYTES", 100)  # two experts and a bit
    rank.copies.path(0, 1).mkdir()
    wish(rank, [(0, 4), (0, 1), (0, 2), (1, 0)])
    assert rank.sent.get(timeout=WAIT_S)["experts"] == [(0, 4)]
    rank.turn()
    assert rank.sent.empty()
    rank.copies.path(0, 1).rmdir()
    wish(rank, [(0, 1)])
    assert rank.sent.get(timeout=WAIT_S)["experts"] == [(0, 1)]


@pytest.mark.parametrize("few_bytes", [0, 1 << 30], ids=["in parallel", "one by one"])
def test_the_checkpoint_is_read_instead_of_a_bad_copy_and_where_it_was_asked_for(
    rank: Rank, few_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "FEW_BYTES", few_bytes)
    monkeypatch.setattr(tiers, "READERS", 2)
    wish(rank, [(0, 4), (0, 1), (0, 2)])
    rank.sent.get(timeout=WAIT_S)
    rank.copies.path(0, 1).write_bytes(b"torn")
    loads = [load(0, 0, 4, Source.HOST), load(0, 1, 1, Source.HOST), load(0, 2, 2, Source.CHECKPOINT)]
    loads.append(load(1, 0, 3, Source.HOST))
    loaded = load_slots(0, slots := Slots(np.full_like(COLUMN, 9)), rank.copies, loads)
    assert slots.from_checkpoint == [SlotContent(0, 2, 2), SlotContent(0, 1, 1), SlotContent(1, 0, 3)]
    assert loaded.unusable == [(0, 1), (1, 3)]
    assert loaded.tiers.keys() == {Source.HOST, Source.CHECKPOINT}
    assert loaded.tiers[Source.CHECKPOINT].bytes == 1000
    assert slots.held(0, 0) == {4.0}


def test_without_host_copies_all_comes_from_the_checkpoint() -> None:
    slots = Slots(COLUMN)
    loaded = load_slots(0, slots, None, [load(0, 0, 4, Source.HOST)])
    assert slots.from_checkpoint == [SlotContent(0, 0, 4)]
    assert not loaded.unusable
