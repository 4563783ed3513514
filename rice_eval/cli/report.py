"""Commands of the page: ``report`` writes it, ``serve`` shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    app.command("report")(report)
    app.command("serve")(serve)


def report(
    results: Annotated[
        list[Path] | None,
        typer.Option("--results", help="Results folder, or a record file. Repeatable. [default: results]"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="HTML file to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option("--title", help="Title of the page.")] = "Dense vision encoders",
) -> None:
    """Write one self-contained HTML page of all records: tables, plots, pictures, protocols."""
    from rice_eval.errors import UsageError
    from rice_eval.report.html import write_report
    from rice_eval.results.store import iter_records

    if out.is_dir():
        raise UsageError(f"--out {out} is a folder", f"name a file, for instance {out / 'report.html'}")
    records = [(stored.record, stored.path) for stored in iter_records(results or [Path("results")])]
    written = write_report(records, out, title)
    typer.echo(f"{written}: {len(records)} records, {written.stat().st_size / 1e6:.1f} MB")


def serve(
    path: Annotated[Path, typer.Argument(help="The HTML page, or the folder that holds it.")] = Path("report.html"),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
) -> None:
    """Serve a page to this machine only (127.0.0.1), until Ctrl-C."""
    import contextlib

    from rice_eval.report.serve import server

    with server(path, port) as (made, url):
        typer.echo(f"{url}   (Ctrl-C ends)")
        with contextlib.suppress(KeyboardInterrupt):
            made.serve_forever()
