"""Settings of the daemon: flags over environment (`ELASTIC_*`) over one TOML file."""

from __future__ import annotations

import os
import shlex
import tempfile
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from elastic_daemon.access import AccessRules, is_loopback
from elastic_daemon.errors import ConfigError
from elastic_daemon.watch.upkeep import WatchMode

BUNDLED_MODEL = Path(__file__).parent / "models" / "tiny_moe"
BUNDLED_NAME = "tiny-moe"
BUNDLED_FLAGS = ("--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20))
BUNDLED_SURVIVE_LOSSES = 2

CONFIG_VARIABLE = "ELASTIC_CONFIG"

MAX_RANKS = 1024

SECRETS = ("api_key", "admin_key")
"""Settings whose values no message shows."""


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


class Settings(BaseSettings):
    """Everything the supervisor needs to know. `engine_flags` go to vLLM as they are."""

    model_config = SettingsConfigDict(env_prefix="ELASTIC_", frozen=True, extra="forbid")

    model: str | None = None
    data_parallel_size: int = Field(4, ge=1, le=MAX_RANKS)
    max_ranks: int | None = Field(None, ge=1, le=MAX_RANKS)
    reset_target: bool = False
    device: Device = Device.CPU
    ranks_per_gpu: int = Field(1, ge=1, le=8)
    survive_losses: int | None = Field(None, ge=0)
    restore: Restore = Restore.AUTO
    host_expert_copies: HostExpertCopies = HostExpertCopies.AUTO
    hold_timeout: float = Field(60.0, ge=0)
    start_timeout: float = Field(300.0, gt=0)
    shutdown_timeout: float = Field(5.0, ge=0)
    watchdog: WatchMode = WatchMode.SPAWN
    watchdog_flags: Annotated[tuple[str, ...], NoDecode] = ()
    spare_gpus: int = Field(0, ge=0, le=71)
    gpu_probation: float = Field(2.0, ge=0)
    state_dir: Path | None = None
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    runtime_dir: Path = Field(default_factory=default_runtime_dir)
    api_key: Annotated[tuple[str, ...], NoDecode] = Field((), repr=False)
    admin_key: SecretStr | None = None
    engine_flags: Annotated[tuple[str, ...], NoDecode] = ()

    @field_validator("api_key", mode="before")
    @classmethod
    def _split_keys(cls, value: Any) -> Any:
        """The environment gives several keys separated by commas."""
        return tuple(key for key in value.split(",") if key) if isinstance(value, str) else value

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
        if key is not None and (not key or not all("!" <= character <= "~" for character in key)):
            raise ValueError("expected printable ASCII characters without spaces, one at least")
        if key in info.data.get("api_key", ()):
            raise ValueError("it must not be an API key too: those who have that one would be admins")
        return value

    @field_validator("engine_flags", "watchdog_flags", mode="before")
    @classmethod
    def _split_flags(cls, value: Any) -> Any:
        """One text is taken as a command line."""
        return tuple(shlex.split(value)) if isinstance(value, str) else value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        assert isinstance(init_settings, InitSettingsSource)
        file = os.environ.get(CONFIG_VARIABLE)
        from_file = (InitSettingsSource(settings_cls, _read_toml(Path(file))),) if file else ()
        return (init_settings, env_settings, *from_file)

    @property
    def access(self) -> AccessRules:
        admin_key = self.admin_key.get_secret_value() if self.admin_key is not None else None
        return AccessRules(self.api_key, is_loopback(self.host), admin_key)

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
            return (*bundled, *self.engine_flags)
        return ("--model", str(self.model), *self.engine_flags)


def _read_toml(path: Path) -> dict[str, Any]:
    """Read here, since pydantic's own source ignores a file that does not exist. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror} ({CONFIG_VARIABLE} names it)") from error
    except ValueError as error:  # the message of a TOMLDecodeError has line and column
        raise ConfigError(f"{path}: {error}") from error


def key_header() -> dict[str, str]:
    """What a client of ours sends to a daemon with keys: the first of `$ELASTIC_API_KEY`."""
    keys = [key for key in os.environ.get("ELASTIC_API_KEY", "").split(",") if key]
    return {"Authorization": f"Bearer {keys[0]}"} if keys else {}


def admin_header() -> dict[str, str]:
    """What a client of ours sends with an operator's order: `$ELASTIC_ADMIN_KEY`, else what it always sends."""
    key = os.environ.get("ELASTIC_ADMIN_KEY")
    return {"Authorization": f"Bearer {key}"} if key else key_header()


def load_settings(flags: dict[str, Any]) -> Settings:
    """Settings from given flags (only those that were set), environment and file.

    Raises:
        ConfigError: names the setting and what is wrong with it.
    """
    try:
        return Settings(**flags)
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + "-".join(str(part) for part in first["loc"]).replace("_", "-")
        if first["loc"][:1] and first["loc"][0] in SECRETS:
            raise ConfigError(f"{name}: {first['msg']}") from None  # the cause shows the value
        raise ConfigError(f"{name}: {first['msg']} (got {first['input']!r})") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
