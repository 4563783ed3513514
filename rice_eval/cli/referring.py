"""Command ``referring-masks``: cIoU and gIoU of the masks that any model predicted for referring expressions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this module's command to ``app``."""
    app.command("referring-masks")(referring_masks)


def referring_masks(
    predictions: Annotated[
        Path, typer.Option("--predictions", help="JSON lines: image_id, ref_id, segmentation (run lengths, or null).")
    ],
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Dataset with expressions and masks.")] = "refcoco",
    data: Annotated[Path | None, typer.Option("--data", help="Folder (or zip) of the data.")] = None,
    split: Annotated[str, typer.Option("--split", help="Split the predictions are of.")] = "val",
    option: Annotated[
        list[str] | None, typer.Option("--option", help="NAME=VALUE for the dataset's reader, e.g. set=refcoco+.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Score masks predicted for referring expressions by any model (LISA's cIoU and gIoU), with intervals."""
    from rice_eval.cli.evaluate import pairs
    from rice_eval.datasets import load_dataset
    from rice_eval.protocols.referring_masks import score_masks

    found = score_masks(load_dataset(dataset, split, data, pairs("--option", option)), predictions)
    if as_json:
        typer.echo(json.dumps(found, sort_keys=True))
        return
    from rice_eval.cli.tables import print_table

    cells = {
        name: f"{m['value']:.2f} [{m['low']:.1f}, {m['high']:.1f}]" for name, m in sorted(found["metrics"].items())
    }
    title = f"{dataset} {split} · {found['expressions']} expressions in {found['images']} images"
    print_table([{"predictions": predictions.name, **cells}], title=title)
