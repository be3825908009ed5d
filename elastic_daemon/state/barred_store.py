"""GPUs on which ranks kept failing to start, over restarts of the daemon: only an operator forgives them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_daemon.config import Settings
from elastic_daemon.state.state_file import load, store

FILE_NAME = "barred-gpus.json"


def load_barred(settings: Settings) -> dict[str, str]:
    """UUID -> why, as it was stored last; empty where nothing readable was."""
    return load(barred_path(settings), "barred_gpus", _parse) or {}


def store_barred(settings: Settings, barred: Mapping[str, str]) -> None:
    """On disk when this returns. Raises OSError."""
    store(barred_path(settings), barred=dict(barred))


def barred_path(settings: Settings) -> Path:
    return settings.effective_state_dir / FILE_NAME


def _parse(body: Mapping[str, Any]) -> dict[str, str]:
    barred = body["barred"]
    if not all(isinstance(text, str) and text for pair in barred.items() for text in pair):
        raise ValueError("GPUs and reasons are texts")
    return dict(barred)
