"""Tasks of the bundled model: seeded examples, an exact checker and a train/held-out split.

Every example is one line of text, ``<prompt> =`` followed by the answer::

    sort 42 7 93 15 = 7 15 42 93
    add 384 + 729 = 1113
    reverse dragon = nogard
    count 17 to 37 by 5 = 17 22 27 32 37

The answer is always a function of the prompt (:func:`solve`), so any output of a server can be checked exactly.
"""

from __future__ import annotations

import hashlib
import random
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass

MAX_NUMBER = 999
MAX_SORTED = 99
# The wide steps pass many numbers that differ from the last one in their first digit only: without them the model
# often stops counting a hundred too early.
STEPS = (*range(1, 11), 20, 25, 50, 100)
SORT_ITEMS = (2, 8)
WORD_LETTERS = (3, 12)
SHORT_COUNT = (1, 12)
LONG_COUNT = (40, 175)
TASKS = ("sort", "add", "reverse", "count", "count_long")

_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Example:
    """One prompt with its only right answer; ``answer`` starts with the blank that separates it from ``=``."""

    task: str
    prompt: str
    answer: str

    @property
    def held_out(self) -> bool:
        """Whether the example belongs to the held-out tenth, which training never sees."""
        return is_held_out(self.prompt)


def solve(prompt: str) -> str:
    """Return the right answer to ``prompt`` (with or without the final ``=``); ValueError if it is no task."""
    text = prompt.strip().removesuffix("=").strip()
    if match := re.fullmatch(r"sort((?: \d+)+)", text):
        return " ".join(str(n) for n in sorted(int(n) for n in match[1].split()))
    if match := re.fullmatch(r"add (\d+) \+ (\d+)", text):
        return str(int(match[1]) + int(match[2]))
    if match := re.fullmatch(r"reverse ([a-z]+)", text):
        return match[1][::-1]
    if match := re.fullmatch(r"count (\d+) to (\d+) by ([1-9]\d*)", text):
        first, last, step = (int(group) for group in match.groups())
        return " ".join(str(n) for n in range(first, last + 1, step))
    raise ValueError(f"not a task of this model: {prompt!r}")


def is_right(prompt: str, output: str) -> bool:
    """Whether ``output`` is exactly the answer to ``prompt``, leaving aside blanks at the ends."""
    return output.strip() == solve(prompt)


def is_held_out(prompt: str) -> bool:
    """Assign a prompt to the held-out set by a hash of its content.

    The operands of ``sort`` and ``add`` are hashed in sorted order, so that a held-out sum or list does not occur
    in training under another order of its operands either. Sums of two digits are so few that none is held out.
    """
    words = prompt.strip().removesuffix("=").split()
    if words[:1] == ["add"] and all(len(word) == 1 for word in words[1:]):
        return False
    if words[:1] in (["sort"], ["add"]):
        words[1:] = sorted(words[1:])
    digest = hashlib.sha256(" ".join(words).encode()).digest()
    return int.from_bytes(digest[:4], "big") % _HELD_OUT_ONE_IN == 0


def _number(rng: random.Random, most: int = MAX_NUMBER) -> int:
    """Draw a number up to ``most``; its digit count is drawn first, so that short numbers are familiar too."""
    digits = range(1, len(str(most)) + 1)
    return rng.randrange(min(10 ** rng.choices(digits, [2**d for d in digits])[0], most + 1))


def _count_prompt(rng: random.Random, items: int) -> str:
    """Draw a counting prompt whose answer has ``items`` numbers, none above MAX_NUMBER."""
    step = rng.choice([step for step in STEPS if step * items <= MAX_NUMBER])
    first = _number(rng, MAX_NUMBER - step * items)
    # The last number is always met exactly, so that where to stop can be seen in the text without any arithmetic.
    last = first + step * (items - 1)
    return f"count {first} to {last} by {step} ="


def _prompt(task: str, rng: random.Random, items: int | None) -> str:
    if task == "sort":
        wanted = items or rng.randint(*SORT_ITEMS)
        numbers: dict[int, None] = {}  # an ordered set: the model only learns lists of different numbers
        while len(numbers) < wanted:
            numbers[_number(rng, MAX_SORTED)] = None
        return f"sort {' '.join(map(str, numbers))} ="
    if task == "add":
        return f"add {_number(rng)} + {_number(rng)} ="
    if task == "reverse":
        word = "".join(rng.choices(string.ascii_lowercase, k=items or rng.randint(*WORD_LETTERS)))
        return f"reverse {word} ="
    if task == "count":
        return _count_prompt(rng, items or rng.randint(*SHORT_COUNT))
    if task == "count_long":
        return _count_prompt(rng, items or rng.randint(*LONG_COUNT))
    raise ValueError(f"unknown task {task!r}, choose from {', '.join(TASKS)}")


def make_example(task: str, rng: random.Random, *, held_out: bool, items: int | None = None) -> Example:
    """Draw one example of ``task`` from the wanted side of the split; ``items`` fixes the length of its answer."""
    while True:
        prompt = _prompt(task, rng, items)
        if is_held_out(prompt) == held_out:
            return Example(task, prompt, " " + solve(prompt))


def examples(task: str, seed: int, *, held_out: bool) -> Iterator[Example]:
    """Yield examples of ``task`` for ever; equal arguments give equal examples."""
    rng = random.Random(f"{task}/{seed}/{held_out}")
    while True:
        yield make_example(task, rng, held_out=held_out)


def held_out_examples(task: str, n: int, seed: int) -> list[Example]:
    """Return ``n`` held-out examples of ``task`` with different prompts."""
    found: dict[str, Example] = {}
    for example in examples(task, seed, held_out=True):
        found.setdefault(example.prompt, example)
        if len(found) >= n:
            break
    return list(found.values())
