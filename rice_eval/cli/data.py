"""``rice-eval data``: check a copy of a dataset, make the embedded one on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from rice_eval.errors import UsageError
from rice_eval.progress import Advance, Reporter

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)
make = typer.Typer(no_args_is_help=True)
app.add_typer(make, name="make", help="Write an embedded dataset to disk.")

SHOWN = 20
"""Findings of a kind that are printed; --json has them all."""


@app.command("check")
def check_copy(
    name: Annotated[str, typer.Argument(help="Dataset, see rice-eval list datasets.")],
    data: Annotated[Path | None, typer.Option("--data", help="Folder, zip or tar of the data.")] = None,
    split: Annotated[list[str] | None, typer.Option("--split", help="Split; repeatable. The usual ones.")] = None,
    classes: Annotated[str | None, typer.Option("--classes", help="Class set, where there are several.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="NAME=VALUE for the dataset's reader. Repeatable.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Decode every image, not a sample.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is missing or malformed in your copy of a dataset. Exit code 0: clean, 2: problems."""
    from rice_eval.datasets.check import check
    from rice_eval.progress import progress

    options: dict[str, Any] = {"classes": classes} if classes is not None else {}
    for item in option or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UsageError(f"--option '{item}' is not NAME=VALUE", "write it like --option classes=super")
        options[key] = value
    with progress() as report:
        findings = check(name, data, options, split or (), full, _stepper(report))
    problems = [f for f in findings if f.level == "problem"]
    notes = [f for f in findings if f.level == "note"]
    if as_json:
        found = [asdict(f) for f in findings]
        typer.echo(json.dumps({"dataset": name, "clean": not problems, "findings": found}, indent=1))
    else:
        for level, group in (("problem", problems), ("note", notes)):
            for f in group[:SHOWN]:
                where = f"{f.split}/{f.image}" if f.image else f.split
                typer.echo(f"{level}: {where}: {f.what}; {f.fix}")
            if len(group) > SHOWN:
                typer.echo(f"… and {len(group) - SHOWN} more {level}s (--json prints all)")
        sampled = "every image" if full else "every annotation and a sample of the images"
        typer.echo(f"{name}: {len(problems)} problems, {len(notes)} notes in {sampled}")
    if problems:
        raise typer.Exit(2)


@make.command("scenes")
def make_scenes(
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist yet, or be empty.")],
    n_train: Annotated[int, typer.Option("--n-train", min=1, help="Scenes in train.")] = 300,
    n_val: Annotated[int, typer.Option("--n-val", min=1, help="Scenes in val.")] = 150,
    size: Annotated[int, typer.Option("--size", help="Side of the images in pixels.")] = 224,
    seed: Annotated[int, typer.Option("--seed", help="Which set of scenes.")] = 0,
) -> None:
    """Write the embedded benchmark to disk in COCO's layout."""
    from rice_eval.datasets.scenes_write import write_scenes
    from rice_eval.progress import progress

    with progress() as report:
        written = write_scenes(out, n_train, n_val, size, seed, _stepper(report))
    typer.echo(str(written))


def _stepper(report: Reporter) -> Callable[[str, int, int], None]:
    """A bar a split, opened with its first step."""
    bars: dict[str, Advance] = {}

    def step(split: str, done: int, total: int) -> None:
        if split not in bars or done == 1:
            bars[split] = report(split, total)
        bars[split](1)

    return step
