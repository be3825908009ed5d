"""What the scripts that write a page of `docs/` have in common."""

from __future__ import annotations

import argparse
from pathlib import Path


def write_or_check(description: str | None, target: Path, text: str) -> int:
    """Write the page, or with `--check` say by the exit status whether it is up to date."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the file is out of date")
    if parser.parse_args().check:
        current = target.read_text(encoding="utf-8") if target.exists() else ""
        return 0 if current == text else 1
    target.write_text(text, encoding="utf-8")
    return 0
