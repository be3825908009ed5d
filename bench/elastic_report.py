"""What `bench.elasticity` makes of its measurements: bars and tables. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from bench.changes import Kind
from bench.elastic_bars import Bar, Throughput, bars, shares
from bench.elastic_run import CALM_WINDOW_S, MOST, RANKS, SPARES, Results
from bench.footprint import COUNTS, LASTING
from bench.footprint import RANKS as RANK_ROLE
from bench.machine import Machine
from bench.tables import figures_table
from elastic_daemon.drill.report import Spread


@dataclass(frozen=True)
class Report:
    """One whole run. `load`: average load at start and end."""

    machine: Machine
    load: tuple[float, float]
    cycles: int
    streams: int
    tokens: int
    seconds: float
    results: Results

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the run has failed; empty if it passed. Bars that are not met are not among them: machines differ."""
        outcome, found = self.results.outcome, list(self.results.problems)
        for name in ("lost", "refused", "changed"):
            if count := getattr(outcome, name):
                found.append(f"{count} of {outcome.streams} streams {name}")
        return (*found, *outcome.examples[:3])

    @property
    def bars(self) -> list[Bar]:
        return bars(self.results)

    @property
    def throughput(self) -> Throughput | None:
        return Throughput.of(self.results.before, self.results.after)

    def to_json(self) -> dict[str, Any]:
        results = self.results
        return {
            "passed": not self.problems,
            "problems": list(self.problems),
            "setup": {
                **asdict(self.machine),
                "load_average": list(self.load),
                "model": results.model,
                "ranks": RANKS,
                "cycles": self.cycles,
                "streams": self.streams,
                "tokens": self.tokens,
                "seconds": self.seconds,
            },
            "bars": [{**asdict(bar), "met": bar.met} for bar in self.bars],
            "throughput": asdict(self.throughput) if self.throughput is not None else None,
            "outcome": asdict(results.outcome),
            "calm": {"waits": results.calm, "delays": results.calm_delays, "window_s": CALM_WINDOW_S},
            "changes": [change.to_json() for change in results.changes],
            "footprints": {name: one.to_json() for name, one in results.footprints.items()},
            "before": asdict(results.before),
            "after": asdict(results.after),
        }


def render(report: Report) -> Group:
    """The tables that people read."""
    verdict = Text("failed", "bold red") if report.problems else Text("passed", "bold green")
    head = Text("elasticity benchmark ").append_text(verdict)
    parts: list[Text | Table] = [head, *(Text(f"  {problem}", "red") for problem in report.problems), _setup(report)]
    parts += [Text(), _bars(report), Text(), _waits(report), Text(), _daemon(report), Text(), _times(report)]
    parts += [Text(), _footprints(report)]
    return Group(*parts)


def _setup(report: Report) -> Text:
    machine, outcome = report.machine, report.results.outcome
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    start, end = report.load
    return Text(
        f"{machine.cores} cores ({machine.processor}), {machine.memory_gib:g} GiB, Linux {machine.kernel}, "
        f"Python {machine.python}, {versions}\n"
        f"model {report.results.model or 'unknown'} on {RANKS} CPU ranks, at most {MOST}, {SPARES} spare GPUs; "
        f"{report.streams} clients, streams of {report.tokens} tokens; load average {start:.2f} at start, {end:.2f} "
        f"at end; {report.seconds:.0f} s in all\n"
        f"{outcome.streams} streams compared with an undisturbed run: {outcome.lost} lost, {outcome.refused} refused, "
        f"{outcome.changed} changed"
    )


def _bars(report: Report) -> Table:
    table = figures_table("bars", "measured", "bar", "")
    for bar in report.bars:
        sign = ">=" if bar.at_least else "<="
        verdict = Text("met", "green") if bar.met else Text("NOT met", "bold red")
        table.add_row(bar.what, _number(bar.value, bar.unit), f"{sign} {_number(bar.limit, bar.unit)}", verdict)
    if (one := report.throughput) is not None:
        noise = "-" if one.noise is None else f"{one.noise * 100:.1f} %"
        table.add_row(
            f"  {one.worn:.0f} tokens/s after all changes, {one.alone:.0f} of the other, medians of {one.pairs} "
            f"windows: {one.after:.3f}, and {one.before:.3f} before; standard error {one.error:.3f}; two of one "
            f"daemon differ by {noise}"
        )
    return table


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if unit == "s" and value < 1 else f"{value:.3g} {unit}".rstrip()


def _waits(report: Report) -> Table:
    results = report.results
    table = figures_table(
        "longest wait of any client for a token, ms", "n", "p50", "p99", "max", "delay p50", "delay max"
    )
    rejoins, ups, downs = (results.of(kind) for kind in (Kind.REJOIN, Kind.UP, Kind.DOWN))

    def row(name: str, waits: Sequence[float], delays: Sequence[float]) -> None:
        spread, delay = Spread.of(waits), Spread.of(delays)
        table.add_row(name, str(spread.count), *map(_ms, (spread.p50, spread.p99, spread.max, delay.p50, delay.max)))

    row(f"undisturbed, in {CALM_WINDOW_S * 1000:.0f} ms", results.calm, results.calm_delays)
    for kind in Kind:
        some = results.of(kind)
        for name, waits, delays in (
            ("a rank joins", [w for one in some for w in one.joins], [d for one in some for d in one.join_delays]),
            ("a rank leaves", [w for one in some for w in one.losses], [d for one in some for d in one.loss_delays]),
        ):
            if waits:
                row(f"{kind}: {name}", waits, delays)
    row("rejoin: experts are spread anew after it", [one.settling for one in rejoins], [])
    row("down by one: order to end", [one.whole for one in downs], [one.delay for one in downs])
    row("up by one: order to end, a rank loads", [one.whole for one in ups], [one.delay for one in ups])
    row("rejoin: kill to end, a rank loads", [one.whole for one in rejoins], [one.delay for one in rejoins])
    return table


def _daemon(report: Report) -> Table:
    """The daemon's own account, to tell what the clients' waits are made of."""
    changes = report.results.changes
    table = figures_table("daemon: what its regroups took, ms", "n", "p50", "p99", "max")
    grows, shrinks = [part for one in changes for part in one.grows], [part for one in changes for part in one.shrinks]
    for name, parts in (("a rank joins", grows), ("a rank leaves", shrinks)):
        for phase in parts[0] if parts else ():
            spread = Spread.of([part[phase] for part in parts])
            table.add_row(f"{name}: {phase}", str(spread.count), *map(_ms, (spread.p50, spread.p99, spread.max)))
    return table


def _times(report: Report) -> Table:
    names = {
        Kind.REJOIN: "SIGKILL -> all serve",
        Kind.SPARE: "GPU lost -> all serve, on a spare one",
        Kind.REPLACEMENT: "new GPU -> all serve",
        Kind.DOWN: "order -> done",
        Kind.UP: "order -> done",
        Kind.MANY: "three orders -> done",
    }
    table = figures_table("time to full capacity, s", "n", "p50", "max", "share")
    for kind, name in names.items():
        some = report.results.of(kind)
        spread = Spread.of([one.seconds for one in some])
        table.add_row(f"{kind}: {name}", str(spread.count), f"{spread.p50:.2f}", f"{spread.max:.2f}", "")
        for phase in some[0].phases if some and kind is not Kind.MANY else ():
            part = Spread.of([one.phases[phase] for one in some if phase in one.phases])
            share = part.p50 / spread.p50
            table.add_row(f"  {phase}", str(part.count), f"{part.p50:.2f}", f"{part.max:.2f}", f"{share * 100:.0f} %")
    found = Spread.of(shares(report.results))
    least = min(shares(report.results), default=0.0)
    table.add_row(
        "tokens/s while a rank loads / before: p50, least", str(found.count), f"{found.p50:.2f}", f"{least:.2f}"
    )
    return table


def _footprints(report: Report) -> Table:
    taken = report.results.footprints
    table = figures_table("what the daemon's processes hold, at rest", *taken)
    for name in COUNTS:
        cells = (
            f"{one.total(name) - one.counts[RANK_ROLE][name]} + {one.counts[RANK_ROLE][name]}" for one in taken.values()
        )
        table.add_row(f"{name}: all others + ranks", *cells)
    table.add_row("groups that ranks could not let go of (gloo)", *(str(one.abandoned) for one in taken.values()))
    for role in LASTING:
        table.add_row(
            f"{role}: RSS / PSS, MiB", *(f"{_mib(o.rss[role])} / {_mib(o.pss[role])}" for o in taken.values())
        )
    return table


def _mib(kib: int) -> str:
    return f"{kib / 1024:.1f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"
