"""The reading side of heartbeat pages: consistent snapshots, whatever the writer is doing or has died of.

A page is read with pread(2), not through a mapping: a file that somebody cuts short is then an error and no SIGBUS.
A reading counts as consistent when two successive ones are equal ("double collect": Afek et al., "Atomic Snapshots of
Shared Memory", JACM 1993) and the sequence is even. The second reading comes a microsecond later, long after stores
that a processor reordered have become visible, and it covers words that a device writes outside the sequence.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from watchdog.heartbeat import layout
from watchdog.heartbeat.errors import HeartbeatError, PageCorrupt, PageInvalid, PageMissing, PageVersionMismatch
from watchdog.heartbeat.layout import HEADER_BYTES, PAGE_BYTES, USED_BYTES, WORDS, Granularity, Phase, Snapshot
from watchdog.heartbeat.process import process_state

ATTEMPTS = 8
"""Readings before a page counts as torn. An update takes under a microsecond, so more than two are rare."""


class PageReader:
    """Reads one page, of whatever process."""

    def __init__(self, path: Path) -> None:
        """Raises PageMissing, PageInvalid, PageVersionMismatch or PageCorrupt."""
        self.path = path
        self._good: Snapshot | None = None
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise PageMissing(f"heartbeat page {path}: no such file") from error
        except OSError as error:
            raise PageInvalid(f"heartbeat page {path}: {error.strerror}") from error
        try:
            self._check_file()
            self._header = self._pread()[:HEADER_BYTES]
            self._check_header()
        except BaseException:
            os.close(self._fd)
            raise

    def read(self) -> Snapshot:
        """The page as it is now, with the state of its process. Never blocks.

        Raises PageInvalid when the file was cut short, PageCorrupt when its header changed or a field is impossible.
        """
        first = self._pread()
        for _ in range(ATTEMPTS):
            second = self._pread()
            if first == second and not WORDS.unpack(second)[layout.SEQUENCE] & 1:
                self._good = self._parse(second, torn=False)
                return self._with_process(self._good)
            first = second
        words = self._parse(first, torn=True)
        if self._good is not None:
            words = replace(
                self._good,
                sequence=words.sequence,
                async_error=words.async_error,
                async_error_ns=words.async_error_ns,
                torn=True,
            )
        return self._with_process(words)

    @property
    def inode(self) -> int:
        """Tells whether the file under this path is still the one that is being read."""
        return os.fstat(self._fd).st_ino

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> PageReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _with_process(self, snapshot: Snapshot) -> Snapshot:
        return replace(snapshot, process=process_state(snapshot.pid, snapshot.pid_start))

    def _pread(self) -> bytes:
        page = os.pread(self._fd, USED_BYTES, 0)
        if len(page) != USED_BYTES:
            raise PageInvalid(f"heartbeat page {self.path}: cut short to {len(page)} bytes")
        return page

    def _check_file(self) -> None:
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            raise PageInvalid(f"heartbeat page {self.path}: not a regular file")
        if found.st_uid not in (os.geteuid(), 0):
            raise PageInvalid(f"heartbeat page {self.path}: owned by uid {found.st_uid}, not by this user")
        if found.st_size != PAGE_BYTES:
            raise PageInvalid(f"heartbeat page {self.path}: {found.st_size} bytes instead of {PAGE_BYTES}")

    def _check_header(self) -> None:
        words = WORDS.unpack(self._header.ljust(USED_BYTES, b"\0"))
        if words[0] != layout.MAGIC:
            raise PageInvalid(f"heartbeat page {self.path}: no heartbeat page (magic {words[0]:#018x})")
        if words[1] != layout.VERSION:
            raise PageVersionMismatch(
                f"heartbeat page {self.path}: layout version {words[1]}, this reader knows {layout.VERSION}; "
                "daemon and watchdog must come from one release"
            )
        if words[2] != PAGE_BYTES or words[layout.GRANULARITY] not in tuple(Granularity):
            raise PageCorrupt(f"heartbeat page {self.path}: impossible header")

    def _parse(self, page: bytes, torn: bool) -> Snapshot:
        if page[:HEADER_BYTES] != self._header:
            raise PageCorrupt(f"heartbeat page {self.path}: its header changed")
        words = WORDS.unpack(page)
        if words[layout.PHASE] not in tuple(Phase):
            raise PageCorrupt(f"heartbeat page {self.path}: unknown phase {words[layout.PHASE]}")
        entered, completed = words[layout.ENTERED : layout.COMPLETED], words[layout.COMPLETED : layout.WORKED]
        return Snapshot(
            rank=words[layout.RANK],
            incarnation=words[layout.INCARNATION],
            pid=words[layout.PID],
            pid_start=words[layout.PID_START],
            granularity=Granularity(words[layout.GRANULARITY]),
            sequence=words[layout.SEQUENCE],
            epoch=words[layout.EPOCH],
            step=words[layout.STEP],
            phase=Phase(words[layout.PHASE]),
            phase_since_ns=words[layout.PHASE_SINCE],
            last_beat_ns=words[layout.LAST_BEAT],
            last_entered_ns=words[layout.LAST_ENTERED],
            last_completed_ns=words[layout.LAST_COMPLETED],
            entered=(entered[0], entered[1], entered[2], entered[3]),
            completed=(completed[0], completed[1], completed[2], completed[3]),
            worked_ns=words[layout.WORKED],
            waited_ns=words[layout.WAITED],
            timed=words[layout.TIMED],
            starved_ns=words[layout.STARVED],
            async_error=words[layout.ASYNC_ERROR],
            async_error_ns=words[layout.ASYNC_ERROR_AT],
            torn=torn,
        )


class PageDirectory:
    """All pages of a runtime directory, as they come and go."""

    def __init__(self, runtime_dir: Path) -> None:
        self._directory = runtime_dir / layout.DIRECTORY_NAME
        self._readers: dict[Path, PageReader] = {}

    def read(self) -> tuple[list[Snapshot], list[HeartbeatError]]:
        """Snapshots of all pages, by rank and incarnation, and what is wrong with files that are none.

        No directory means no pages. Pages whose file is gone are forgotten.
        """
        snapshots: list[Snapshot] = []
        errors: list[HeartbeatError] = []
        names = self._names()
        for path in self._readers.keys() - names.keys():
            self._readers.pop(path).close()
        for path, inode in names.items():
            try:
                snapshots.append(self._reader(path, inode).read())
            except PageMissing:
                continue
            except HeartbeatError as error:
                errors.append(error)
                if path in self._readers:
                    self._readers.pop(path).close()
        return sorted(snapshots, key=lambda page: (page.rank, page.incarnation)), errors

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
        self._readers = {}

    def _names(self) -> dict[Path, int]:
        found: dict[Path, int] = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.startswith("rank-") and entry.name.endswith(".page"):
                    found[Path(entry.path)] = entry.inode()
        return found

    def _reader(self, path: Path, inode: int) -> PageReader:
        reader = self._readers.get(path)
        if reader is not None and reader.inode != inode:
            self._readers.pop(path).close()
            reader = None
        if reader is None:
            reader = self._readers[path] = PageReader(path)
        return reader
