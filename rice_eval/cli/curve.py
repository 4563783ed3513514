"""Command ``curve``: a metric of text tasks against the height of a character, from records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rice_eval.errors import UsageError

if TYPE_CHECKING:
    from rice_eval.results.curves import Point

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this module's command to ``app``."""
    app.command("curve")(curve)


def curve(
    roots: Annotated[list[Path] | None, typer.Argument(help="Results folders; results by default.")] = None,
    group: Annotated[
        str, typer.Option("--group", "-g", help="What lies along the curve: height, turn, length or contrast.")
    ] = "height",
    metric: Annotated[str | None, typer.Option("--metric", "-m", help="Metric; each record's own by default.")] = None,
    task: Annotated[list[str] | None, typer.Option("--task", "-t", help="Only this task. Repeatable.")] = None,
    protocol: Annotated[list[str] | None, typer.Option("--protocol", "-p", help="Only this one. Repeatable.")] = None,
    format: Annotated[str, typer.Option("--format", "-f", help="table, csv or json (a line a point).")] = "table",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File instead of the screen.")] = None,
) -> None:
    """How a text task's metric goes with the height of a character, or with turn, length or contrast of lines."""
    from rice_eval.results import curves as of
    from rice_eval.results.store import read_records, write_atomic

    if format not in ("table", "csv", "json"):
        raise UsageError(f"--format {format} is not known", "choose table, csv or json")
    folders = list(roots or [Path("results")])
    points = of.curves(read_records(folders), group, metric) + of.reference_curves(folders, group, metric)
    points = [p for p in points if (not task or p.task in task) and (not protocol or p.protocol in protocol)]
    if not points:
        raise UsageError(
            f"no record here has groups by {group}" + (f" for metric '{metric}'" if metric else ""),
            "run a task of kind ocr first, e.g. rice-eval ocr -e ENCODER",
        )
    if format == "table":
        if output is not None:
            raise UsageError("--output takes no table", "add --format csv or --format json")
        _print(points, group)
        return
    text = of.curves_csv(points) if format == "csv" else of.curves_json(points)
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, text.encode())


def _print(points: list[Point], group: str) -> None:
    """One comparability key a table: what was scored otherwise is never set beside it. Reference systems stand in all of theirs."""
    from rice_eval.cli.tables import print_table

    boards: dict[tuple[str, str, str, str], dict[tuple[str, str], list[Point]]] = {}
    for point in points:
        place = (point.task, point.protocol, point.metric)
        same = [name for name in boards if name[:3] == place] if point.reference else []
        for board in same or [(*place, point.key)]:
            boards.setdefault(board, {}).setdefault((point.encoder, point.record), []).append(point)
    titles = [name[:3] for name in boards]
    for (task, protocol, metric, key), rows in sorted(boards.items()):
        names = {p.group: None for p in sorted((p for row in rows.values() for p in row), key=lambda p: p.start)}
        table = []
        for row_points in rows.values():
            first = row_points[0]
            row = {
                "encoder": f"{first.encoder} (reference)" if first.reference else first.encoder,
                **dict.fromkeys(names, ""),
            }
            for p in row_points:
                interval = f" [{p.low:.0f}, {p.high:.0f}]" if p.low is not None and p.high is not None else ""
                row[p.group] = f"{p.value:.1f}{interval}"
            table.append(row)
        several = f" · key {key}" if titles.count((task, protocol, metric)) > 1 else ""
        print_table(table, title=f"{task} · {protocol} · {metric} by {group}{several}")
