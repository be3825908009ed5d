"""What the command lines of all benchmarks have in common."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def positive(text: str) -> int:
    """The type of an option that counts."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def say(text: str) -> None:
    """Progress, beside the report."""
    print(text, file=sys.stderr, flush=True)


def check_json_path(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """Now, not after the measurement. Ends with exit status 2 when nothing can be written there."""
    if path is not None and not path.absolute().parent.is_dir():
        parser.error(f"--json: no such directory: {path.parent}")


def write_json(path: Path | None, body: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
