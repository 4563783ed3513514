"""Command ``sweep``: curves over shares of the labels, layers and resolutions, from one bank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rice_eval.cli import evaluate as flags
from rice_eval.errors import UsageError

if TYPE_CHECKING:
    from rice_eval.results.sweeps import SweepPoint

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this module's command to ``app``."""
    app.command("sweep")(sweep)


def sweep(
    kind: Annotated[str, typer.Argument(help="labels, layers or resolution.")],
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            "--encoder", "-e", help="Encoder to run. Repeatable; without one, curves of what --results holds."
        ),
    ] = None,
    value: Annotated[
        list[str] | None,
        typer.Option(
            "--value", "-v", help="A share (1/64, all), a set of layers (all, last4, quarters) or a view. Repeatable."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="labels: splits of each share.")] = 5,
    dataset: flags.DatasetName = "scenes",
    data: flags.Data = None,
    option: flags.ReaderOptions = None,
    classes: Annotated[str | None, typer.Option(help="Class set, where the dataset has several (e.g. super).")] = None,
    protocol: flags.Protocols = None,
    view: flags.ViewOption = None,
    setting: flags.Settings = None,
    results: flags.Results = Path("results"),
    bank: flags.BankRoot = None,
    device: flags.Device = "cpu",
    batch_size: flags.BatchSize = 16,
    workers: flags.Workers = None,
    limit_train: flags.LimitTrain = None,
    limit_test: flags.LimitTest = None,
    include: flags.Include = None,
    report: flags.Page = True,
    format: Annotated[str, typer.Option("--format", "-f", help="table, csv or json (a line a point).")] = "table",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for csv or json, beside the table.")
    ] = None,
) -> None:
    """A metric against the share of labels, the layer or the resolution: runs what is missing from one bank, prints the curve."""
    from rice_eval.results import sweeps
    from rice_eval.results.store import iter_records, write_atomic

    if kind not in sweeps.KINDS:
        raise UsageError(f"there is no sweep over '{kind}'", f"choose {', '.join(sweeps.KINDS)}")
    if format not in ("table", "csv", "json"):
        raise UsageError(f"--format {format} is not known", "choose table, csv or json")
    if encoder:
        from rice_eval.sweep import sweep as run

        done = run(
            kind,
            encoder,
            value or (),
            seeds=seeds,
            protocols=protocol or ("linear",),
            settings=flags.pairs("--set", setting),
            view=view,
            results=results,
            run_options={"bank": bank, "device": device, "batch_size": batch_size, "workers": workers},
            dataset=dataset,
            data=flags.folders(data),
            options={**flags.pairs("--option", option), **({"classes": classes} if classes else {})},
            limit_train=limit_train,
            limit_test=limit_test,
            include=include or (),
        )
        records = [result.record for result in done]
    else:
        records = [stored.record for stored in iter_records([results])]
    points = sweeps.sweep_points(records, kind)
    if not points:
        raise UsageError(
            f"no records here make a curve over {kind}", "name encoders to run with -e, and at least two values"
        )
    text = sweeps.sweep_json(points) if format == "json" else sweeps.sweep_csv(points)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, text.encode())
    if format == "table":
        _print(points)
    elif output is None:
        typer.echo(text, nl=False)
    if encoder and report:
        from rice_eval.publish import publish

        files = publish(results)
        if format == "table":
            typer.echo(f"page: {files['page']}")


def _print(points: list[SweepPoint]) -> None:
    from rice_eval.cli.tables import print_table
    from rice_eval.results.sweeps import KINDS

    boards: dict[tuple[str, str, str, str], list[SweepPoint]] = {}
    for p in points:
        boards.setdefault((p.task, p.protocol, p.metric, "" if p.sweep == "resolution" else p.view), []).append(p)
    for (task, protocol, metric, view), members in boards.items():
        names = {p.name: None for p in sorted(members, key=lambda p: p.x)}
        rows: dict[str, dict[str, str]] = {}
        for p in members:
            row = rows.setdefault(p.encoder, {"encoder": p.encoder, **dict.fromkeys(names, "")})
            row[p.name] = f"{p.value:.2f}" + ("" if p.sd is None else f" ± {p.sd:.2f}")
        parts = [task, protocol, *([view] if view else []), f"{metric} by {KINDS[members[0].sweep]}"]
        print_table(list(rows.values()), title=" · ".join(parts))
