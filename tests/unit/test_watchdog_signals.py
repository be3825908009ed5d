"""The table of signals: what is bundled, what a site may change, what is refused."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watchdog.errors import SignalsError
from watchdog.signals import SignalClass, load_table

TABLE = load_table()


def test_every_entry_is_dated_and_sourced() -> None:
    for rule in TABLE.rules.values():
        assert rule.source in ("catalog", "nvml", "memory", "project")
        assert rule.date >= date(2026, 1, 1)


def test_numbers_that_are_not_listed_have_a_rule() -> None:
    assert TABLE.rule("xid:7777").cls is SignalClass.SUSPECT
    assert TABLE.rule("xid:7777").signal == "xid:7777"
    assert TABLE.rule("recovery_action:99").cls is SignalClass.DRAIN
    with pytest.raises(KeyError):
        TABLE.rule("nonsense")


def test_site_changes_single_fields(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text(
        'version = 1\n[sources]\nfleet = { date = 2027-01-02, title = "our fleet" }\n'
        '[xid]\n109 = { class = "drain", source = "fleet" }\n500 = { class = "ignore", name = "known noise" }\n'
        "[signal]\npcie_replay_rate = { threshold = 7.5 }\n"
    )
    table = load_table(site)
    assert table.rule("xid:109").cls is SignalClass.DRAIN
    assert table.rule("xid:109").name == TABLE.rule("xid:109").name
    assert table.rule("xid:109").date == date(2027, 1, 2)
    assert table.rule("xid:500").cls is SignalClass.IGNORE
    assert table.rule("xid:500").source == "site.toml"
    assert table.threshold("pcie_replay_rate") == 7.5
    assert table.rule("pcie_replay_rate").hold_s == TABLE.rule("pcie_replay_rate").hold_s
    assert table.rule("xid:79") == TABLE.rule("xid:79")


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("version = 1\n[xid]\n79 = { class = }", 3, "Invalid value"),
        ("version = 2", 1, "version = 1 expected"),
        ("", 1, "version = 1 expected"),
        ("version = 1\n\n[xid]\n13 = { class = 'ignore' }\n79 = { class = 'foo' }", 5, "unknown class 'foo'"),
        ("version = 1\n[xid.79]\n# comment\nhold_s = -1", 4, "at least 0"),
        ("version = 1\n[xid]\n79 = { hold_s = true }", 3, "hold_s must be a number"),
        ("version = 1\n[xid]\n79 = { hold_s = nan }", 3, "hold_s must be a number"),
        ("version = 1\n[xid]\n79 = { count = 1.5 }", 3, "count must be a whole number"),
        ("version = 1\n[xid]\n79 = { colour = 1 }", 3, "unknown field 'colour'"),
        ("version = 1\n[xid]\n79 = 'drain'", 3, "must be a table"),
        ("version = 1\n[xid]\nfoo = { class = 'drain' }", 3, "a number or `other`"),
        ("version = 1\n[xid]\n500 = { name = 'x' }", 3, "needs a `class`"),
        ("version = 1\n[xid]\n79 = { source = 'nobody' }", 3, "unknown source 'nobody'"),
        ("version = 1\n[xid]\n79 = { class = 'companions' }", 3, "needs `companions"),
        ("version = 1\n[xid]\n48 = { companions = ['a'] }", 3, "list of Xids"),
        ("version = 1\n[xid]\n48 = { alone = 're-read' }", 3, "`alone` cannot be"),
        ("version = 1\n[recovery_action]\n1 = { class = 're-read' }", 3, "cannot ask"),
        ("version = 1\n[signal]\nfoo = { class = 'drain' }", 3, "no such signal"),
        ("version = 1\n[sources]\nmine = { title = 'x' }", 3, "needs a `date"),
        ("version = 1\nxid = 3", 2, "must be a table"),
        ("version = 1\n\n[foo]", 3, "unknown section"),
    ],
)
def test_refuses_with_line_and_reason(tmp_path: Path, text: str, line: int, reason: str) -> None:
    site = tmp_path / "site.toml"
    site.write_text(text)
    with pytest.raises(SignalsError) as caught:
        load_table(site)
    assert str(caught.value).startswith(f"{site}:{line}: ")
    assert reason in str(caught.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(SignalsError, match="No such file"):
        load_table(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SignalsError, match="not UTF-8"):
        load_table(tmp_path / "binary.toml")


@given(st.text(max_size=200))
def test_any_text_is_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    site = tmp_path_factory.getbasetemp() / "any.toml"
    site.write_text("version = 1\n" + text, encoding="utf-8", errors="replace")
    try:
        load_table(site)
    except SignalsError as error:
        assert str(error).startswith(f"{site}:")
