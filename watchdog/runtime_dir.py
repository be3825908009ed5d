"""Where a daemon and its watchdog meet: the runtime directory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def default_runtime_dir() -> Path:
    """`$RUNTIME_DIRECTORY` of systemd, else `$XDG_RUNTIME_DIR/elastic-daemon`, else a private temporary directory.

    The daemon's rule (elastic_daemon/config.py): both must find the same one without being told.
    """
    if directory := os.environ.get("RUNTIME_DIRECTORY"):
        return Path(directory.split(":")[0])
    if directory := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(directory, "elastic-daemon")
    return Path(tempfile.gettempdir(), f"elastic-daemon-{os.getuid()}")
