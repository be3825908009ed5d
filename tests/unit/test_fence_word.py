"""The word that fences a group: seen by other processes at once, and before any of them is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic_daemon import protocol as p
from elastic_daemon.processes.control_server import Peer
from elastic_daemon.processes.fence_word import FenceWord
from elastic_daemon.processes.rank_peers import RankPeers

READER = """
import sys
from pathlib import Path
from elastic_daemon.processes.fence_word import FenceWord

word = FenceWord(Path(sys.argv[1]))
for _ in sys.stdin:
    print(word.epoch, flush=True)
"""


@pytest.fixture
def word(tmp_path: Path) -> FenceWord:
    return FenceWord(tmp_path / "fence", writer=True)


def test_another_process_sees_it(word: FenceWord, tmp_path: Path) -> None:
    command = [sys.executable, "-c", READER, str(tmp_path / "fence")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        ask, answer = reader.stdin, reader.stdout
        assert ask is not None and answer is not None

        def seen() -> int:
            ask.write("\n")
            ask.flush()
            return int(answer.readline())

        assert seen() == 0
        for epoch in (1, 2, 1 << 40):
            word.fence(epoch)
            assert seen() == epoch
        ask.close()


def test_an_older_fence_changes_nothing(word: FenceWord) -> None:
    word.fence(7)
    word.fence(6)
    assert word.epoch == 7


def test_a_rank_cannot_write_it(word: FenceWord, tmp_path: Path) -> None:
    reader = FenceWord(tmp_path / "fence")
    with pytest.raises(TypeError, match="read-only"):
        reader.fence(3)
    assert (word.epoch, reader.epoch) == (0, 0)


def test_no_two_write_it(word: FenceWord, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        FenceWord(tmp_path / "fence", writer=True)


def test_a_rank_that_finds_none_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FenceWord(tmp_path / "fence")


class Told(Peer):
    """A rank that notes what the word is when it is told something."""

    def __init__(self, rank: int, incarnation: int, seen: FenceWord) -> None:
        self.role, self.rank, self.incarnation = "rank", rank, incarnation
        self.heard: list[tuple[str, dict[str, Any], int]] = []
        self._seen = seen

    def send(self, type_: str, **fields: Any) -> None:
        self.heard.append((type_, fields, self._seen.epoch))


def test_all_are_fenced_before_the_first_is_told(word: FenceWord, tmp_path: Path) -> None:
    seen = FenceWord(tmp_path / "fence")
    peers, ranks = RankPeers(), [Told(rank, 11 + rank, seen) for rank in range(3)]
    peers.fence = word
    for rank in ranks:
        peers.add(rank)
    peers.tell(p.Resume(0, 4))
    assert seen.epoch == 0
    for rank in ranks:
        peers.tell(p.Fence(rank.rank, 5))
    assert ranks[0].heard == [("resume", {"epoch": 4}, 0), ("fence", {"epoch": 5}, 5)]
    assert [rank.heard for rank in ranks[1:]] == [[("fence", {"epoch": 5}, 5)]] * 2


def test_the_newest_incarnation_is_told_and_nobody_who_is_gone(word: FenceWord) -> None:
    peers, old, new = RankPeers(), Told(1, 11, word), Told(1, 14, word)
    peers.fence = word
    peers.add(old)
    peers.add(new)
    peers.tell(p.Fence(1, 2))
    peers.forget((1, 14))
    peers.tell(p.Fence(1, 3))
    peers.forget((1, 11))
    peers.tell(p.Fence(1, 4))
    assert [fields["epoch"] for _, fields, _ in new.heard] == [2]
    assert [fields["epoch"] for _, fields, _ in old.heard] == [3]
    assert word.epoch == 4, "also where none of them can be told"
