"""Programs that tests use and that the project does not install: where one is missing, its tests are skipped.

With `REQUIRE_TOOLS=1` in the environment they fail instead: for a machine that is to have them all.
"""

from __future__ import annotations

import os
import shutil

import pytest

PACKAGES = {
    "systemd-analyze": "systemd",
    "chromium": "chromium",
    "chromedriver": "chromium-driver",
    "zsh": "zsh",
    "fish": "fish",
    "curl": "curl",
    "jq": "jq",
    "openssl": "openssl",
    "watch": "procps",
}
"""Programs, and the packages of Debian that have them."""


def require(*programs: str) -> None:
    """Skip the test, or fail it, where one of `programs` is missing."""
    if missing := [name for name in programs if not have(name)]:
        pytest.skip(_told(missing))


def have(program: str) -> bool:
    """Whether it is there, for a test that can do without. Fails where it has to be."""
    found = shutil.which(program) is not None
    if not found and os.environ.get("REQUIRE_TOOLS", "") not in ("", "0"):
        pytest.fail(f"{_told([program])}, and REQUIRE_TOOLS is set")
    return found


def _told(missing: list[str]) -> str:
    packages = " ".join(PACKAGES[name] for name in missing)
    return f"no {' and no '.join(missing)} here: apt-get install {packages}"
