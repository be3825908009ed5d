"""Files that are renewed on disk are noticed: once, and not halfway."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from elastic_daemon.gates.ssl_refresh import Settled, stamps, watch_files

LOOK_S = 0.02


@contextlib.asynccontextmanager
async def watched(*paths: Path) -> AsyncIterator[list[tuple[str, ...]]]:
    """What the files had each time that a change was told."""
    told: list[tuple[str, ...]] = []

    def changed() -> None:
        told.append(tuple(path.read_text() if path.exists() else "-" for path in paths))

    task = asyncio.create_task(watch_files(map(str, paths), changed, LOOK_S))
    await asyncio.sleep(0)
    try:
        yield told
    finally:
        task.cancel()


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not reached():
            await asyncio.sleep(LOOK_S / 4)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_text("old")
    key.write_text("old")
    return certificate, key


async def test_a_change_is_told_once(pair: tuple[Path, Path]) -> None:
    async with watched(*pair) as told:
        await asyncio.sleep(3 * LOOK_S)
        assert told == []
        for path in pair:
            path.write_text("new!")
        await until(lambda: bool(told))
        await asyncio.sleep(4 * LOOK_S)
        assert told == [("new!", "new!")]


async def test_a_file_that_takes_the_place_of_another(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Of the same size, and with the times of the old one."""
    old = pair[0].stat()
    (fresh := tmp_path / "fresh").write_text("new")
    os.utime(fresh, ns=(old.st_atime_ns, old.st_mtime_ns))
    async with watched(*pair) as told:
        fresh.replace(pair[0])
        await until(lambda: bool(told))
    assert told == [("new", "old")]


@pytest.mark.parametrize(
    ("looks", "told"),
    [
        ("aaaa", "    "),
        ("aabbb", "   b "),
        ("abcdd", "    d"),  # still being written
        ("abaab", "     "),  # back to what is used
        ("abbcc", "  b c"),
        ("abbaa", "  b a"),
    ],
)
def test_what_has_changed_and_stands_still(looks: str, told: str) -> None:
    settled = Settled("a")
    assert "".join(look if settled.look(look) else " " for look in looks) == told


async def test_a_file_that_goes_and_comes_back(pair: tuple[Path, Path]) -> None:
    async with watched(*pair) as told:
        pair[0].unlink()
        await until(lambda: len(told) == 1)
        pair[0].write_text("back")
        await until(lambda: len(told) == 2)
    assert told == [("-", "old"), ("back", "old")]


def test_stamps_of_nothing(tmp_path: Path) -> None:
    assert stamps([str(tmp_path / "none")]) == (None,)
