"""The ranks that are connected, as the supervisor tells and asks them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from elastic_daemon import protocol as p
from elastic_daemon.processes.control_server import Peer
from elastic_daemon.processes.fence_word import FenceWord
from elastic_daemon.processes.rank_messages import RankAction, rank_message


class RankPeers:
    """`fence`: what all ranks of this life of the daemon look at; to be set before the first of them is forked."""

    fence: FenceWord

    def __init__(self) -> None:
        self._peers: dict[p.Identity, Peer] = {}

    def add(self, peer: Peer) -> None:
        self._peers[peer.rank, peer.incarnation] = peer

    def forget(self, identity: p.Identity) -> None:
        self._peers.pop(identity, None)

    def tell(self, action: RankAction) -> None:
        """The newest incarnation of the rank; nobody if it is not connected."""
        if isinstance(action, p.Fence):
            self.fence.fence(action.epoch)  # the first fence of an epoch is one for all of its ranks
        newest = max((identity for identity in self._peers if identity[0] == action.rank), default=None)
        if newest is not None:
            type_, fields = rank_message(action)
            self._peers[newest].send(type_, **fields)

    def set_log_level(self, level: str) -> None:
        for peer in self._peers.values():
            peer.send("log_level", level=level)

    async def ask(self, identities: Iterable[p.Identity], question: str) -> dict[int, Any]:
        """The answers by rank, of those that are connected. Raises as `Peer.call`."""
        peers = [self._peers[identity] for identity in identities if identity in self._peers]
        answers = await asyncio.gather(*(peer.call(question) for peer in peers))
        return {peer.rank: answer for peer, answer in zip(peers, answers, strict=True)}
