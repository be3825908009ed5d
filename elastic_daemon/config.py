"""Settings of the daemon: flags over environment (`ELASTIC_*`) over one TOML file."""

from __future__ import annotations

import os
import shlex
import tempfile
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator
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
    data_parallel_size: int = Field(4, ge=1, le=1024)
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
    state_dir: Path | None = None
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    runtime_dir: Path = Field(default_factory=default_runtime_dir)
    api_key: Annotated[tuple[str, ...], NoDecode] = ()
    engine_flags: Annotated[tuple[str, ...], NoDecode] = ()

    @field_validator("api_key", mode="before")
    @classmethod
    def _split_keys(cls, value: Any) -> Any:
        """The environment gives several keys separated by commas."""
        return tuple(key for key in value.split(",") if key) if isinstance(value, str) else value

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
        return AccessRules(self.api_key, is_loopback(self.host))

    @property
    def simulated_state_dir(self) -> Path:
        """Simulated GPUs belong to the runtime directory, and so does what is remembered of them."""
        return self.runtime_dir / "state"

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
        raise ConfigError(f"{name}: {first['msg']} (got {first['input']!r})") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
