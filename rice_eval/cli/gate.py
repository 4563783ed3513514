"""``gate``, without torch; and what registers it beside ``compare`` and ``watch``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rice_eval.cli import compare, watch
from rice_eval.errors import RiceEvalError

if TYPE_CHECKING:
    from rice_eval.results.gate import GateReport

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands that judge to ``app``."""
    app.command("compare")(compare.compare)
    app.command("gate")(gate)
    app.command("watch")(watch.watch)


def gate(
    baseline: Annotated[Path, typer.Option("--baseline", help="Results of the version to hold against.")],
    candidate: Annotated[Path, typer.Option("--candidate", help="Results of the new version.")],
    policy: Annotated[
        Path | None,
        typer.Option("--policy", help="Policy in YAML; any significant drop fails by default.", show_default=False),
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML here.")] = None,
    summary: Annotated[
        Path | None,
        typer.Option("--summary", help="Write Markdown here; appended where it is $GITHUB_STEP_SUMMARY."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the JSON report here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON report.")] = False,
) -> None:
    """Judge a candidate. Exits with 0: pass, 1: regression, 2: unusable (missing, incomparable or damaged results)."""
    from rice_eval.results.gate import GateReport, run_gate
    from rice_eval.results.gate_output import gate_json
    from rice_eval.results.policy import Policy, load_policy
    from rice_eval.results.store import read_records

    rules = Policy()
    try:
        if policy is not None:
            rules = load_policy(policy)
        report = run_gate(read_records([baseline]), read_records([candidate]), rules)
    except RiceEvalError as error:
        # What CI shows is made of these files: they say it too.
        _write(GateReport((), rules, problem=str(error)), junit, summary, output)
        if as_json:
            typer.echo(gate_json(GateReport((), rules, problem=str(error))), nl=False)
        raise
    _write(report, junit, summary, output)
    if as_json:
        typer.echo(gate_json(report), nl=False)
    else:
        _print_gate(report)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _write(report: GateReport, junit: Path | None, summary: Path | None, output: Path | None) -> None:
    from rice_eval.results.gate_output import gate_json, gate_junit, gate_markdown
    from rice_eval.results.store import write_output

    for path, text in ((junit, gate_junit(report)), (output, gate_json(report))):
        if path is not None:
            write_output(path, text.encode())
    if summary is None:
        return
    if str(summary) == os.environ.get("GITHUB_STEP_SUMMARY"):
        with summary.open("a", encoding="utf-8") as file:  # other steps write to it too
            file.write(gate_markdown(report))
    else:
        write_output(summary, gate_markdown(report).encode())


def _print_gate(report: GateReport) -> None:
    from rice_eval.cli.tables import print_table
    from rice_eval.results.gate_output import detectable_text

    rows = []
    for v in report.verdicts:
        t = v.test
        rows.append(
            {
                "result": v.status,
                "encoder": v.encoder,
                "task": v.pair.name,
                "baseline": "" if t is None else f"{t.a:.2f}",
                "candidate": "" if t is None else f"{t.b:.2f}",
                "difference": "" if t is None else f"{t.difference:+.2f} [{t.low:+.2f}, {t.high:+.2f}]",
                "detectable": detectable_text(v.detectable, ".2f"),
                "why": v.reason,
            }
        )
    word = {0: "passed", 1: "REGRESSION", 2: "unusable"}[report.exit_code]
    print_table(rows, f"gate: {word}")
    for text in report.warnings:
        typer.echo(f"warning: {text}", err=True)
