"""Where a regroup's loads come from: host memory where a whole copy is there, else the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import structlog

from elastic_daemon.engine.experts import ExpertSlots, SlotContent
from elastic_daemon.engine.host_copies import HostCopies
from elastic_daemon.engine.respread import gb_per_s
from elastic_daemon.errors import HostCopyUnusable
from elastic_daemon.messages import Message
from elastic_daemon.placement import Source

log = structlog.get_logger(__name__)


@dataclass
class TierLoad:
    """What has come from one tier, and the time that it took."""

    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Loaded:
    """`unusable`: (layer, expert) of copies in host memory that had to be passed over."""

    tiers: dict[Source, TierLoad]
    unusable: list[tuple[int, int]]


def load_slots(rank: int, slots: ExpertSlots, copies: HostCopies | None, loads: Iterable[Message]) -> Loaded:
    """Carry out the loads of a `regroup` message. Needs the current vLLM config to be set."""
    tiers = {Source.HOST: TierLoad(), Source.CHECKPOINT: TierLoad()}
    left, unusable, count = [], [], 0
    for load in loads:
        content = SlotContent(load["layer"], load["slot"], load["expert"])
        count += 1
        if copies is None or load["source"] != Source.HOST:
            left.append(content)
        elif not _load_copy(rank, slots, copies, content, tiers[Source.HOST]):
            left.append(content)
            unusable.append((content.layer, content.expert))
    if left:
        started = time.monotonic()
        tiers[Source.CHECKPOINT] = TierLoad(slots.load(left), time.monotonic() - started)
    used = {source: tier for source, tier in tiers.items() if tier.bytes}
    log.info(
        "experts_loaded",
        rank=rank,
        slots=count,
        bytes=sum(tier.bytes for tier in used.values()),
        seconds={source: round(tier.seconds, 4) for source, tier in used.items()},
        gb_per_s={source: gb_per_s(tier.bytes, tier.seconds) for source, tier in used.items()},
    )
    return Loaded(used, unusable)


def _load_copy(rank: int, slots: ExpertSlots, copies: HostCopies, content: SlotContent, tier: TierLoad) -> bool:
    started = time.monotonic()
    try:
        tier.bytes += slots.load_copy(content, copies)
    except HostCopyUnusable as error:
        log.warning("host_copy_unusable", rank=rank, layer=content.layer, expert=content.expert, because=str(error))
        return False
    tier.seconds += time.monotonic() - started
    return True
