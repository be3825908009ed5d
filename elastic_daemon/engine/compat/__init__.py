"""The vLLM version that `engine/` is written against, and every symbol of it that is relied on without being public.

A new vLLM is adopted by raising `VLLM_VERSION`, running `tests/contract`, and mending what it names.
"""

from __future__ import annotations

from elastic_daemon.engine.compat.communication import COMMUNICATION
from elastic_daemon.engine.compat.engine_client import ENGINE_CLIENT
from elastic_daemon.engine.compat.engine_core import ENGINE_CORE
from elastic_daemon.engine.compat.experts import EXPERTS
from elastic_daemon.engine.compat.load_balancing import LOAD_BALANCING
from elastic_daemon.engine.compat.model_runner import MODEL_RUNNER
from elastic_daemon.engine.compat.relied_on import ReliedOn
from elastic_daemon.engine.compat.scheduler import SCHEDULER
from elastic_daemon.engine.compat.server import SERVER
from elastic_daemon.errors import ConfigError, engine_missing

VLLM_VERSION = "0.32.0"


def check_version() -> None:
    """Raises ConfigError when the vLLM in this environment is missing or not the one we know."""
    try:
        from vllm import __version__ as found
    except ImportError as error:
        raise ConfigError(f"vLLM {VLLM_VERSION} is needed: {engine_missing(error)}") from error
    # Builds for one device carry it as a local version: 0.32.0+cpu.
    if found.partition("+")[0] != VLLM_VERSION:
        raise ConfigError(f"vLLM {VLLM_VERSION} is needed for its internals, this environment has {found}")


RELIED_ON: tuple[ReliedOn, ...] = (
    *ENGINE_CORE,
    *ENGINE_CLIENT,
    *SCHEDULER,
    *MODEL_RUNNER,
    *COMMUNICATION,
    *EXPERTS,
    *LOAD_BALANCING,
    *SERVER,
)
"""Checked symbol by symbol in tests/contract/test_vllm_symbols.py."""

__all__ = ["RELIED_ON", "VLLM_VERSION", "ReliedOn", "check_version"]
