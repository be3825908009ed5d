"""The documents name what is there: files, make targets, flags, variables, fields, metrics, events, messages."""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest

from bench.control_plane import parser as control_plane_parser
from bench.detection import parser as detection_parser
from bench.elasticity import parser as elasticity_parser
from bench.frontend_restart import parser as frontend_restart_parser
from bench.gpu_drill import make_parser as gpu_drill_parser
from bench.recovery import parser as bench_parser
from bench.soak import parser as soak_parser
from elastic_daemon.cli import make_parser
from elastic_daemon.commands.order_commands import ORDER_COMMANDS
from elastic_daemon.config import Settings
from elastic_daemon.control.recovery import Timer
from elastic_daemon.membership import RankState, Status
from elastic_daemon.placement import expert_safety, initial, slots_per_rank, survivable_losses
from elastic_daemon.processes import messages
from elastic_daemon.processes.runtime_dir import SOCKET_NAMES
from elastic_daemon.protocol import HealthSnapshot, RankHealth, RecoveryKind, RecoveryReport, RequestCounts
from elastic_daemon.routes.control_routes import CONTROL_PATHS
from elastic_daemon.routes.health import HealthView
from elastic_daemon.settings.flags import REFUSED, REFUSED_ON
from tests.documents import DOCUMENTS, FENCE, ROOT, prose, spans
from tests.unit.test_metrics import EXPORTED
from watchdog.cli import make_parser as watchdog_parser
from watchdog.verdict import Verdict

README, API, ARCHITECTURE, METRICS, EVENTS, PLANNING, CONFIGURATION, OPERATIONS = (
    ROOT / name
    for name in (
        *("README.md", "docs/api.md", "docs/architecture.md", "docs/metrics.md"),
        *("docs/events.md", "docs/planning.md", "docs/configuration.md", "docs/operations.md"),
    )
)

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*/?")
SUFFIXES = (".py", ".md", ".sh", ".toml", ".txt")
FOLDERS = ("deploy", "elastic_daemon", "watchdog", "tests", "bench", "training", "scripts", "docs", "requirements")

document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WRITERS = {name: _script(name) for name in ("flags_doc", "cli_doc", "config_doc")}
flags_doc = WRITERS["flags_doc"]


def code(path: Path) -> list[str]:
    """All lines of code, in blocks and in backticks."""
    blocks = FENCE.findall(path.read_text(encoding="utf-8"))
    return [*chain.from_iterable(block.splitlines()[1:-1] for block in blocks), *spans(path)]


@pytest.mark.parametrize("name", WRITERS)
def test_written_pages_are_up_to_date(name: str) -> None:
    written = WRITERS[name].TARGET.read_text(encoding="utf-8")
    assert written == WRITERS[name].render(), f"run: .venv/bin/python scripts/{name}.py"


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250


def test_the_runbook_has_each_state_and_verdict() -> None:
    rows = set(re.findall(r"^\| `([a-z-]+)` \|", OPERATIONS.read_text(encoding="utf-8"), re.MULTILINE))
    assert {*Status, *RankState, *Verdict} <= rows


def test_the_runbook_has_each_alert() -> None:
    rules = ROOT / "deploy" / "prometheus" / "alerts.yml"
    if not rules.exists():
        pytest.skip("no rules here")
    named = re.findall(r"- alert: (\w+)", rules.read_text(encoding="utf-8"))
    assert named
    assert {re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower() for name in named} <= _anchors(OPERATIONS)


def test_the_runbook_has_each_exit_status() -> None:
    table = OPERATIONS.read_text(encoding="utf-8").partition("## Exit statuses")[2]
    told = set(re.findall(r"^\| `([\w -]+)` \| (\d) \|", table, re.MULTILINE))
    told_of_all = set(re.findall(r"^\| all.*? \| (\d)", table, re.MULTILINE))
    for program in (make_parser(), watchdog_parser()):
        for name, parser in _commands(program).items():
            label = name if program.prog == "elastic-daemon" else f"{program.prog} {name}"
            label = "orders" if name in ORDER_COMMANDS else label
            for code in re.findall(r"\b([1-9])(?= |,)", (parser.epilog or "").partition("exit status: ")[2]):
                orders = label == "orders" and f"| orders | {code} |" in table
                assert (label, code) in told or code in told_of_all or orders, (label, code)


@document
def test_files_that_are_named_exist(path: Path) -> None:
    named = {span for span in spans(path) if PATH.fullmatch(span)}
    ours = {
        span
        for span in named
        if (span.endswith(SUFFIXES) and "/" in span) or ("/" in span and span.split("/")[0] in FOLDERS)
    }
    assert not [span for span in sorted(ours) if not (ROOT / span).exists()]


@document
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@document
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {target for line in code(path) for target in re.findall(r"(?:^|\s)make ([a-z]+)", line)}
    assert named <= targets


@document
def test_lines_are_not_too_long(path: Path) -> None:
    assert not [line for line in prose(path).splitlines() if len(line) > 120 and not line.startswith("|")]


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


def _subcommands() -> dict[str, argparse.ArgumentParser]:
    return _commands(make_parser())


def _flags(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


VLLM_FLAGS = {refusal.option for refusal in (*REFUSED, *REFUSED_ON["cpu"])} | set(flags_doc.exercised())
NAMED_FLAGS_OF_VLLM = {
    "--dp-sync-interval",
    "--moe-backend",
    "--hf-token",
    "--trust-remote-code",
    "--enable-eplb",
    "--enable-expert-parallel",
    "--gpu-memory-utilization",
    "--load-format",
    "--max-model-len",
    "--otlp-traces-endpoint",
}
"""Further flags of vLLM that documents speak of; that it has them is checked in tests/contract or by its own parser."""
FLAGS_OF_SYSTEMD = {"--create"}


@document
def test_flags_exist(path: Path) -> None:
    benches = (
        bench_parser(),
        control_plane_parser(),
        detection_parser(),
        elasticity_parser(),
        frontend_restart_parser(),
        gpu_drill_parser(),
        soak_parser(),
    )
    mains = make_parser(), watchdog_parser(), *benches
    known = flags_doc.flags_of(*mains) | VLLM_FLAGS | NAMED_FLAGS_OF_VLLM | FLAGS_OF_SYSTEMD
    assert set(FLAG.findall(path.read_text(encoding="utf-8"))) - known == set()


@document
def test_command_lines_use_flags_of_their_command(path: Path) -> None:
    commands = _subcommands()
    for line in code(path):
        if match := re.match(r"(?:\S*/|\$ )?elastic-daemon ([a-z]+)", line):
            allowed = _flags(commands[match[1]]) | (NAMED_FLAGS_OF_VLLM if match[1] == "serve" else set())
            assert set(FLAG.findall(line.partition("#")[0])) <= allowed, line


def test_every_flag_of_serve_is_in_the_configuration() -> None:
    text = CONFIGURATION.read_text(encoding="utf-8")
    assert not [
        flag for flag in _flags(_subcommands()["serve"]) - {"-h", "--help", "--print-config"} if f"`{flag}`" not in text
    ]


@document
def test_variables_exist(path: Path) -> None:
    files = [file for package in ("elastic_daemon", "watchdog") for file in (ROOT / package).rglob("*.py")]
    source = "".join(file.read_text(encoding="utf-8") for file in files)  # names fields of the journal's, too
    settings = {f"ELASTIC_{name.upper()}" for name in Settings.model_fields}
    named = set(re.findall(r"\bELASTIC_[A-Z_]+[A-Z]\b", path.read_text(encoding="utf-8")))
    assert not [name for name in named - settings if name not in source]


REPORT = RecoveryReport(1, RecoveryKind.SHRINK, (2,), "", dict.fromkeys(Timer, 0.0), RequestCounts(0, 0, 0, 0))
SNAPSHOT = HealthSnapshot(
    Status.OK, "", "", 1, 4, 4, 1, 2, (RankHealth(0, RankState.ACTIVE, 0.0, None, 1),), REPORT, REPORT, None, True
)


def _keys(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)


def _in_api(words: set[str]) -> bool:
    """Whether each is told of in a span of docs/api.md, be it as a part: `seconds.fence` or `ranks[].gpu`."""
    told = {word for span in spans(API) for word in re.findall(r"\w+", span)}
    assert words <= told, words - told
    return True


def test_health_is_described_in_full() -> None:
    body = HealthView(SNAPSHOT, "m", 4, 0, {}, {}, 0.0).to_json()
    assert _in_api(set(_keys(body)) | {*Status, *RankState, *RecoveryKind})


def test_control_routes_are_described() -> None:
    assert set(spans(API)) >= CONTROL_PATHS


def test_metrics_are_described() -> None:
    rows = {name: row for row in prose(METRICS).splitlines() for name in re.findall(r"^\| `(elastic_\w+)` \|", row)}
    assert rows.keys() == EXPORTED.keys()
    for name, (type_, labels) in EXPORTED.items():
        _, _, told_type, told_labels, _, _ = rows[name].split("|")
        assert told_type.strip() == type_, name
        assert set(labels) <= set(re.findall(r"`(\w+)`", told_labels)), name
    named = {name for path in DOCUMENTS for name in re.findall(r"\belastic_[a-z_]+\b(?![./])", prose(path))}
    modules = {"elastic_daemon"}
    assert {name.removesuffix("_bucket").removesuffix("_count") for name in named} - modules <= EXPORTED.keys()


def test_events_are_described() -> None:
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "elastic_daemon").rglob("*.py")]
    recorded = r"(?:_record|events\.record)\(\s*\"(\w+)\"|StartTarget\(\w+, \"(\w+)\""
    events = {name for source in sources for match in re.findall(recorded, source) for name in match if name}
    rows = re.findall(r"^\| (`.+?`) \|", prose(EVENTS), re.MULTILINE)
    assert len(rows) > 15
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == events


def test_runtime_files_are_described() -> None:
    assert {*SOCKET_NAMES, "daemon.lock", "scratch/", "experts/"} <= set(spans(API))


def test_messages_are_described() -> None:
    assert messages.__doc__ is not None
    listed = re.findall(r"^    .*? -> .*? {3,}(.+)$", messages.__doc__, re.MULTILINE)
    types = {word for line in listed for word in line.split(", ")}
    assert len(types) > 10
    assert types <= set(spans(ARCHITECTURE))


def test_reserves_in_the_plan_are_right() -> None:
    rows = re.findall(
        r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) % \| (\d+) \| (\d+) \|$", prose(PLANNING), re.M
    )
    assert len(rows) > 5
    for row in rows:
        experts, ranks, losses, slots, total, percent, may_go, in_memory = map(int, row)
        assert slots == slots_per_rank(experts, ranks, losses), row
        assert (total, percent) == (ranks * slots, round(100 * (ranks * slots / experts - 1))), row
        assert may_go == survivable_losses(experts, ranks, slots), row
        assert in_memory == expert_safety(initial(experts, 1, range(ranks), slots)), row
