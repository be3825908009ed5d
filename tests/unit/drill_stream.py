"""What a client of a drill saw, made up."""

from __future__ import annotations

import dataclasses
from typing import Any

from elastic_daemon.drill.report import StreamResult


def stream(prompt: str = "p", tokens: tuple[int, ...] = (5, 6, 7), **changes: Any) -> StreamResult:
    """An undisturbed stream with one token a second."""
    whole = StreamResult(
        prompt=prompt,
        token_ids=tokens,
        text="".join(chr(97 + token) for token in tokens),
        finish_reason="length",
        completion_tokens=len(tokens),
        error=None,
        started=0.0,
        ended=float(len(tokens)),
        arrivals=tuple(float(second) for second in range(1, len(tokens) + 1)),
    )
    return dataclasses.replace(whole, **changes)


def stream_of(*token_ids: int, **fields: Any) -> StreamResult:
    """One of these tokens, over within a second."""
    result = StreamResult(
        prompt="a",
        token_ids=token_ids,
        text="x" * len(token_ids),
        finish_reason="length",
        completion_tokens=len(token_ids),
        error=None,
        started=0.0,
        ended=1.0,
        arrivals=tuple(0.1 * n for n in range(len(token_ids))),
    )
    return dataclasses.replace(result, **fields)
