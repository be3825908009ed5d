"""What ranks say over the control connection, as events; and the fields of what they are told. Pure."""

from __future__ import annotations

from typing import Any

from elastic_daemon import protocol as p
from elastic_daemon.processes.messages import Message


def rank_event(identity: p.Identity, message: Message) -> p.RankEvent | None:
    """None: no message of ours."""
    rank, incarnation = identity
    match message["type"]:
        case "ready":
            return p.RankReady(rank, incarnation, message["layers"], _column(message), message.get("gpu"))
        case "fault":
            return p.RankFault(rank, incarnation, message["epoch"], message["error"])
        case "quiesced":
            return p.RankQuiesced(rank, incarnation, message["epoch"])
        case "fenced":
            return p.RankFenced(rank, incarnation, message["epoch"], _column(message))
        case "regrouped":
            unusable = _pairs(message["unusable"])
            return p.RankRegrouped(rank, incarnation, message["epoch"], message["seconds"], message["loaded"], unusable)
        case "regroup_failed":
            return p.RegroupFailed(rank, incarnation, message["epoch"], message["error"])
        case "respread_done":
            cost = message["seconds"], message["bytes"]
            return p.RankRespread(rank, incarnation, message["epoch"], message["serial"], _column(message), *cost)
        case "stored":
            cost = message["seconds"], message["bytes"]
            return p.RankStored(rank, incarnation, message["epoch"], _pairs(message["experts"]), *cost)
        case "column":
            return p.ColumnChanged(rank, incarnation, message["epoch"], _column(message))
        case _:
            return None


RankAction = p.Quiesce | p.Fence | p.Regroup | p.Resume | p.Respread | p.StoreExperts


def rank_message(action: RankAction) -> tuple[str, dict[str, Any]]:
    """Type and fields."""
    match action:
        case p.Quiesce():
            return "quiesce", {"epoch": action.epoch}
        case p.Fence():
            return "fence", {"epoch": action.epoch}
        case p.Regroup():
            loads = [
                {"layer": load.layer, "slot": load.slot, "expert": load.expert, "source": load.source}
                for load in action.loads
            ]
            return "regroup", {"epoch": action.epoch, "placement": action.placement.to_json(), "loads": loads}
        case p.Resume():
            return "resume", {"epoch": action.epoch}
        case p.Respread():
            placement = action.placement.to_json()
            return "respread", {"epoch": action.epoch, "serial": action.serial, "placement": placement}
        case p.StoreExperts():
            return "store", {"epoch": action.epoch, "experts": action.experts}


def _column(message: Message) -> p.Column:
    return tuple(tuple(row) for row in message["column"])


def _pairs(found: list[list[int]]) -> tuple[tuple[int, int], ...]:
    """(layer, expert)"""
    return tuple((layer, expert) for layer, expert in found)
