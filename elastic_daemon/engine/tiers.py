"""Where a regroup's loads come from: host memory where a whole copy is there, else the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog
import torch

from elastic_daemon.engine.experts import ExpertSlots, SlotContent
from elastic_daemon.engine.host_copies import HostCopies
from elastic_daemon.engine.respread import gb_per_s
from elastic_daemon.errors import HostCopyUnusable
from elastic_daemon.placement import Source
from elastic_daemon.processes.messages import Message

log = structlog.get_logger(__name__)


READERS = 4
"""Copies that are read and checked at once: a digest keeps a core busy. As many experts are in memory twice."""


FEW_BYTES = 8 << 20
"""Less than this is read before threads would have started: milliseconds count in a recovery."""

Found = dict[str, torch.Tensor] | HostCopyUnusable


@dataclass(frozen=True)
class TierLoad:
    """What has come from one tier, and the time that it took."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Loaded:
    """`unusable`: (layer, expert) of copies in host memory that had to be passed over."""

    tiers: dict[Source, TierLoad]
    unusable: list[tuple[int, int]]


def load_slots(rank: int, slots: ExpertSlots, copies: HostCopies | None, loads: Iterable[Message]) -> Loaded:
    """Carry out the loads of a `regroup` message. Needs the current vLLM config to be set."""
    hosted: list[SlotContent] = []
    rest: list[SlotContent] = []
    for load in loads:
        from_host = copies is not None and load["source"] == Source.HOST
        (hosted if from_host else rest).append(SlotContent(load["layer"], load["slot"], load["expert"]))
    tiers: dict[Source, TierLoad] = {}
    unusable: list[SlotContent] = []
    if copies is not None and hosted:
        tiers[Source.HOST], unusable = _load_copies(rank, slots, copies, hosted)
    if left := [*rest, *unusable]:
        started = time.monotonic()
        tiers[Source.CHECKPOINT] = TierLoad(slots.load(left), time.monotonic() - started)
    log.info(
        "experts_loaded",
        rank=rank,
        slots=len(hosted) + len(rest),
        bytes=sum(tier.bytes for tier in tiers.values()),
        seconds={source: round(tier.seconds, 4) for source, tier in tiers.items()},
        gb_per_s={source: gb_per_s(tier.bytes, tier.seconds) for source, tier in tiers.items()},
    )
    return Loaded(tiers, [(content.layer, content.expert) for content in unusable])


def _load_copies(
    rank: int, slots: ExpertSlots, copies: HostCopies, contents: list[SlotContent]
) -> tuple[TierLoad, list[SlotContent]]:
    """Fill slots from host memory. Returns also those whose copy was not usable."""
    started, written, unusable = time.monotonic(), 0, []

    def read(content: SlotContent) -> Found:
        try:
            return slots.read_copy(content, copies)
        except HostCopyUnusable as error:
            return error

    few = len(contents) * slots.expert_bytes < FEW_BYTES
    for content, found in zip(contents, map(read, contents) if few else _in_parallel(read, contents), strict=True):
        if isinstance(found, HostCopyUnusable):
            unusable.append(content)
            because, where = str(found), {"layer": content.layer, "expert": content.expert}
            log.warning("host_copy_unusable", rank=rank, **where, because=because)
        else:
            written += slots.fill(content, found)
    return TierLoad(written, time.monotonic() - started), unusable


def _in_parallel(read: Callable[[SlotContent], Found], contents: list[SlotContent]) -> Iterator[Found]:
    """What `read` finds for each, in order."""
    with ThreadPoolExecutor(READERS, "host-copies") as readers:
        for first in range(0, len(contents), READERS):
            yield from readers.map(read, contents[first : first + READERS])
