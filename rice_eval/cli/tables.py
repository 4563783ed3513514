"""Plain tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rice_eval.errors import one_line

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["print_table", "table_text"]

_NO_TERMINAL = 2000  # columns: a pipe or a file has no width, so nothing is folded there


def print_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """Print rows as an aligned table; the columns are the keys of the first row. Text is never read as markup."""
    from rich.console import Console

    console = Console()
    if not rows or not console.is_terminal:
        print(table_text(rows, title))
        return
    if title:
        print(one_line(title))  # not the table's own: that is folded at the table's width
    console.print(_table(rows))


def table_text(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> str:
    """What ``print_table`` prints where there is no terminal, without the last newline."""
    from rich.console import Console

    if not rows:
        return "nothing to show"
    wide = Console(width=_NO_TERMINAL, color_system=None, force_terminal=False)
    with wide.capture() as captured:
        wide.print(_table(rows))
    text = "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")
    return f"{one_line(title)}\n{text}" if title else text


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in rows[0]:
        numeric = all(_is_number(row.get(name)) for row in rows)
        table.add_column(Text(one_line(name)), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if row.get(name) is None else one_line(str(row.get(name)))) for name in rows[0]))
    return table


def _is_number(value: Any) -> bool:
    head = str(value).split(" ")[0].rstrip("%s").replace(",", "")
    return value is None or head.lstrip("-").replace(".", "", 1).isdigit()
