"""How the streams of a drill are sampled: what makes one that goes on elsewhere depend on more than its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

FIRST_SEED = 1000


@dataclass(frozen=True)
class Sampling:
    """`fields`: of the body of a request, what is not as in a greedy one.

    `drawn`: tokens are drawn at random, from a seed. `ranked`: of two tokens that may come, the one with the higher
    logprob does, so that a difference of logprobs says how near the other one was.
    """

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    drawn: bool = False
    ranked: bool = True


GREEDY = Sampling("greedy")

PENALISED = Sampling(
    "penalised",
    {"presence_penalty": 0.6, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    ranked=False,  # logprobs are those before penalties
)


def seeded(number: int, temperature: float = 0.8, top_p: float = 0.95) -> Sampling:
    """With a seed of its own for each number of a stream."""
    fields = {"seed": FIRST_SEED + number, "temperature": temperature, "top_p": top_p}
    return Sampling("seeded", fields, drawn=True, ranked=False)


def constrained(tokens: int) -> Sampling:
    """To a regular expression that `tokens` tokens do not come to the end of.

    It asks for a mark at places that only counting finds: a grammar that has forgotten where it was shows.
    """
    return Sampling("constrained", {"structured_outputs": {"regex": f"([0-9 ]{{16}};){{{tokens // 4 + 1}}}"}})


def _mixed(number: int, tokens: int) -> Sampling:
    kinds = (GREEDY, seeded(number), PENALISED, constrained(tokens))
    # Ranks get streams in turn: with four of them, each would get streams of one kind.
    return kinds[(number + number // len(kinds)) % len(kinds)]


MODES: Mapping[str, Callable[[int, int], Sampling]] = {
    "greedy": lambda number, tokens: GREEDY,
    "seeded": lambda number, tokens: seeded(number),
    "mixed": _mixed,
}
"""What the stream of a number is sampled like, by the name that a user gives."""


def samplings_for(mode: str, streams: int, tokens: int) -> list[Sampling]:
    """One for each stream of `tokens` tokens."""
    return [MODES[mode](number, tokens) for number in range(streams)]
