"""What the command lines of all benchmarks have in common."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

INTERRUPTED = 130


def positive(text: str) -> int:
    """The type of an option that counts."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def say(text: str) -> None:
    """Progress, beside the report."""
    print(text, file=sys.stderr, flush=True)


def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Run it. Ctrl-C and SIGTERM end it, whatever it started first, and then this program: exit status 130."""
    try:
        return asyncio.run(_stoppable(work))
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("stopped before the end")
        raise SystemExit(INTERRUPTED) from None


async def _stoppable(work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await work


def check_json_path(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """Now, not after the measurement. Ends with exit status 2 when nothing can be written there."""
    if path is not None and not path.absolute().parent.is_dir():
        parser.error(f"--json: no such directory: {path.parent}")


def write_json(path: Path | None, body: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
