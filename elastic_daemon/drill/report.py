"""What a drill has measured, and what it makes of it. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from elastic_daemon.commands.operator_commands import describe_recovery
from elastic_daemon.drill.sampling import GREEDY, Sampling

GONE = "gone"
"""In place of a status of `/health`: the daemon does not answer."""


@dataclass(frozen=True)
class StreamResult:
    """What one streaming client saw. Times are monotonic seconds; `arrivals` has one for each chunk with output.

    `token_ids` is empty where the server sends none. `error`: why the stream ended early, None if it did not.
    `logprobs`: where they were asked for, of the likeliest tokens at each position, by token id.
    """

    prompt: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None
    completion_tokens: int | None
    error: str | None
    started: float
    ended: float
    arrivals: tuple[float, ...]
    logprobs: tuple[Mapping[int, float], ...] = ()
    sampling: Sampling = GREEDY

    @property
    def tokens(self) -> int:
        return len(self.token_ids) or len(self.arrivals)

    def longest_gap(self, since: float = -math.inf) -> float:
        """The longest silence between two chunks that ended after `since`; 0 if there was none."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return max((later - earlier for earlier, later in pairs if later > since), default=0.0)


@dataclass(frozen=True)
class Difference:
    """Something of stream `stream` that is not as in the reference run. `position`: of the first token that differs."""

    stream: int
    what: str
    expected: object
    actual: object
    position: int | None = None

    def __str__(self) -> str:
        at = "" if self.position is None else f" from token {self.position} on"
        return f"stream {self.stream}: {self.what} differ{at}: expected {self.expected!r}, got {self.actual!r}"


@dataclass(frozen=True)
class Comparison:
    """A disturbed run beside the undisturbed one. `lost`: streams with an error; `differences`: of all others."""

    streams: int
    tokens_equal: int
    usage_right: int
    lost: tuple[int, ...]
    differences: tuple[Difference, ...]

    @property
    def same(self) -> bool:
        return not self.lost and not self.differences


def compare(reference: Sequence[StreamResult], disturbed: Sequence[StreamResult]) -> Comparison:
    """Compare two runs of the same prompts. Raises ValueError where the prompts are not the same."""
    if [stream.prompt for stream in reference] != [stream.prompt for stream in disturbed]:
        raise ValueError("the two runs are not of the same prompts")
    lost: list[int] = []
    differences: list[Difference] = []
    tokens_equal = usage_right = 0
    for number, (expected, actual) in enumerate(zip(reference, disturbed, strict=True)):
        tokens_equal += (expected.token_ids, expected.text) == (actual.token_ids, actual.text)
        usage_right += _usage_is_right(expected, actual)
        if actual.error is not None:
            lost.append(number)
        else:
            differences += _differences(number, expected, actual)
    return Comparison(len(reference), tokens_equal, usage_right, tuple(lost), tuple(differences))


def _usage_is_right(expected: StreamResult, actual: StreamResult) -> bool:
    """As in the reference, and as many tokens as really came."""
    counted = not actual.token_ids or actual.completion_tokens == len(actual.token_ids)
    return counted and actual.completion_tokens is not None and actual.completion_tokens == expected.completion_tokens


def _differences(number: int, expected: StreamResult, actual: StreamResult) -> list[Difference]:
    found: list[Difference] = []
    if expected.token_ids != actual.token_ids:
        at = first_difference(expected.token_ids, actual.token_ids)
        some = slice(at, at + 5)
        found.append(Difference(number, "token ids", expected.token_ids[some], actual.token_ids[some], at))
    elif expected.text != actual.text:
        at = first_difference(expected.text, actual.text)
        found.append(Difference(number, "texts", expected.text[at : at + 20], actual.text[at : at + 20]))
    if not _usage_is_right(expected, actual):
        found.append(Difference(number, "usage counts", expected.completion_tokens, actual.completion_tokens))
    if expected.finish_reason != actual.finish_reason:
        found.append(Difference(number, "finish reasons", expected.finish_reason, actual.finish_reason))
    return found


def first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    """The first index at which two sequences differ: their common length where one continues the other."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of `values` do not exceed (nearest rank); 0 of none."""
    if not values:
        return 0.0
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


@dataclass(frozen=True)
class Delay:
    """A timer that was `seconds` late, at the monotonic time `at`."""

    at: float
    seconds: float


@dataclass(frozen=True)
class Spread:
    count: int
    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(len(values), percentile(values, 0.5), percentile(values, 0.99), max(values, default=0.0))


@dataclass(frozen=True)
class Run:
    """One run of all streams. `gaps`: each stream's longest silence; `delays`: how late the client's timers were."""

    seconds: float
    tokens: int
    errors: int
    gaps: Spread
    delays: Spread

    @classmethod
    def of(cls, streams: Sequence[StreamResult], delays: Sequence[Delay]) -> Run:
        began = min((stream.started for stream in streams), default=0.0)
        return cls(
            seconds=max((stream.ended for stream in streams), default=0.0) - began,
            tokens=sum(stream.tokens for stream in streams),
            errors=sum(stream.error is not None for stream in streams),
            gaps=Spread.of([stream.longest_gap() for stream in streams]),
            delays=Spread.of([delay.seconds for delay in delays]),
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0}


@dataclass(frozen=True)
class Strike:
    """The fault. `at_s`, `tokens`: how far the run was; `streams`: how many were running.

    `detection_s`: from the signal to the daemon's exclusion of the last victim, None if it excluded not all of them.
    `gaps`: of the streams that were running, the longest silence that ended after the signal. `delays`: from then on.
    """

    ranks: tuple[int, ...]
    pids: tuple[int, ...]
    at_s: float
    tokens: int
    streams: int
    detection_s: float | None
    gaps: Spread
    delays: Spread


@dataclass(frozen=True)
class DrillResult:
    """`strike` is None if the streams ended before it was due. `recoveries`: as in `/health`, of the disturbed run."""

    daemon: str
    model: str
    started_here: bool
    seed: int
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    comparison: Comparison
    reference: Run
    disturbed: Run
    strike: Strike | None
    recoveries: tuple[Mapping[str, Any], ...]
    stream_errors: Mapping[int, str]

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the drill has failed; empty if nothing was lost or changed."""
        found: list[str] = []
        if self.reference.errors:
            found.append(f"{self.reference.errors} streams failed in the undisturbed run already")
        lost = self.comparison.lost
        if self.after["status"] == GONE:
            found.append("the daemon does not answer any more")
        elif self.strike is None and not lost:
            found.append("the streams ended before a rank was to be killed: ask for more --tokens, or an earlier --at")
        elif self.strike is not None and not self.strike.streams:
            found.append("no stream was running any more when the rank was killed")
        elif self.strike is not None and not self.recoveries:
            found.append("the daemon reported no recovery")
        if lost:
            found.append(f"{len(lost)} streams lost: {self.stream_errors.get(lost[0], 'no error given')}")
        elif lost_by_daemon := sum((report.get("requests") or {}).get("lost", 0) for report in self.recoveries):
            found.append(f"the daemon reports {lost_by_daemon} requests lost")
        if differences := self.comparison.differences:
            more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
            found.append(f"{differences[0]}{more}")
        return tuple(found)

    @property
    def passed(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        comparison = asdict(self.comparison)
        comparison["differences"] = [str(difference) for difference in self.comparison.differences]
        return {
            "passed": self.passed,
            "problems": list(self.problems),
            "daemon": self.daemon,
            "model": self.model,
            "started_here": self.started_here,
            "seed": self.seed,
            "before": dict(self.before),
            "after": dict(self.after),
            "comparison": {**comparison, "same": self.comparison.same},
            "reference": self.reference.to_json(),
            "disturbed": self.disturbed.to_json(),
            "strike": asdict(self.strike) if self.strike else None,
            "recoveries": [dict(report) for report in self.recoveries],
            "stream_errors": {str(number): error for number, error in self.stream_errors.items()},
        }


def render(result: DrillResult) -> Group:
    """The summary that `drill` prints."""
    comparison, streams = result.comparison, result.comparison.streams
    verdict = Text("passed", "bold green") if result.passed else Text("failed", "bold red")
    lines = [Text("drill ").append_text(verdict).append(f": {_what_happened(result.strike)}")]
    lines += [Text(f"  {problem}", "red") for problem in result.problems]
    lines.append(
        Text(
            f"clients: {streams - len(comparison.lost)} of {streams} streams complete, {len(comparison.lost)} lost; "
            f"tokens equal in {comparison.tokens_equal}, usage right in {comparison.usage_right}"
        )
    )
    lines += [Text(f"daemon: {describe_recovery(report)}") for report in result.recoveries]
    if result.strike is not None and result.strike.detection_s is not None:
        lines.append(Text(f"detection: {result.strike.detection_s * 1000:.1f} ms from SIGKILL to exclusion"))
    lines.append(Text(f"daemon now: {_state(result.after)}; seed {result.seed}"))
    return Group(*lines, _run_table(result))


def _state(health: Mapping[str, Any]) -> str:
    if not (size := health.get("data_parallel_size")):
        return str(health["status"])
    ranks = f"ranks {size['active']}/{size['target']} active"
    return f"{health['status']}, {ranks}, survivable losses {health['survivable_losses']}"


def _what_happened(strike: Strike | None) -> str:
    if strike is None:
        return "no rank was killed"
    ranks = ", ".join(f"{rank} (pid {pid})" for rank, pid in zip(strike.ranks, strike.pids, strict=True))
    return (
        f"SIGKILL of rank {ranks} {strike.at_s:.2f} s into the run, "
        f"after {strike.tokens} tokens, with {strike.streams} streams running"
    )


def _run_table(result: DrillResult) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for column in ("reference", "disturbed", "after the kill"):
        table.add_column(column, justify="right")
    reference, disturbed, strike = result.reference, result.disturbed, result.strike
    gaps = [reference.gaps, disturbed.gaps, *([strike.gaps] if strike else [])]
    delays = [reference.delays, disturbed.delays, *([strike.delays] if strike else [])]
    table.add_row("longest gap any client saw, ms", *(_ms(spread.max) for spread in gaps))
    table.add_row("median of the clients' longest gaps, ms", *(_ms(spread.p50) for spread in gaps))
    table.add_row("scheduling delay here, worst, ms", *(_ms(spread.max) for spread in delays))
    table.add_row("scheduling delay here, p99, ms", *(_ms(spread.p99) for spread in delays))
    table.add_row("seconds", f"{reference.seconds:.2f}", f"{disturbed.seconds:.2f}")
    speeds = [f"{run.tokens / run.seconds:.0f}" if run.seconds else "-" for run in (reference, disturbed)]
    table.add_row("tokens per second", *speeds)
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"
