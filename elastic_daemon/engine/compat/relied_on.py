"""How a symbol that is relied on is written down."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReliedOn:
    """A symbol, why it matters, and what must stay as it is.

    `parameters`: names of its parameters, in order. `attributes`: instance attributes of a class that we read or set.
    """

    symbol: str
    why: str
    parameters: tuple[str, ...] | None = None
    attributes: tuple[str, ...] = ()
