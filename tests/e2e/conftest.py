from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser, browser, require_browser
from tests.e2e.cluster import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The bundled model on four ranks, shared by all tests that leave it as they found it."""
    with Cluster(_short(tmp_path_factory)) as running:
        yield running


def _short(factory: pytest.TempPathFactory) -> Path:
    # Paths of Unix sockets are limited to 107 bytes.
    return factory.mktemp("ed", numbered=True) / "run"


@pytest.fixture
def chromium() -> Iterator[Browser]:
    require_browser()
    with browser() as window:
        window.size(1280, 900)
        yield window
