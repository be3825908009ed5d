"""Times in tests. Bars are measured on quiet machines, by `bench/`; tests say what may never take much longer."""

from __future__ import annotations

SLACK_S = 5.0
"""How much later than its bar something may come on a machine that runs other things too."""
