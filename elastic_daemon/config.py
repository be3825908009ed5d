"""Settings of the daemon. `sources` reads them."""

from __future__ import annotations

import os
import shlex
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator

from elastic_daemon.gates.access import AccessRules, is_loopback
from elastic_daemon.gates.tls import Tls
from elastic_daemon.settings.resolve import (
    as_flags,
)
from elastic_daemon.watch.upkeep import WatchMode

BUNDLED_MODEL = Path(__file__).parent / "models" / "tiny_moe"
BUNDLED_NAME = "tiny-moe"
BUNDLED_FLAGS = ("--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20))
BUNDLED_SURVIVE_LOSSES = 2

MAX_RANKS = 1024

SECRETS = ("api_key", "admin_key")
"""Settings whose values no message shows."""

FLAG_SETTINGS = ("engine_flags", "watchdog_flags", "vllm")
"""Settings that carry flags of others. A value that cannot be read cannot be masked: no message shows it either."""


class Device(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


def default_runtime_dir() -> Path:
    """`$RUNTIME_DIRECTORY` of systemd, else `$XDG_RUNTIME_DIR/elastic-daemon`, else a private temporary directory."""
    if directory := os.environ.get("RUNTIME_DIRECTORY"):
        return Path(directory.split(":")[0])
    if directory := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(directory, "elastic-daemon")
    return Path(tempfile.gettempdir(), f"elastic-daemon-{os.getuid()}")


class Restore(StrEnum):
    AUTO = "auto"
    OFF = "off"


class HostExpertCopies(StrEnum):
    AUTO = "auto"
    OFF = "off"


class Respread(StrEnum):
    AUTO = "auto"
    OFF = "off"


class LogFormat(StrEnum):
    JSON = "json"
    TEXT = "text"
    JOURNAL = "journal"


LOG_LEVELS = frozenset({"debug", "info", "warning", "error", "critical", "warn", "fatal", "notset"})
"""Python's own, with its aliases. Libraries add theirs (uvicorn `trace`), which other processes of ours do not know."""


def _can_be_sent(key: str) -> bool:
    """In a header, as it is."""
    return bool(key) and all("!" <= character <= "~" for character in key)


LIVE: dict[str, Any] = {"reloadable": True}
"""Marks a setting that a reload applies; all others wait for a restart."""


class Settings(BaseModel):
    """Everything the supervisor needs to know. `engine_flags` go to vLLM as they are, after those of `vllm`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(None, description="a directory or hub id; without one the bundled tiny-moe")
    data_parallel_size: int = Field(4, ge=1, le=MAX_RANKS, description="ranks to serve with")
    max_ranks: int | None = Field(
        None, ge=1, le=MAX_RANKS, description="most ranks that can be scaled up to; without it those to serve with"
    )
    reset_target: bool = Field(False, description="forget the number of ranks that was scaled to before this start")
    device: Device = Field(Device.CPU, description="what the ranks compute on")
    ranks_per_gpu: int = Field(1, ge=1, le=8, description="ranks that share a GPU, to test without many")
    survive_losses: int | None = Field(
        None, ge=0, description="size slots so that any N-K ranks hold every expert; without it 1 (tiny-moe: 2)"
    )
    restore: Restore = Field(
        Restore.AUTO, description="start lost ranks again and let them rejoin", json_schema_extra=LIVE
    )
    respread: Respread = Field(
        Respread.AUTO,
        description="spread copies of experts anew after each change of the group",
        json_schema_extra=LIVE,
    )
    host_expert_copies: HostExpertCopies = Field(
        HostExpertCopies.AUTO, description="copy experts that a single rank holds to host memory"
    )
    hold_timeout: float = Field(
        60.0, ge=0, description="hold requests this many seconds without capacity", json_schema_extra=LIVE
    )
    start_timeout: float = Field(
        300.0, gt=0, description="give a rank this many seconds to start", json_schema_extra=LIVE
    )
    shutdown_timeout: float = Field(
        5.0, ge=0, description="let requests finish for this many seconds", json_schema_extra=LIVE
    )
    watchdog: WatchMode = Field(
        WatchMode.SPAWN, description="start and tend a watchdog, expect one that others start, or do without"
    )
    watchdog_flags: tuple[str, ...] = Field((), description="flags for the `elastic-watchdog run` that it starts")
    spare_gpus: int = Field(0, ge=0, le=71, description="idle simulated GPUs on --device cpu")
    gpu_probation: float = Field(
        2.0,
        ge=0,
        description="a GPU must be healthy this many seconds before a rank starts on it",
        json_schema_extra=LIVE,
    )
    state_dir: Path | None = Field(None, description="where what is remembered over restarts is kept")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    runtime_dir: Path = Field(
        default_factory=default_runtime_dir, description="directory for sockets and scratch files"
    )
    api_key: tuple[str, ...] = Field(
        (), repr=False, description="keys, one of which every request must have", json_schema_extra=LIVE
    )
    admin_key: SecretStr | None = Field(
        None, description="key for orders: scaling, draining and such", json_schema_extra=LIVE
    )
    api_key_file: Path | None = Field(
        None, description="a file with more such keys, one a line", json_schema_extra=LIVE
    )
    admin_key_file: Path | None = Field(None, description="a file with the admin key", json_schema_extra=LIVE)
    max_waiting: int = Field(
        4096,
        ge=1,
        description="refuse requests (503) while this many wait for their answer to begin",
        json_schema_extra=LIVE,
    )
    queue_timeout: float = Field(
        600.0,
        gt=0,
        description="refuse a request (503) that would wait longer than this many seconds",
        json_schema_extra=LIVE,
    )
    max_body_size: int = Field(
        64 << 20, ge=1024, description="refuse larger bodies (413), in bytes", json_schema_extra=LIVE
    )
    ssl_certfile: Path | None = Field(None, description="serve with TLS: file with the certificate, and its chain")
    ssl_keyfile: Path | None = Field(None, description="serve with TLS: file with the private key")
    ssl_ca_certs: Path | None = Field(None, description="file with the authorities of clients' certificates")
    ssl_cert_reqs: int = Field(
        0, ge=0, le=2, description="clients' certificates: 0 not asked for, 1 checked, 2 required"
    )
    ssl_ciphers: str | None = Field(None, description="TLS ciphers, as OpenSSL names them")
    enable_ssl_refresh: bool = Field(False, description="read certificate, key and authorities anew when they change")
    log_level: str = Field("info", description="debug, info, warning, error or critical", json_schema_extra=LIVE)
    log_format: LogFormat | None = Field(None, description="without it: text on a terminal, else JSON lines")
    engine_flags: tuple[str, ...] = Field((), description="further flags for vLLM, as on a command line")
    vllm: dict[str, Any] = Field(
        default_factory=dict, repr=False, description="flags for vLLM by name: a table of the file"
    )

    @field_validator("ssl_keyfile")
    @classmethod
    def _key_of_a_certificate(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and info.data.get("ssl_certfile") is None:
            raise ValueError("the certificate is needed too: --ssl-certfile")
        return value

    @field_validator("log_level")
    @classmethod
    def _known_level(cls, value: str) -> str:
        if value.lower() not in LOG_LEVELS:
            raise ValueError("expected debug, info, warning, error or critical")
        return value.lower()

    @field_validator("api_key", mode="before")
    @classmethod
    def _split_keys(cls, value: Any) -> Any:
        """The environment gives several keys separated by commas."""
        return tuple(key for key in value.split(",") if key) if isinstance(value, str) else value

    @field_validator("api_key")
    @classmethod
    def _fit_as_keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(_can_be_sent, value)):
            raise ValueError("expected printable ASCII characters without spaces, one at least, in each key")
        return value

    @field_validator("max_ranks")
    @classmethod
    def _room_for_all(cls, value: int | None, info: ValidationInfo) -> int | None:
        ranks = info.data.get("data_parallel_size", 1)
        if value is not None and value < ranks:
            raise ValueError(f"fewer than the {ranks} ranks of --data-parallel-size")
        return value

    @field_validator("admin_key")
    @classmethod
    def _fit_to_send(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        """An empty key is an error: whoever sets one wants to close the control routes."""
        key = value.get_secret_value() if value is not None else None
        if key is not None and not _can_be_sent(key):
            raise ValueError("expected printable ASCII characters without spaces, one at least")
        if key in info.data.get("api_key", ()):
            raise ValueError("it must not be an API key too: those who have that one would be admins")
        return value

    @field_validator("engine_flags", "watchdog_flags", mode="before")
    @classmethod
    def _split_flags(cls, value: Any) -> Any:
        """One text is taken as a command line."""
        return tuple(shlex.split(value)) if isinstance(value, str) else value

    @field_validator("watchdog_flags")
    @classmethod
    def _of_our_own_watchdog(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """Who starts another one gives it its flags: here they would be lost without a word."""
        if value and info.data.get("watchdog") is WatchMode.EXTERNAL:
            raise ValueError(
                "of no use with --watchdog external: give them where that one is started, as WATCHDOG_FLAGS in "
                "watchdog.env under systemd"
            )
        return value

    @property
    def access(self) -> AccessRules:
        admin_key = self.admin_key.get_secret_value() if self.admin_key is not None else None
        return AccessRules(self.api_key, is_loopback(self.host), admin_key)

    @property
    def tls(self) -> Tls | None:
        if self.ssl_certfile is None:
            return None
        key, authorities = (str(path) if path else None for path in (self.ssl_keyfile, self.ssl_ca_certs))
        return Tls(str(self.ssl_certfile), key, authorities, self.ssl_cert_reqs, self.ssl_ciphers)

    @property
    def simulated_state_dir(self) -> Path:
        """Simulated GPUs belong to the runtime directory, and so does what is remembered of them."""
        return self.runtime_dir / "state"

    @property
    def effective_state_dir(self) -> Path:
        """Where what must outlive a restart of the daemon is kept."""
        # Not at the top: where another package `watchdog` is in the way, `serve` says so.
        from watchdog.state import default_state_dir

        if self.state_dir is not None:
            return self.state_dir
        return self.simulated_state_dir if self.device is Device.CPU else default_state_dir()

    @property
    def watchdog_options(self) -> tuple[str, ...]:
        """Arguments of `elastic-watchdog run`; the user's come last and win."""
        simulated = self.device is Device.CPU
        state_dir = self.state_dir or (self.simulated_state_dir if simulated else None)
        remembered = ("--state-dir", str(state_dir)) if state_dir is not None else ()  # else the watchdog's own default
        return (*remembered, *(("--simulated",) if simulated else ()), *self.watchdog_flags)

    @property
    def most_ranks(self) -> int:
        """What the deployment may be scaled to: without a word about it, what there are simulated GPUs for."""
        spare = self.spare_gpus * self.ranks_per_gpu if self.device is Device.CPU else 0
        return self.max_ranks or self.data_parallel_size + spare

    @property
    def bundled(self) -> bool:
        return self.model is None

    @property
    def losses_to_survive(self) -> int:
        if self.survive_losses is not None:
            return self.survive_losses
        wanted = BUNDLED_SURVIVE_LOSSES if self.bundled else 1
        return min(wanted, self.data_parallel_size - 1)

    @property
    def vllm_flags(self) -> tuple[str, ...]:
        """The flags of vLLM's own server for this deployment; the user's come last and win."""
        if self.bundled:
            bundled = ("--model", str(BUNDLED_MODEL), "--served-model-name", BUNDLED_NAME, *BUNDLED_FLAGS)
            return (*bundled, *as_flags(self.vllm), *self.engine_flags)
        return ("--model", str(self.model), *as_flags(self.vllm), *self.engine_flags)


def key_header() -> dict[str, str]:
    """What a client of ours sends to a daemon with keys: the first of `$ELASTIC_API_KEY`."""
    keys = [key for key in os.environ.get("ELASTIC_API_KEY", "").split(",") if key]
    return {"Authorization": f"Bearer {keys[0]}"} if keys else {}


def admin_header() -> dict[str, str]:
    """What a client of ours sends with an operator's order: `$ELASTIC_ADMIN_KEY`, else what it always sends."""
    key = os.environ.get("ELASTIC_ADMIN_KEY")
    return {"Authorization": f"Bearer {key}"} if key else key_header()
