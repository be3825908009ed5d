"""What CI installs is what tests use."""

from __future__ import annotations

import re
from pathlib import Path

from tests.tools import PACKAGES

SCRIPT = (Path(__file__).resolve().parents[2] / "scripts" / "tools.sh").read_text()


def named(name: str) -> list[str]:
    found = re.search(rf"^{name}=\((.*)\)$", SCRIPT, re.MULTILINE)
    assert found is not None
    return found[1].split()


def test_programs_and_their_packages() -> None:
    assert dict(zip(named("PROGRAMS"), named("PACKAGES"), strict=True)) == PACKAGES
