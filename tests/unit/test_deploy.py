"""Alert rules, scrape configuration and dashboard: what they ask for is what a daemon exports."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from elastic_daemon.control.recovery import Timer
from elastic_daemon.membership import RankState, Status
from elastic_daemon.placement import Source
from elastic_daemon.protocol import RecoveryKind
from elastic_daemon.telemetry.metrics import PRESERVED, Metrics
from tests.unit.test_metrics import EXPORTED, VIEW

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
VLLM: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "vllm_metrics.json").read_text())[
    "metrics"
]
RULES = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
ALERTS: list[dict[str, Any]] = [rule for group in RULES["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((DEPLOY / "grafana" / "elastic-daemon.json").read_text())

OF_PROMETHEUS = {"up"}
"""Metrics that Prometheus makes itself."""

BUILT_IN = {"instance", "job", "le"}
VALUES = {
    ("elastic_status", "status"): {status.value for status in Status},
    ("elastic_ranks", "state"): {state.value for state in RankState},
    ("elastic_recovery_seconds", "kind"): {kind.value for kind in RecoveryKind},
    ("elastic_recovery_seconds", "phase"): {timer.value for timer in Timer} | {"total"},
    ("elastic_requests_preserved_total", "how"): set(PRESERVED),
    ("elastic_expert_load_bytes_total", "source"): {source.value for source in Source},
    ("elastic_expert_load_seconds_total", "source"): {source.value for source in Source},
    ("elastic_watchdog_verdicts_total", "verdict"): {"ok", "suspect", "drain", "exclude", "restart-rank"},
}

MATCHER = re.compile(r'(\w+)=~?"([^"]*)"')
SELECTOR = re.compile(r"\b((?:elastic_|vllm:)\w+|up\b)(?:\{([^}]*)\})?")


def samples() -> dict[str, tuple[str, set[str]]]:
    """All samples that a daemon exports: name -> the metric, and its labels."""
    metrics = {name: (type_, set(labels)) for name, (type_, labels) in EXPORTED.items()}
    metrics |= {name: (metric["type"], set(metric["labels"])) for name, metric in VLLM.items()}
    found = {}
    for name, (type_, labels) in metrics.items():
        for suffix in ("_bucket", "_sum", "_count") if type_ == "histogram" else ("",):
            found[name + suffix] = name, labels
    return found


SAMPLES = samples()


def _walk(value: object) -> Iterator[str]:
    """All expressions in a dashboard."""
    if isinstance(value, dict):
        if isinstance(value.get("expr"), str):
            yield value["expr"]
        for inner in value.values():
            yield from _walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner)


EXPRESSIONS = [*(alert["expr"] for alert in ALERTS), *_walk(DASHBOARD)]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_what_is_asked_for_is_exported(expression: str) -> None:
    found = SELECTOR.findall(expression)
    assert found, "it asks for nothing"
    for name, matchers in found:
        if name in OF_PROMETHEUS:
            continue
        metric, labels = SAMPLES[name]
        for label, value in re.findall(r'(\w+)\s*(?:=~|!=|!~|=)\s*"([^"]*)"', matchers):
            assert label in labels | BUILT_IN, (name, label)
            if (known := VALUES.get((metric, label))) is not None:
                assert set(value.split("|")) <= known, (name, label, value)
    grouped = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression)
    of_metrics = {label for name, _ in found if name in SAMPLES for label in SAMPLES[name][1]}
    assert {label.strip() for labels in grouped for label in labels.split(",")} <= of_metrics | BUILT_IN


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_are_valid(expression: str) -> None:
    parser = pytest.importorskip("promql_parser", reason="make setup installs it")
    parser.parse(expression.replace("$__rate_interval", "1m").replace("$__range", "1h"))


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_what_it_means_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert re.fullmatch(r"(?:[A-Z][a-z]+)+", alert["alert"])
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert re.fullmatch(r"\d+[smh]", alert["for"])
    notes = alert["annotations"]
    assert notes["summary"] and notes["description"].endswith(".")
    page, _, anchor = notes["runbook_url"].partition("#")
    assert page.endswith("/docs/operations.md")
    assert anchor == re.sub(r"(?<!^)(?=[A-Z])", "-", alert["alert"]).lower()
    grouping = re.search(r"\bby \(([^)]*)\)", alert["expr"])
    for label in re.findall(r"\$labels\.(\w+)", notes["summary"] + notes["description"]):
        assert grouping is None or label in grouping[1], "the alert would not have this label"


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_the_first_of_a_kind_raises_an_alert_too(alert: dict[str, Any]) -> None:
    """A series that begins at 1 has not increased: it has to be there at 0, or the alert has to ask what is new."""
    fresh = Metrics().render(VIEW)
    there = [sample for family in text_string_to_metric_families(fresh) for sample in family.samples]
    for name, matchers in re.findall(r"\b(?:increase|rate)\((elastic_\w+)(?:\{([^}]*)\})?\[", alert["expr"]):
        if f"unless {name}{{{matchers}}} offset" in " ".join(alert["expr"].split()):
            continue
        wanted = [[(label, value) for value in values.split("|")] for label, values in MATCHER.findall(matchers)]
        for chosen in itertools.product(*wanted):
            found = [one.value for one in there if one.name == name and set(chosen) <= set(one.labels.items())]
            assert found and not any(found), (name, chosen)


def test_alerts_have_names_of_their_own() -> None:
    assert len({alert["alert"] for alert in ALERTS}) == len(ALERTS) >= 10


def test_the_runbook_has_them_all() -> None:
    operations = ROOT / "docs" / "operations.md"
    if not operations.exists():
        pytest.skip("docs/operations.md is not there yet")
    headings = re.findall(r"^#+ (.+)$", operations.read_text(encoding="utf-8"), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert not {alert["annotations"]["runbook_url"].partition("#")[2] for alert in ALERTS} - anchors


def test_what_is_to_be_scraped() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert [(DEPLOY / "prometheus" / file).exists() for file in config["rule_files"]] == [True]
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["localhost:8000"]}]
    assert f'up{{job="{job["job_name"]}"}}' in " ".join(alert["expr"] for alert in ALERTS)


def test_the_dashboard_holds_together() -> None:
    panels = DASHBOARD["panels"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__rate_interval", "__range"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) <= variables


def test_the_dashboard_leaves_no_metric_out() -> None:
    shown = {SAMPLES[name][0] for expression in _walk(DASHBOARD) for name, _ in SELECTOR.findall(expression)}
    assert shown >= EXPORTED.keys()
