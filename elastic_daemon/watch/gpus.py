"""The GPUs that this host had at the start. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpus:
    """`uuids` by the index that ranks use, spares last; empty when they are not known."""

    uuids: tuple[str, ...] = ()


def visible(uuids: list[str], variable: str | None) -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES leaves of them, in its order: indices or beginnings of UUIDs, up to the first unknown.

    Source: CUDA C++ Programming Guide, "CUDA Environment Variables".
    """
    if variable is None:
        return tuple(uuids)
    chosen: list[str] = []
    for name in map(str.strip, variable.split(",")):
        if name.isdigit():
            found = uuids[int(name) : int(name) + 1]
        else:
            found = [uuid for uuid in uuids if name and uuid.startswith(name)]
        if len(found) != 1:
            break
        chosen += found
    return tuple(chosen)
