"""What `bench.recovery` makes of its measurements: a verdict and a table. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from bench.machine import Machine
from bench.measure import GAP_BAR_S, RATIO_BAR, Summary, by_phase, restart_ratio
from bench.ours import Ours
from bench.plan import RANKS
from bench.stock import COLD, PREIMPORTED, Failure, Start, Stock
from bench.tables import figures_table
from elastic_daemon.drill.report import Spread, compare


@dataclass(frozen=True)
class Report:
    """One whole run. `kills`: how many were asked for; `load`: average load at start and end."""

    machine: Machine
    load: tuple[float, float]
    kills: int
    streams: int
    tokens: int
    seconds: float
    ours: Ours
    stock: Stock | None

    @property
    def summary(self) -> Summary:
        return Summary.of(self.ours.faults)

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the run has failed; empty if it passed. The comparison with stock vLLM is no part of that."""
        summary, found = self.summary, list(self.ours.problems)
        found += [f"life {one.life}, {one.fault.phase}: {p}" for one in self.ours.faults for p in one.problems]
        if summary.kills < self.kills:
            found.append(f"only {summary.kills} of {self.kills} kills were measured")
        if summary.lost:
            found.append(f"{summary.lost} streams lost")
        if summary.changed:
            found.append(f"{summary.changed} streams changed")
            found += [str(difference) for one in self.ours.faults for difference in one.differences][:3]
        if summary.gaps.p50 > GAP_BAR_S:
            found.append(f"the median of the longest waits is {summary.gaps.p50:.3f} s, above {GAP_BAR_S:g} s")
        return tuple(found)

    def ratio(self, kind: str) -> float | None:
        restart_s = self.stock.restart_s(kind) if self.stock is not None else None
        return restart_ratio(restart_s, self.summary.outages.p50)

    @property
    def stock_tokens_equal(self) -> int | None:
        """Of how many streams stock vLLM gives the tokens that our daemon gives."""
        if self.stock is None or not self.stock.undisturbed or not self.ours.reference:
            return None
        return compare(self.ours.reference, self.stock.undisturbed).tokens_equal

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": not self.problems,
            "problems": list(self.problems),
            "setup": {
                **asdict(self.machine),
                "load_average": list(self.load),
                "model": self.ours.model,
                "ranks": RANKS,
                "streams": self.streams,
                "tokens": self.tokens,
                "seconds": self.seconds,
            },
            "summary": self.summary.to_json(),
            "by_phase": {phase.value: summary.to_json() for phase, summary in by_phase(self.ours.faults).items()},
            "faults": [result.to_json() for result in self.ours.faults],
            "undisturbed": [asdict(reference) for reference in self.ours.undisturbed],
            "stock": self.stock.to_json() if self.stock is not None else None,
            "ratios": {kind: self.ratio(kind) for kind in (COLD, PREIMPORTED)},
            "stock_tokens_equal": self.stock_tokens_equal,
        }


def render(report: Report) -> Group:
    """The table that people read."""
    verdict = Text("failed", "bold red") if report.problems else Text("passed", "bold green")
    head = Text("recovery benchmark ").append_text(verdict)
    parts: list[Text | Table] = [head, *(Text(f"  {problem}", "red") for problem in report.problems), _setup(report)]
    parts += [Text(), _clients(report), Text(), _daemon(report.summary), Text(), _phases(report)]
    if report.stock is not None:
        parts += [Text(), _stock(report, report.stock)]
    return Group(*parts)


def _setup(report: Report) -> Text:
    machine = report.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    start, end = report.load
    return Text(
        f"{machine.cores} cores ({machine.processor}), {machine.memory_gib:g} GiB, Linux {machine.kernel}, "
        f"Python {machine.python}, {versions}\n"
        f"model {report.ours.model or 'unknown'} on {RANKS} CPU ranks, {report.streams} streams of {report.tokens} "
        f"tokens; load average {start:.2f} at start, {end:.2f} at end; {report.seconds:.0f} s in all\n"
        "compared: token ids, text, usage and finish reason of each stream with an undisturbed run of the same daemon "
        "life; two losses per life"
    )


def _clients(report: Report) -> Table:
    summary, calm = report.summary, report.ours.undisturbed
    table = figures_table(
        f"clients: {summary.kills} SIGKILLs in {summary.faults} runs, {summary.lost} streams lost, "
        f"{summary.changed} changed",
        *("p50", "p99", "max"),
    )
    table.add_row("longest wait of any client for a token, per run, ms", *_spread(summary.gaps))
    table.add_row("  the same wait in the undisturbed run of that life, ms", *_spread(summary.calm_gaps))
    table.add_row("longest wait of each client, ms", *_spread(summary.client_gaps))
    table.add_row("undisturbed: longest silence of any client, ms", *_spread(_worst([one.silences for one in calm])))
    table.add_row("undisturbed: longest time to first token, ms", *_spread(_worst([one.first_tokens for one in calm])))
    table.add_row("scheduling delay beside it, worst of each run, ms", *_spread(summary.probe))
    table.add_row(
        "undisturbed: scheduling delay, worst of each run, ms", *_spread(_worst([[one.probe_max_s] for one in calm]))
    )
    table.add_row("outage: SIGKILL -> all interrupted have their next token, ms", *_spread(summary.outages))
    return table


def _worst(runs: Sequence[Sequence[float]]) -> Spread:
    return Spread.of([max(values, default=0.0) for values in runs])


def _daemon(summary: Summary) -> Table:
    table = figures_table("daemon", "p50", "p99", "max")
    table.add_row("detection: SIGKILL -> rank excluded, ms", *_spread(summary.detections))
    for name, spread in summary.phases.items():
        table.add_row(f"recovery, {name}, ms", *_spread(spread))
    table.add_row("SIGKILL -> survivors step again, ms", *_spread(summary.resumed))
    table.add_row("from there until all interrupted have their next token, ms", *_spread(summary.recomputes))
    return table


def _phases(report: Report) -> Table:
    columns = (
        "kills",
        "lost",
        "changed",
        "wait p50",
        "max",
        "undisturbed p50",
        "max",
        "detection p50",
        "outage p50",
        "max",
    )
    during = [result.during for result in report.ours.faults if result.during is not None]
    inside = f"; {sum(during)} of {len(during)} second kills fell into the recovery of the first" if during else ""
    table = figures_table(f"by phase of the kill, ms{inside}", *columns)
    for phase, one in by_phase(report.ours.faults).items():
        outage = [_ms(one.outages.p50), _ms(one.outages.max)] if one.outages.count else ["-", "-"]
        counts = [str(one.kills), str(one.lost), str(one.changed)]
        waits = [_ms(one.gaps.p50), _ms(one.gaps.max), _ms(one.calm_gaps.p50), _ms(one.calm_gaps.max)]
        table.add_row(phase.value, *counts, *waits, _ms(one.detections.p50), *outage)
    return table


def _stock(report: Report, stock: Stock) -> Table:
    equal = report.stock_tokens_equal
    same = "" if equal is None else f"; undisturbed, it gives our tokens in {equal} of {report.streams} streams"
    table = figures_table(f"stock vLLM, data-parallel 2 with expert parallelism, same model and streams{same}", "")
    for failure in stock.failures:
        table.add_row(f"SIGKILL of one {failure.victim} under load", _failure(failure))
    names: Mapping[str, str] = {
        COLD: "restart from nothing, until all streams have a first token",
        PREIMPORTED: "restart in a process that had imported vLLM",
    }
    if stock.first is not None:
        table.add_row("first start", _start(stock.first))
    for start in stock.starts:
        table.add_row(names[start.kind], _start(start))
    for kind, bar in ((COLD, f" (bar: {RATIO_BAR:g})"), (PREIMPORTED, "")):
        if (ratio := report.ratio(kind)) is not None:
            met = "" if not bar else ", met" if ratio >= RATIO_BAR else ", NOT met"
            table.add_row(f"{kind} restart / our median outage", f"{ratio:.0f}{bar}{met}")
    for problem in stock.problems:
        table.add_row("problem", Text(problem, "red"))
    return table


def _failure(failure: Failure) -> str:
    known = "some hang" if failure.failed_s is None else f"all failed after {failure.failed_s:.2f} s"
    if not failure.lost:
        known = "none failed"
    ended = "server still there" if failure.ended_s is None else f"server ended after {failure.ended_s:.2f} s"
    return f"{failure.lost} of {failure.running} running requests lost, {known}, {ended}"


def _start(start: Start) -> str:
    return f"{start.serving_s:.1f} s"


def _spread(spread: Spread) -> tuple[str, str, str]:
    if not spread.count:
        return "-", "-", "-"
    return _ms(spread.p50), _ms(spread.p99), _ms(spread.max)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"
