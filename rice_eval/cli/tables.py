"""Plain tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["print_table"]

_NO_TERMINAL = 2000  # columns: a pipe or a file has no width, so nothing is folded there


def print_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """Print rows as an aligned table; the columns are the keys of the first row. Text is never read as markup."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        print("nothing to show")
        return
    if title:
        print(title)  # not the table's own: that is folded at the table's width
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in rows[0]:
        numeric = all(_is_number(row.get(name)) for row in rows)
        table.add_column(Text(str(name)), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if row.get(name) is None else str(row.get(name))) for name in rows[0]))
    console = Console()
    if console.is_terminal:
        console.print(table)
        return
    wide = Console(width=_NO_TERMINAL)
    with wide.capture() as captured:
        wide.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n"))


def _is_number(value: Any) -> bool:
    head = str(value).split(" ")[0].rstrip("%s").replace(",", "")
    return value is None or head.lstrip("-").replace(".", "", 1).isdigit()
