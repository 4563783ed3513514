"""Commands over records: ``results``, ``leaderboard``, ``published``, ``reproduce``, ``publish``; no torch."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rice_eval.errors import UsageError

if TYPE_CHECKING:
    from rice_eval.results.leaderboard import Leaderboard
    from rice_eval.results.store import StoredRecord

__all__ = ["register", "results_app"]

Roots = Annotated[
    list[Path] | None, typer.Argument(help="Results folders or record files; ./results by default.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

results_app = typer.Typer(no_args_is_help=True, help="Check, describe and migrate records.")


def register(app: typer.Typer) -> None:
    """Add this module's commands, and those of the gate, to ``app``."""
    from rice_eval.cli import gate

    app.add_typer(results_app, name="results")
    app.command("leaderboard")(leaderboard)
    app.command("published")(published)
    app.command("reproduce")(reproduce)
    app.command("publish")(publish)
    gate.register(app)


def _roots(roots: list[Path] | None) -> list[Path]:
    return roots if roots else [Path("results")]


@results_app.command("validate")
def validate(roots: Roots = None, as_json: AsJson = False) -> None:
    """Check every record: schema, hash, statistics, and its metrics against the statistics. Exits with 2 if one fails."""
    from rice_eval.results.validate import validate as check

    checked = list(check(_roots(roots)))
    bad = [c for c in checked if c.problem is not None]
    if as_json:
        rows = [{"path": str(c.path), "problem": str(c.problem) if c.problem else None} for c in checked]
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        for c in bad:
            typer.echo(str(c.problem), err=True)
        typer.echo(f"{len(checked)} records, {len(bad)} bad")
    if bad:
        raise typer.Exit(2)


@results_app.command("schema")
def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File instead of the screen.")] = None,
) -> None:
    """Print the JSON Schema of a record."""
    from rice_eval.results.validate import schema_text

    _write(schema_text(), output)


@results_app.command("migrate")
def migrate(roots: Roots = None) -> None:
    """Rewrite records of older schema versions in the current one."""
    from rice_eval.results.validate import migrate_files

    changed = migrate_files(_roots(roots))
    for path in changed:
        typer.echo(str(path))
    typer.echo(f"{len(changed)} records migrated")


@results_app.command("rebuild")
def rebuild(
    results: Annotated[Path, typer.Argument(help="Results folder.", show_default=True)] = Path("results"),
) -> None:
    """Write the folder's leaderboards/ (CSV, long CSV, Markdown, LaTeX) from its records."""
    from rice_eval.results.rebuild import rebuild as write

    for path in write(results):
        typer.echo(str(path))


def leaderboard(
    roots: Roots = None,
    format: Annotated[
        str, typer.Option("--format", "-f", help="table, csv, long-csv, markdown, latex, json or parquet.")
    ] = "table",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File instead of the screen.")] = None,
    ranks: Annotated[
        str,
        typer.Option(
            "--ranks", help="Rank intervals: paired (resample images), intervals (each record's own), or auto."
        ),
    ] = "auto",
    task: Annotated[list[str] | None, typer.Option("--task", "-t", help="Only this task. Repeatable.")] = None,
    encoder: Annotated[list[str] | None, typer.Option("--encoder", "-e", help="Only this encoder. Repeatable.")] = None,
    references: Annotated[
        bool, typer.Option("--references", help="Show printed numbers as marked rows; they are never ranked.")
    ] = False,
) -> None:
    """Rank encoders, inside each comparability key only."""
    from rice_eval.results.store import paused_collector

    with paused_collector():
        _leaderboard(_roots(roots), format, output, ranks, task, encoder, references)


def _leaderboard(
    roots: list[Path],
    format: str,
    output: Path | None,
    ranks: str,
    task: list[str] | None,
    encoder: list[str] | None,
    references: bool,
) -> None:
    from rice_eval.results import tables
    from rice_eval.results.leaderboard import build
    from rice_eval.results.published import load_published, references_of
    from rice_eval.results.store import read_records

    writers = {
        "csv": tables.wide_csv,
        "long-csv": tables.long_csv,
        "markdown": tables.markdown,
        "latex": tables.latex,
        "json": tables.long_json,
    }
    if format not in (*writers, "table", "parquet"):
        raise UsageError(
            f"--format {format} is not known", "choose table, csv, long-csv, markdown, latex, json or parquet"
        )
    if format == "parquet" and output is None:
        raise UsageError("--format parquet needs --output", "add --output leaderboard.parquet")
    stored = read_records(roots)
    names = {e.record.task.name for e in stored}
    for name in task or ():
        if name not in names:
            from rice_eval.registry import did_you_mean

            raise UsageError(f"--task {name}: no record has it", did_you_mean(name, names))
    if encoder:
        stored = _of_encoders(stored, encoder)
    stored = [e for e in stored if not task or e.record.task.name in task]
    boards = build(stored, ranks)  # type: ignore[arg-type]  # checked by build, which names the choices
    printed: dict[str, Any] = {}
    if references:
        numbers = load_published()
        printed = {board.name: references_of(board, numbers) for board in boards.boards}
    if format == "parquet":
        assert output is not None
        tables.write_parquet(boards, output, printed)
    elif format == "table":
        from rice_eval.cli.tables import print_table, table_text

        shown = _tables(boards, printed)
        if output is None:
            for rows, title in shown:
                print_table(rows, title)
        else:
            _write("".join(f"{table_text(rows, title)}\n" for rows, title in shown), output)
    else:
        _write(writers[format](boards, printed), output)


def _of_encoders(stored: list[StoredRecord], wanted: list[str]) -> list[StoredRecord]:
    """The records of some encoders, each given by its name or by the label that leaderboards show (``name@digits``)."""
    from rice_eval.results.runs import encoder_labels, of_encoder

    paths = set()
    for label in wanted:
        found = of_encoder(stored, label)
        if not found:
            from rice_eval.registry import did_you_mean

            labels = encoder_labels((e.record.encoder.name, e.record.encoder.sha256) for e in stored)
            names = {*(name for name, _ in labels), *labels.values()}
            raise UsageError(f"--encoder {label}: no record has it", did_you_mean(label, names))
        paths |= {e.path for e in found}
    return [e for e in stored if e.path in paths]


def _tables(boards: Leaderboard, printed: dict[str, Any]) -> list[tuple[list[dict[str, Any]], str]]:
    """Rows and title of each board's table."""
    out = []
    for board in boards.boards:
        rows: list[dict[str, Any]] = []
        for row in board.rows:
            interval = "" if row.low is None or row.high is None else f"[{row.low:.2f}, {row.high:.2f}]"
            rows.append(
                {
                    "rank": row.rank,
                    "of": f"{row.ranks[0]} to {row.ranks[1]}",
                    "encoder": row.encoder,
                    board.info.title: f"{row.value:.2f}",
                    "95 %": interval,
                    "seeds": len(row.seeds),
                    "params": f"{row.record.encoder.params / 1e6:.1f}M",
                }
            )
        for r in printed.get(board.name, ()):
            blank = {"rank": "", "of": "printed", "95 %": "", "seeds": "", "params": ""}
            rows.append({**blank, "encoder": f"{r.label} ({r.source})", board.info.title: f"{r.value:g}"})
        out.append((rows, f"{board.name}: {board.protocol} {board.protocol_hash}, {board.images} images"))
    return out


def published(
    encoder: Annotated[str | None, typer.Option("--encoder", "-e", help="Only names that hold this text.")] = None,
    benchmark: Annotated[
        str | None, typer.Option("--benchmark", "-b", help="Only benchmarks that hold this text.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List numbers printed in papers and repositories, each with its source."""
    import dataclasses

    from rice_eval.cli.tables import print_table
    from rice_eval.results.published import load_published

    rows = [
        r
        for r in load_published()
        if (encoder or "").lower() in r.encoder.lower() and (benchmark or "").lower() in r.benchmark.lower()
    ]
    if as_json:
        plain = [{**dataclasses.asdict(r), "recipes": [recipe.model_dump() for recipe in r.recipes]} for r in rows]
        typer.echo(json.dumps(plain, indent=2, ensure_ascii=False))
        return
    shown = ("encoder", "arch", "resolution", "kind", "protocol", "benchmark", "metric", "value", "source")
    print_table([{name: getattr(r, name) for name in shown} for r in rows])


def reproduce(
    roots: Roots = None,
    encoder: Annotated[str | None, typer.Option("--encoder", "-e", help="Only this checkpoint.")] = None,
    as_json: AsJson = False,
) -> None:
    """Printed numbers of public checkpoints against our records: the difference, and whether it lies in the interval.

    A record that does not measure what was printed (other weights, fewer images, other settings) is "not comparable", with why.
    """
    from rice_eval.cards import catalogue
    from rice_eval.cli.tables import print_table
    from rice_eval.results.published import load_published
    from rice_eval.results.reproduction import reproduce as compare_printed
    from rice_eval.results.store import read_records

    stored = read_records(roots) if roots else read_records([Path("results")]) if _has_records(Path("results")) else []
    rows = []
    for r in compare_printed(load_published(), stored, _defaults, catalogue().tasks):
        if encoder is not None and r.reference.checkpoint != encoder:
            continue
        ours = r.ours
        rows.append(
            {
                "checkpoint": r.reference.checkpoint,
                "task": r.reference.task or r.reference.benchmark,
                "protocol": r.reference.protocol,
                "our protocol": None if r.recipe is None else r.recipe.protocol,
                "metric": r.reference.metric,
                "printed": r.reference.value,
                "ours": None if ours is None else round(ours.value, 4),
                "low": None if ours is None or ours.low is None else round(ours.low, 4),
                "high": None if ours is None or ours.high is None else round(ours.high, 4),
                "difference": None if r.difference is None else round(r.difference, 4),
                "verdict": r.verdict,
                "why": r.why,
                "source": r.reference.source,
            }
        )
    if encoder is not None and not rows:
        raise UsageError(f"--encoder {encoder}: no printed number is linked to it", "rice-eval published lists all")
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        print_table(rows)


@lru_cache
def _defaults(protocol: str) -> tuple[int, dict[str, Any]] | None:
    """Version and default settings of a protocol (imports torch); None for one that is not installed."""
    import dataclasses

    from rice_eval import registry

    if protocol not in registry.protocols:
        return None
    kind: Any = registry.protocols.get(protocol)
    fields = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    return kind.version, json.loads(json.dumps(fields))


def _has_records(root: Path) -> bool:
    from rice_eval.results.store import record_files

    return (root / "records").is_dir() and bool(record_files(root))


def publish(
    target: Annotated[str, typer.Argument(help="model-index, lmms-eval, tensorboard, wandb or mlflow.")],
    roots: Roots = None,
    encoder: Annotated[str | None, typer.Option("--encoder", "-e", help="Only this encoder.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File (tensorboard: folder) instead of the screen.")
    ] = None,
    project: Annotated[str, typer.Option("--project", help="wandb project or mlflow experiment.")] = "rice-eval",
    step: Annotated[int, typer.Option("--step", help="Step of the scalars.")] = 0,
) -> None:
    """Write results where other tools read them: model cards, lmms-eval's JSON, experiment trackers."""
    from rice_eval.registry import did_you_mean
    from rice_eval.results import exports
    from rice_eval.results.store import read_records

    known = ("model-index", "lmms-eval", "tensorboard", "wandb", "mlflow")
    if target not in known:
        raise UsageError(f"'{target}' is nothing to publish to", did_you_mean(target, known))
    stored = read_records(_roots(roots))
    if encoder is not None:
        stored = _of_encoders(stored, [encoder])
    if target in ("model-index", "lmms-eval"):
        try:
            text = exports.model_index(stored) if target == "model-index" else exports.lmms_eval(stored)
        except ValueError as error:
            raise UsageError(str(error), "choose one with --encoder") from error
        _write(text, output)
    elif target == "tensorboard":
        if output is None:
            raise UsageError("tensorboard needs --output", "add --output RUNS_FOLDER")
        exports.log_tensorboard(stored, output, step)
    elif target == "wandb":
        exports.log_wandb(stored, project, step)
    else:
        exports.log_mlflow(stored, project, step)


def _write(text: str, output: Path | None) -> None:
    if output is None:
        typer.echo(text, nl=False)
        return
    from rice_eval.results.store import write_output

    write_output(output, text.encode())
