"""Small JSON files in the state directory: what must outlive a restart of the daemon.

One is replaced as a whole: whoever reads it after a crash finds the old or the new one. One that cannot be read is put
aside, with a line in the log: forgetting is better than not serving.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import structlog

from watchdog.state import write_atomically

T = TypeVar("T")

log = structlog.get_logger(__name__)

VERSION = 1


def load(path: Path, what: str, parse: Callable[[Mapping[str, Any]], T]) -> T | None:
    """None: there is none, or none that can be read. `what`: its name in the log.

    `parse` may raise ValueError, KeyError, TypeError and AttributeError.
    """
    try:
        return parse(_checked(path.read_bytes()))
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning(f"{what}_unreadable", file=str(path), error=error.strerror)
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        aside = path.with_name(f"{path.name}.corrupt-{int(time.time())}")
        with contextlib.suppress(OSError):
            os.replace(path, aside)
        log.warning(f"{what}_corrupt", file=str(path), moved_to=str(aside), error=f"{type(error).__name__}: {error}")
        return None


def store(path: Path, **fields: Any) -> None:
    """On disk when this returns. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"version": VERSION, **fields, "at": time.time()}).encode())


def _checked(text: bytes) -> Mapping[str, Any]:
    body = json.loads(text)
    if body["version"] != VERSION:
        raise ValueError(f"version {body['version']!r} instead of {VERSION}")
    return body
