"""Command ``ocr-reference``: an OCR system through the same scorers, as a ceiling beside the encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this module's command to ``app``."""
    app.command("ocr-reference")(ocr_reference)


def ocr_reference(
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Dataset with text.")] = "scenes-text",
    data: Annotated[Path | None, typer.Option("--data", help="Folder (or zip) of the data.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="NAME=VALUE for the dataset's reader. Repeatable.")
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option("--protocol", "-p", help="ctc-linear (given lines), text-mask or read-page. Repeatable."),
    ] = None,
    limit_test: Annotated[int | None, typer.Option("--limit-test", min=1, help="Use only this many images.")] = None,
    results: Annotated[Path, typer.Option("--results", help="Folder; rows go to its references/.")] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")] = False,
) -> None:
    """RapidOCR (PP-OCRv4) on a test split: the ceiling beside encoders, never ranked among them."""
    from rice_eval.cli.evaluate import pairs
    from rice_eval.ocr_reference import PROTOCOLS, RapidOcr, evaluate_reference
    from rice_eval.progress import progress

    with progress(None) as report:
        rows = evaluate_reference(
            RapidOcr(),
            dataset=dataset,
            data=data,
            options=pairs("--option", option),
            protocols=protocol or PROTOCOLS,
            limit_test=limit_test,
            results=results,
            progress=report,
        )
    if as_json:
        for row in rows:
            line = {"reference": row.system, "task": row.task, "protocol": row.protocol, "metrics": row.metrics}
            typer.echo(json.dumps({**line, "file": str(row.path)}, sort_keys=True))
        return
    from rice_eval.cli.tables import print_table

    for row in rows:
        cells: dict[str, Any] = {"reference": row.system}
        for name, (value, low, high) in row.metrics.items():
            interval = f" [{low:.1f}, {high:.1f}]" if low is not None and high is not None else ""
            cells[name] = f"{value:.2f}" + interval
        print_table([cells], title=f"{row.task} · {row.protocol} · reference, not ranked")
        typer.echo(f"written: {row.path}")
