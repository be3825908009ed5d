"""A program that is missing skips tests, or fails them where it has to be there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tools import PACKAGES, have, require

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with curl, and without jq."""
    (curl := tmp_path / "curl").write_text("")
    curl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("REQUIRE_TOOLS", raising=False)
    return monkeypatch


def test_what_is_there_is_used(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("REQUIRE_TOOLS", "1")
    require("curl")
    assert have("curl")


@pytest.mark.parametrize("value", [None, "", "0"])
def test_what_is_missing_skips_the_test(value: str | None, bare: pytest.MonkeyPatch) -> None:
    if value is not None:
        bare.setenv("REQUIRE_TOOLS", value)
    assert not have("jq")
    with pytest.raises(pytest.skip.Exception, match=r"no jq and no chromedriver here: .* jq chromium-driver"):
        require("curl", "jq", "chromedriver")


def test_what_is_missing_fails_the_test_where_it_has_to_be_there(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("REQUIRE_TOOLS", "1")
    for ask in (have, require):
        with pytest.raises(pytest.fail.Exception, match=r"no jq here: .*REQUIRE_TOOLS"):
            ask("jq")


def test_make_test_and_the_document_name_all_of_them() -> None:
    script = (ROOT / "scripts" / "test.sh").read_text(encoding="utf-8")
    [named] = re.findall(r"^for tool in (.*); do$", script, re.MULTILINE)
    assert set(named.split()) == set(PACKAGES)
    document = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    assert not [name for name in PACKAGES if f"`{name}`" not in document]
