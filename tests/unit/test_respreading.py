"""One rank's part in a respread, without a group: order of moves, what is told, what a fence leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from elastic_daemon.engine.respread import NO_PLAN, Plan, Respreading
from elastic_daemon.errors import PeerLost
from elastic_daemon.placement import IntArray

OLD = np.array([[0, 1], [2, 3], [4, 5]])
NEW = np.array([[1, 0], [2, 3], [5, 4]])


class Table:
    """In place of weights and tables: says when a layer changes."""

    def __init__(self) -> None:
        self.table = OLD.copy()
        self.postponed = False
        self.moves: list[int] = []
        self.resets = 0
        self.fails = False

    def layers_unlike(self, table: IntArray) -> tuple[int, ...]:
        if table.shape != self.table.shape:
            raise ValueError("another size")
        return tuple(int(layer) for layer in np.flatnonzero((table != self.table).any(axis=1)))

    def move(self, layer: int, row: IntArray) -> int:
        if self.fails:
            raise PeerLost("gone")
        self.table[layer] = row
        self.moves.append(layer)
        return 100

    def forget_load(self) -> None:
        self.resets += 1


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
def sent() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def part(table: Table, sent: list[dict[str, Any]]) -> Respreading:
    return Respreading(3, table, lambda type_, **rest: sent.append({"type": type_, **rest}), lambda: table.table[:, :1])


def test_one_layer_a_step_and_only_those_that_change(part: Respreading, table: Table, sent: list[Any]) -> None:
    part.hold(Plan(2, 7, NEW))
    part.advance()
    assert not table.moves, "not before all hold it"
    part.begin(7)
    assert (part.serial, part.is_moving, table.postponed) == (NO_PLAN, True, True)
    part.advance()
    assert (table.moves, part.is_moving, table.resets, sent) == ([0], True, 0, [])
    part.advance()
    assert (table.moves, part.is_moving, table.postponed, table.resets) == ([0, 2], False, False, 1)
    (done,) = sent
    assert done.pop("seconds") >= 0
    expected = {"type": "respread_done", "epoch": 2, "serial": 7, "column": [[1], [2], [5]], "bytes": 200}
    assert done == expected
    part.advance()
    assert (len(sent), table.moves) == (1, [0, 2])


def test_a_plan_that_changes_nothing_is_done_at_once(part: Respreading, table: Table, sent: list[Any]) -> None:
    part.hold(Plan(2, 7, OLD))
    part.begin(7)
    part.advance()
    assert (table.moves, table.resets, part.is_moving) == ([], 0, False)
    assert [done["bytes"] for done in sent] == [0]


def test_the_next_plan_waits_for_the_end_of_this_one(part: Respreading, table: Table, sent: list[Any]) -> None:
    part.hold(Plan(2, 7, NEW))
    part.begin(7)
    part.hold(Plan(2, 8, OLD))
    part.begin(8)  # all hold it, and all are moving
    part.advance()
    part.advance()
    assert (part.serial, part.is_moving) == (8, False)
    part.begin(8)
    part.advance()
    part.advance()
    assert np.array_equal(table.table, OLD)
    assert [done["serial"] for done in sent] == [7, 8]


def test_a_fence_leaves_what_has_moved(part: Respreading, table: Table, sent: list[Any]) -> None:
    part.hold(Plan(2, 7, NEW))
    part.begin(7)
    part.advance()
    table.fails = True
    with pytest.raises(PeerLost):
        part.advance()
    part.void()
    assert (part.serial, part.is_moving, table.postponed, table.moves, sent) == (NO_PLAN, False, False, [0], [])
    part.advance()


def test_a_table_of_another_group_is_refused(part: Respreading) -> None:
    with pytest.raises(ValueError, match="another size"):
        part.hold(Plan(2, 7, NEW[:, :1]))
    assert part.serial == NO_PLAN
