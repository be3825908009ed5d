"""What outlives a restart of the watchdog: each GPU's failures, quarantine and last verdict, by UUID.

One small JSON file, replaced as a whole: whoever reads it after a crash finds the old or the new one. A file that
cannot be read is put aside, with a line in the log: forgetting is better than not watching.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from watchdog.errors import StateError
from watchdog.logs import log
from watchdog.verdict import GpuHistory, Policy, Verdict, should_quarantine

VERSION = 1
FILE_NAME = "watchdog-state.json"
KEPT_TIMES = 100
FORGET_S = 30 * 24 * 3600.0


def default_state_dir() -> Path:
    """`$STATE_DIRECTORY` of systemd, else `$XDG_STATE_HOME/elastic-daemon`, else `~/.local/state/elastic-daemon`."""
    if directory := os.environ.get("STATE_DIRECTORY"):
        return Path(directory.split(":")[0])
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "elastic-daemon"


@dataclass(frozen=True)
class GpuRecord:
    """One GPU's line in the file. `verdict`: the last one, those that were not acted on left out. `seen` is wall-clock
    seconds."""

    history: GpuHistory = field(default_factory=GpuHistory)
    verdict: Verdict = Verdict.OK
    seen: float = 0.0

    @property
    def last(self) -> float:
        """When anything was last known of it."""
        return max(self.seen, *self.history.failures, *self.history.restarts, 0.0)


class State:
    """All records. Changes are kept in memory until `save`."""

    def __init__(self, directory: Path, records: Mapping[str, GpuRecord]) -> None:
        self._path = directory / FILE_NAME
        self._records = dict(records)
        self.dirty = False

    @classmethod
    def load(cls, directory: Path) -> State:
        """Raises StateError when the directory cannot be made or written."""
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(f"state directory {directory}: {error.strerror}") from error
        if not os.access(directory, os.W_OK | os.X_OK):
            raise StateError(f"state directory {directory}: not writable")
        return cls(directory, _read(directory / FILE_NAME))

    @property
    def gpus(self) -> tuple[str, ...]:
        return tuple(self._records)

    def record(self, gpu: str) -> GpuRecord:
        return self._records.get(gpu, GpuRecord())

    def see(self, gpu: str, wall: float) -> None:
        old = self.record(gpu)
        if wall - old.seen > 3600:  # so that it is not written at each poll
            self._put(gpu, replace(old, seen=wall))

    def set_verdict(self, gpu: str, verdict: Verdict) -> None:
        if self.record(gpu).verdict is not verdict:
            self._put(gpu, replace(self.record(gpu), verdict=verdict))

    def add_failure(self, gpu: str, policy: Policy, wall: float) -> bool:
        """Count a failure; whether the GPU is quarantined by it."""
        history = self.record(gpu).history
        history = replace(history, failures=(*history.failures, wall)[-KEPT_TIMES:])
        quarantine = history.quarantined is None and should_quarantine(history, policy, wall)
        if quarantine:
            history = replace(history, quarantined=wall)
        self._put(gpu, replace(self.record(gpu), history=history))
        return quarantine

    def add_restart(self, gpu: str, wall: float) -> None:
        history = self.record(gpu).history
        history = replace(history, restarts=(*history.restarts, wall)[-KEPT_TIMES:])
        self._put(gpu, replace(self.record(gpu), history=history))

    def release(self, gpu: str, wall: float) -> bool:
        """An operator's release at this time: all that happened before is forgiven. Whether that changed anything."""
        old = self.record(gpu).history
        if old.quarantined is not None and old.quarantined > wall:
            return False
        new = GpuHistory(
            tuple(time for time in old.failures if time > wall), tuple(time for time in old.restarts if time > wall)
        )
        if new == old:
            return False
        self._put(gpu, replace(self.record(gpu), history=new))
        return True

    def snapshot(self) -> bytes:
        """The file's contents now; what is later than this is dirty again."""
        now = time.time()
        kept = {gpu: one for gpu, one in self._records.items() if one.last > now - FORGET_S or one.history.quarantined}
        body = {gpu: {"seen": one.seen, "verdict": one.verdict, **asdict(one.history)} for gpu, one in kept.items()}
        self.dirty = False
        return json.dumps({"version": VERSION, "gpus": body}, indent=1).encode()

    def save(self, contents: bytes | None = None) -> None:
        """Replace the file; it is on disk when this returns. Raises StateError."""
        try:
            write_atomically(self._path, self.snapshot() if contents is None else contents)
        except OSError as error:
            self.dirty = True
            raise StateError(f"{self._path}: {error.strerror}") from error

    def _put(self, gpu: str, record: GpuRecord) -> None:
        self._records[gpu] = record
        self.dirty = True


def write_atomically(path: Path, contents: bytes, *, durable: bool = True) -> None:
    """Readers see the old or the new file, whole, also after a crash when it is `durable`. Mode 0600."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(contents)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _read(path: Path) -> dict[str, GpuRecord]:
    try:
        return _parse(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        aside = path.with_name(f"{path.name}.corrupt-{int(time.time())}")
        os.replace(path, aside)
        log.error("state_corrupt", file=str(path), moved_to=str(aside), error=f"{type(error).__name__}: {error}")
        return {}


def _parse(body: Any) -> dict[str, GpuRecord]:
    if body["version"] != VERSION:
        raise ValueError(f"version {body['version']!r} instead of {VERSION}")
    records = {}
    for gpu, fields in body["gpus"].items():
        quarantined = fields["quarantined"]
        history = GpuHistory(
            tuple(map(float, fields["failures"])),
            tuple(map(float, fields["restarts"])),
            None if quarantined is None else float(quarantined),
        )
        records[gpu] = GpuRecord(history, Verdict(fields["verdict"]), float(fields["seen"]))
    return records
