"""The bodies of operators' requests, checked strictly. Pure.

A number in quotes, a boolean for a number, or a name that is not known is an error: whoever gives up GPUs by a request
should not have to guess how it was understood.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_BODY_BYTES = 64 << 10

MAX_TIMEOUT_S = 86_400.0

DRAIN_TIMEOUT_S = 120.0
"""vLLM's default."""

LONGEST_SHOWN = 80

Seconds = Annotated[float, Field(gt=0, le=MAX_TIMEOUT_S, allow_inf_nan=False)]
Body = TypeVar("Body", bound=BaseModel)


class BadOrder(ValueError):
    """The message says what is wrong with the body, and with which part of it."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class OrderBody(_Strict):
    """`drain_timeout` bounds the whole operation, in seconds. `wait`: answer when it has ended."""

    drain_timeout: Seconds = DRAIN_TIMEOUT_S
    wait: bool = True


class ScaleBody(OrderBody):
    """vLLM's body, and which ranks are to leave."""

    new_data_parallel_size: Annotated[int, Field(gt=0)]
    retire_ranks: tuple[Annotated[int, Field(ge=0)], ...] | None = None


class AutomationBody(_Strict):
    enabled: bool


def parse(kind: type[Body], text: bytes) -> Body:
    """Raises BadOrder."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise BadOrder(_describe(error, tuple(kind.model_fields))) from error


def check_scale(body: ScaleBody, min_ranks: int, max_ranks: int) -> None:
    """What can be told without the membership. Raises BadOrder."""
    size = body.new_data_parallel_size
    if size > max_ranks:
        raise BadOrder(f"new_data_parallel_size must be at most {max_ranks}, got {_shown(size)} (see --max-ranks)")
    if size < min_ranks:
        raise BadOrder(
            f"new_data_parallel_size must be at least {min_ranks}, got {size}: fewer ranks cannot hold every expert"
        )
    retire = body.retire_ranks or ()
    if twice := sorted({rank for rank in retire if retire.count(rank) > 1}):
        raise BadOrder(f"retire_ranks names rank {', '.join(map(_shown, twice))} more than once")


def _describe(error: ValidationError, known: Sequence[str]) -> str:
    first = error.errors(include_url=False)[0]
    name = _name(first["loc"])
    match first["type"]:
        case "json_invalid":
            return f"the body is no JSON: {first['ctx']['error']}"
        case "missing":
            return f"{name} is required"
        case "extra_forbidden":
            return f"{name} is not known; expected are {', '.join(known)}"
    said = first["msg"][0].lower() + first["msg"][1:]
    return f"{name or 'the body'}: {said}, got {_shown(first['input'])}"


def _name(path: Sequence[int | str]) -> str:
    """`retire_ranks[1]`; a name that the client made up is shown as text, and cut."""
    parts = [f"[{part}]" if isinstance(part, int) else part for part in path]
    name = "".join(parts)
    return name if name.isascii() and name.isprintable() and len(name) <= LONGEST_SHOWN else _shown(name)


def _shown(value: Any) -> str:
    """What a client sent, for an error message: never longer than a line."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python converts
        return "a number with too many digits"
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "…"
