"""Command line of the GPU watchdog."""

from __future__ import annotations

import sys


def main() -> None:
    """There is no watchdog in this version: say so, rather than fail on a missing module."""
    print("elastic-watchdog: this version has no GPU watchdog; the daemon itself sees ranks die", file=sys.stderr)
    sys.exit(2)
