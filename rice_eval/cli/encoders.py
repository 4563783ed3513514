"""``rice-eval encoders``: what a checkpoint is, and writing it in another layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rice_eval.errors import UsageError

__all__ = ["app"]

app = typer.Typer(help="Say what a checkpoint is; write it in another layout.", no_args_is_help=True)


@app.command("inspect")
def inspect_command(
    path: Annotated[
        str, typer.Argument(help="a file, folder or glob; FILE::KEY picks one state dict of a training file")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Say family, layout, numbers, and the keys that would be missing or unexpected. Reads headers, not weights."""
    from rice_eval.adapters.inspect import inspect

    found = inspect(path)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
        return
    typer.echo("\n".join(_lines(found.as_dict())))


def _lines(data: dict[str, Any]) -> list[str]:
    shown = [
        (k, v)
        for k, v in data.items()
        if k not in ("missing", "unexpected", "shapes", "problems", "loads") and v not in (None, "")
    ]
    lines = [
        f"{key:<12}{f'{value:,}' if key == 'params' else ', '.join(value) if isinstance(value, tuple) else value}"
        for key, value in shown
    ]
    for key, words in (("missing", "missing"), ("unexpected", "unexpected"), ("shapes", "other shape")):
        keys = data[key]
        if keys is None:
            lines.append(f"{words:<12}not compared: its own library does that when it loads")
        else:
            lines.append(
                f"{words:<12}{len(keys)}"
                + (": " + ", ".join(keys[:5]) + (", …" if len(keys) > 5 else "") if keys else "")
            )
    lines += [f"{'problem':<12}{problem}" for problem in data["problems"]]
    if data["missing"] is not None:
        lines.append(f"{'loads':<12}{'yes' if data['loads'] else 'no'}")
    return lines


@app.command("convert")
def convert_command(
    path: Annotated[str, typer.Argument(help="a file, folder or glob")],
    out: Annotated[Path, typer.Option("--out", help="folder to write")],
    to: Annotated[str, typer.Option("--to", help="hf (a folder transformers loads) or cloc")] = "hf",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="KEY=VALUE that neither tensors nor config.json tell, e.g. heads=16, act=quick_gelu"
        ),
    ] = None,
    names: Annotated[
        Path | None, typer.Option("--names", help="for cloc: a JSON object of regular expression -> replacement")
    ] = None,
) -> None:
    """Write a checkpoint in another layout, tensors bit for bit."""
    from rice_eval.adapters.checkpoints import read_json
    from rice_eval.adapters.conversion import convert

    rules = None
    if names is not None:
        rules = read_json(names)
        if rules is None:
            raise UsageError(f"--names {names}: no such file", "check the path")
        if not all(isinstance(v, str) for v in rules.values()):
            raise UsageError(f"--names {names}: not an object of strings", 'write {"^their\\\\.": "image."}')
    typer.echo(f"wrote {convert(path, out, to, settings=_pairs(settings or []), names=rules)}")


def _pairs(pairs: list[str]) -> dict[str, Any]:
    """KEY=VALUE with numbers read as numbers."""
    out: dict[str, Any] = {}
    for pair in pairs:
        key, mark, value = pair.partition("=")
        if not mark or not key or not value:
            raise UsageError(f"--set {pair}: not KEY=VALUE", "for example --set heads=16")
        out[key] = value
        for read in (float, int):
            try:
                out[key] = read(value)
            except ValueError:
                continue
    return out
