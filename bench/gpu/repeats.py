"""A stream that changed, asked for again where nothing happens: what changes it without any disturbance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.gpu.life import Life
from bench.gpu.resumed import Resumed, changes_of, taken_up
from bench.gpu.tokens import TokenChange
from elastic_daemon.drill.load import run_streams
from elastic_daemon.drill.report import StreamResult

PER_RANK = (1, 2, 3, 4, 6)
"""Copies of the request for each rank, all at once; before these, one alone."""


@dataclass(frozen=True)
class Repeats:
    """Of one request. `differ`: by number of copies at once, how many were not as in the undisturbed run. `resumed`:
    taken up from its middle."""

    prompt: str
    differ: dict[int, int]
    resumed: Sequence[Resumed] = ()

    def __str__(self) -> str:
        counts = ", ".join(f"{count} of {copies}" for copies, count in self.differ.items())
        said = f"{self.prompt[:30]!r} again, undisturbed: {counts} differ"
        if self.resumed:
            changed = changes_of(self.resumed)
            said += f"; taken up from its middle: {len(changed)} of {len(self.resumed)}"
            said += f", {changed[0]}" if changed else ""
        return said


def compared(expected: StreamResult, runs: Sequence[Sequence[StreamResult]]) -> Repeats:
    """`runs`: each of copies of one request that were sent at once; those that failed do not count."""
    differ = {
        len(run): sum(stream.error is None and stream.token_ids != expected.token_ids for stream in run) for run in runs
    }
    return Repeats(expected.prompt, differ)


async def repeated(life: Life, change: TokenChange) -> Repeats:
    """Ask the daemon of `life`, whose ranks are all well, for the request of `change` again."""
    (expected,) = (one for one in life.reference if one.prompt == change.prompt)
    runs = []
    for copies in (1, *(life.setting.ranks * each for each in PER_RANK)):
        samplings = [expected.sampling] * copies
        prompts = [expected.prompt] * copies
        runs.append(await run_streams(life.daemon.url, prompts, life.setting.tokens, samplings=samplings))
    return replace(compared(expected, runs), resumed=await taken_up(life, expected, change.position + 1))
