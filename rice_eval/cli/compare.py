"""``compare``: runs over the same images, task by task; no torch."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rice_eval.errors import UsageError

if TYPE_CHECKING:
    from rice_eval.report.movers import MoverPanels
    from rice_eval.results.compare import Comparison, Pair, Side
    from rice_eval.results.store import StoredRecord

__all__ = ["compare"]


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(help="Two or more of: results folder, record file, FOLDER:ENCODER, or an encoder in --results."),
    ],
    results: Annotated[list[Path] | None, typer.Option("--results", help="Where encoders given by name are.")] = None,
    movers: Annotated[int, typer.Option("--movers", min=0, help="Classes and images shown a task.")] = 5,
    panels: Annotated[
        Path | None, typer.Option("--panels", help="Folder for pictures of the images that changed most.")
    ] = None,
    alpha: Annotated[float, typer.Option("--alpha", min=1e-6, max=0.5, help="Level for wins and losses.")] = 0.05,
    resamples: Annotated[int, typer.Option("--resamples", min=100, help="Bootstrap resamples.")] = 2000,
    permutations: Annotated[int, typer.Option("--permutations", min=100, help="Swaps of the permutation test.")] = 5000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare runs over the same images: difference, interval and p a task, and what moved. The first run is the baseline."""
    from rice_eval.results.compare import Resampling, left_out
    from rice_eval.results.compare import compare as compare_sides

    if len(runs) < 2:
        raise UsageError("compare takes two runs or more", "e.g. rice-eval compare results-a results-b")
    found = _distinct([_side(run, results or [Path("results")]) for run in runs], runs)
    tests = Resampling(resamples=resamples, permutations=permutations, alpha=alpha)
    kept = movers if panels is None else sys.maxsize  # pictures are of whichever image has one
    shown = [(other, compare_sides(found[0], other, tests, kept), left_out(found[0], other)) for other in found[1:]]
    pictures: dict[tuple[str, str], MoverPanels] = {}
    if panels is not None:
        from rice_eval.report.movers import write_mover_panels

        for other, rows, _ in shown:
            for row in rows:
                pictures[other.label, row.pair.name] = write_mover_panels(row, panels, (found[0].label, other.label))
    if as_json:
        content = []
        for other, rows, alone in shown:
            both = {"baseline": found[0].label, "run": other.label}
            for row in rows:
                drawn = pictures.get((other.label, row.pair.name))
                files = [] if drawn is None else [str(path) for path in drawn.files]
                content.append({**both, **_plain(row, alpha, movers), "panels": files})
            content += [{**both, **_plain_alone(pair)} for pair in alone]
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        for other, rows, alone in shown:
            _print_comparison(found[0].label, other, rows, alpha, movers)
            for pair in alone:
                typer.echo(f"left out: {pair.name}: {pair.problems[0]}")
        for drawn in pictures.values():
            for path in drawn.files:
                typer.echo(f"panel {path}")
    for (_, name), drawn in pictures.items():
        if drawn.missing:
            typer.echo(f"warning: {name}: {drawn.sentence()}", err=True)


def _distinct(found: list[Side], runs: Sequence[str]) -> list[Side]:
    """Sides whose labels say which is which: with the weights' sha256, then as they were given, then with a number."""
    from dataclasses import replace

    from rice_eval.results.runs import encoder_labels

    weights = [(s.records[0].record.encoder.name, s.records[0].record.encoder.sha256) for s in found]
    labels = encoder_labels(weights)
    names = [labels[key] for key in weights]
    names = [f"{name} ({run})" if names.count(name) > 1 else name for name, run in zip(names, runs)]
    names = [f"{name} ({k})" if names.count(name) > 1 else name for k, name in enumerate(names, 1)]
    return [replace(side, label=name) for side, name in zip(found, names)]


def _side(spec: str, results: Sequence[Path]) -> Side:
    from rice_eval.registry import did_you_mean
    from rice_eval.results.compare import sides
    from rice_eval.results.runs import of_encoder
    from rice_eval.results.store import read_records

    folder, colon, label = spec.rpartition(":")
    if Path(spec).exists():
        found, wanted = sides(read_records([spec])), None
    elif colon and Path(folder).exists():
        found, wanted = sides(read_records([folder])), label
    else:
        here = [r for r in results if r.exists()]
        if not here:
            raise UsageError(
                f"'{spec}' is no path, and there is no results folder to find an encoder in", "check the path"
            )
        found, wanted = sides(read_records(here)), spec
    names = [s.label for s in found]
    if wanted is None:
        if len(found) > 1:
            raise UsageError(
                f"{spec} holds several encoders: {', '.join(names[:6])}", f"say which, e.g. {spec}:{names[0]}"
            )
        return found[0]
    for side in found:
        if side.label == wanted:
            return side
    for side in found:  # a name with digits of the sha256, as another table printed it
        if of_encoder(side.records, wanted):
            return side
    raise UsageError(f"'{wanted}' is neither a path nor an encoder with records", did_you_mean(wanted, names))


def _plain(row: Comparison, alpha: float, movers: int) -> dict[str, Any]:
    t = row.test
    return {
        "task": row.pair.task,
        "protocol": row.pair.record.protocol.id,
        "metric": row.pair.record.metric,
        "difference": row.difference,
        "low": None if t is None else _finite(t.low),
        "high": None if t is None else _finite(t.high),
        "p": None if t is None else t.p,
        "p_adjusted": row.p_adjusted,
        "test": None if t is None else t.test,
        "images": None if t is None else t.images,
        "notes": [] if t is None else list(t.notes),
        "outcome": row.outcome(alpha),
        "classes": [{"name": m.name, "a": m.a, "b": m.b} for m in row.classes[:movers]],
        "most_changed_images": [{"name": m.name, "a": m.a, "b": m.b} for m in row.images[:movers]],
    }


def _plain_alone(pair: Pair) -> dict[str, Any]:
    """What one side alone has: no numbers, and why."""
    record = pair.record
    return {
        "task": pair.task,
        "protocol": record.protocol.id,
        "metric": record.metric,
        "outcome": "left out",
        "reason": pair.problems[0],
    }


def _finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def _print_comparison(base: str, other: Side, rows: Sequence[Comparison], alpha: float, movers: int) -> None:
    from rice_eval.cli.tables import print_table

    table = []
    for row in rows:
        t = row.test
        table.append(
            {
                "task": row.pair.name,
                base: f"{_value(row, 'a'):.2f}",
                other.label: f"{_value(row, 'b'):.2f}",
                "difference": f"{row.difference:+.2f}",
                "95 %": "" if t is None else f"[{t.low:+.2f}, {t.high:+.2f}]" if math.isfinite(t.low) else "unknown",
                "p": "" if row.p_adjusted is None else f"{row.p_adjusted:.3g}",
                "": row.outcome(alpha) if t is not None else "no statistics",
            }
        )
    outcomes = [row.outcome(alpha) for row in rows]
    counts = ", ".join(f"{outcomes.count(o)} {o}" for o in ("win", "tie", "loss"))
    print_table(table, f"{other.label} against {base}: {counts} (p adjusted by Holm over {len(rows)} tasks)")
    for row in rows:
        for note in () if row.test is None else row.test.notes:
            typer.echo(f"{row.pair.name}: {note}")
        for what, moved in (("class", row.classes[:movers]), ("image", row.images[:movers])):
            if moved:
                lines = [
                    {what: m.name, "baseline": f"{m.a:.2f}", "now": f"{m.b:.2f}", "change": f"{m.difference:+.2f}"}
                    for m in moved
                ]
                typer.echo(f"{row.pair.name}: {what} that moved most")
                print_table(lines)


def _value(row: Comparison, side: str) -> float:
    entries: Sequence[StoredRecord] = getattr(row.pair, side)
    return sum(e.record.headline.value for e in entries) / len(entries)
