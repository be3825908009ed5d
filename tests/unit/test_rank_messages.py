"""What ranks say and are told about experts, over the wire and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from elastic_daemon import protocol as p
from elastic_daemon.placement import Placement, SlotLoad, Source
from elastic_daemon.processes.messages import Message, decode, encode
from elastic_daemon.processes.rank_messages import rank_event, rank_message

IDENTITY = (2, 7)
PLACEMENT = Placement(3, {0: np.array([[0, 1]]), 2: np.array([[2, 0]])})


def heard(type_: str, **fields: Any) -> p.RankEvent | None:
    return rank_event(IDENTITY, decode(encode({"type": type_, "epoch": 4, **fields})))


def told(action: Any) -> Message:
    type_, fields = rank_message(action)
    return decode(encode({"type": type_, **fields}))


def test_a_regroup_tells_where_experts_come_from_and_came_from() -> None:
    loads = (SlotLoad(2, 0, 1, 0, 1, Source.HOST), SlotLoad(2, 0, 0, 2, -1, Source.CHECKPOINT))
    message = told(p.Regroup(2, 4, (0, 2), PLACEMENT, loads))
    assert [load["source"] for load in message["loads"]] == ["host", "checkpoint"]
    assert Placement.from_json(message["placement"]) == PLACEMENT
    event = heard("regrouped", seconds={"group": 0.5}, loaded={"host": (10, 0.25)}, unusable=[(0, 1)])
    assert event == p.RankRegrouped(*IDENTITY, 4, {"group": 0.5}, {"host": [10, 0.25]}, ((0, 1),))  # type: ignore[dict-item]


def test_a_move_while_serving() -> None:
    message = told(p.Respread(2, 4, 9, PLACEMENT))
    assert (message["type"], message["epoch"], message["serial"]) == ("respread", 4, 9)
    assert Placement.from_json(message["placement"]) == PLACEMENT
    event = heard("respread_done", serial=9, column=[[2, 0]], seconds=0.5, bytes=100)
    assert event == p.RankRespread(*IDENTITY, 4, 9, ((2, 0),), 0.5, 100)


def test_copies_to_host_memory() -> None:
    message = told(p.StoreExperts(2, 4, ((0, 1, 0), (0, 0, 2))))
    assert message == {"type": "store", "epoch": 4, "experts": [[0, 1, 0], [0, 0, 2]]}
    event = heard("stored", experts=[(0, 0), (0, 2)], seconds=0.5, bytes=100)
    assert event == p.RankStored(*IDENTITY, 4, ((0, 0), (0, 2)), 0.5, 100)


def test_a_column_that_balancing_has_changed() -> None:
    assert heard("column", column=[[1, 0]]) == p.ColumnChanged(*IDENTITY, 4, ((1, 0),))


def test_what_nobody_knows() -> None:
    assert heard("gossip") is None
