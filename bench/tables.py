"""Tables of the reports."""

from __future__ import annotations

from rich.table import Table


def figures_table(title: str, *columns: str) -> Table:
    """What is measured in the first column, which has no name; figures in all others."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table
