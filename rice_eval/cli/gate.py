"""Commands that judge: ``compare``, ``gate``, ``watch``. The first two never import torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rice_eval.errors import UsageError

if TYPE_CHECKING:
    from rice_eval.results.compare import Comparison, Side
    from rice_eval.results.gate import GateReport
    from rice_eval.results.store import StoredRecord

__all__ = ["register"]

PolicyFile = Annotated[
    Path | None,
    typer.Option("--policy", help="Policy in YAML; any significant drop fails by default.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    app.command("compare")(compare)
    app.command("gate")(gate)
    app.command("watch")(watch)


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
    from rice_eval.results.compare import Resampling
    from rice_eval.results.compare import compare as compare_sides

    if len(runs) < 2:
        raise UsageError("compare takes two runs or more", "e.g. rice-eval compare results-a results-b")
    found = _distinct([_side(run, results or [Path("results")]) for run in runs])
    tests = Resampling(resamples=resamples, permutations=permutations)
    kept = movers if panels is None else sys.maxsize  # pictures are of whichever image has one
    shown = [(other, compare_sides(found[0], other, tests, kept)) for other in found[1:]]
    pictures = {}
    if panels is not None:
        from rice_eval.report.movers import write_mover_panels

        for other, rows in shown:
            for row in rows:
                pictures[other.label, row.pair.name] = write_mover_panels(row, panels, (found[0].label, other.label))
    if as_json:
        content = [
            {"baseline": found[0].label, "run": other.label, **_plain(row, alpha, movers), "panels": [
                str(p) for p in pictures.get((other.label, row.pair.name), [])
            ]}
            for other, rows in shown
            for row in rows
        ]  # fmt: skip
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
        return
    for other, rows in shown:
        _print_comparison(found[0].label, other, rows, alpha, movers)
    for paths in pictures.values():
        for path in paths:
            typer.echo(f"panel {path}")


def _distinct(found: list[Side]) -> list[Side]:
    """Sides whose labels say which is which: with the weights' sha256, then with a number, where names are the same."""
    from dataclasses import replace

    labels = [s.label for s in found]
    out = [
        replace(s, label=f"{s.label}@{s.records[0].record.encoder.sha256[:8]}") if labels.count(s.label) > 1 else s
        for s in found
    ]
    labels = [s.label for s in out]
    return [replace(s, label=f"{s.label} ({k})") if labels.count(s.label) > 1 else s for k, s in enumerate(out, 1)]


def _side(spec: str, results: Sequence[Path]) -> Side:
    from rice_eval.registry import did_you_mean
    from rice_eval.results.compare import sides
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
    raise UsageError(f"'{wanted}' is neither a path nor an encoder with records", did_you_mean(wanted, names))


def _plain(row: Comparison, alpha: float, movers: int) -> dict[str, Any]:
    t = row.test
    return {
        "task": row.pair.task,
        "protocol": row.pair.record.protocol.id,
        "metric": row.pair.record.metric,
        "difference": row.difference,
        "low": None if t is None else t.low,
        "high": None if t is None else t.high,
        "p": None if t is None else t.p,
        "p_adjusted": row.p_adjusted,
        "test": None if t is None else t.test,
        "images": None if t is None else t.images,
        "outcome": row.outcome(alpha),
        "classes": [{"name": m.name, "a": m.a, "b": m.b} for m in row.classes[:movers]],
        "most_changed_images": [{"name": m.name, "a": m.a, "b": m.b} for m in row.images[:movers]],
    }


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
                "95 %": "" if t is None else f"[{t.low:+.2f}, {t.high:+.2f}]",
                "p": "" if row.p_adjusted is None else f"{row.p_adjusted:.3g}",
                "": row.outcome(alpha) if t is not None else "no statistics",
            }
        )
    outcomes = [row.outcome(alpha) for row in rows]
    counts = ", ".join(f"{outcomes.count(o)} {o}" for o in ("win", "tie", "loss"))
    print_table(table, f"{other.label} against {base}: {counts} (p adjusted by Holm over {len(rows)} tasks)")
    for row in rows:
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


def gate(
    baseline: Annotated[Path, typer.Option("--baseline", help="Results of the version to hold against.")],
    candidate: Annotated[Path, typer.Option("--candidate", help="Results of the new version.")],
    policy: PolicyFile = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML here.")] = None,
    summary: Annotated[
        Path | None,
        typer.Option("--summary", help="Write Markdown here; appended where it is $GITHUB_STEP_SUMMARY."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the JSON report here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON report.")] = False,
) -> None:
    """Judge a candidate. Exits with 0: pass, 1: regression, 2: unusable (missing, incomparable or damaged results)."""
    from rice_eval.results.gate import Policy, load_policy, run_gate
    from rice_eval.results.gate_output import gate_json, gate_junit, gate_markdown
    from rice_eval.results.store import read_records, write_atomic

    rules = Policy() if policy is None else load_policy(policy)
    report = run_gate(read_records([baseline]), read_records([candidate]), rules)
    for path, text in ((junit, gate_junit(report)), (output, gate_json(report))):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text.encode())
    if summary is not None:
        summary.parent.mkdir(parents=True, exist_ok=True)
        if str(summary) == os.environ.get("GITHUB_STEP_SUMMARY"):
            with summary.open("a", encoding="utf-8") as file:  # other steps write to it too
                file.write(gate_markdown(report))
        else:
            write_atomic(summary, gate_markdown(report).encode())
    if as_json:
        typer.echo(gate_json(report), nl=False)
    else:
        _print_gate(report)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _print_gate(report: GateReport) -> None:
    from rice_eval.cli.tables import print_table

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
                "detectable": "" if v.detectable is None else f"{v.detectable:.2f}",
                "why": v.reason,
            }
        )
    word = {0: "passed", 1: "REGRESSION", 2: "unusable"}[report.exit_code]
    print_table(rows, f"gate: {word}")


def watch(
    pattern: Annotated[str, typer.Argument(help="Checkpoints as a quoted glob, e.g. 'runs/a/step-*.safetensors'.")],
    encoder: Annotated[str, typer.Option("--encoder", "-e", help="Encoder whose weights the checkpoints are.")],
    task: Annotated[list[str], typer.Option("--task", "-t", help="Task to evaluate on. Repeatable.")],
    policy: PolicyFile = None,
    against: Annotated[
        str, typer.Option("--against", help="first, previous or best checkpoint so far, or a results folder.")
    ] = "first",
    protocol: Annotated[list[str] | None, typer.Option("--protocol", "-p", help="Protocol id. Repeatable.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Folder (or zip) of the data.")] = None,
    results: Annotated[Path, typer.Option("--results", help="Folder for records, watch.jsonl and curve.csv.")] = Path(
        "results"
    ),
    device: Annotated[str, typer.Option("--device", help="Torch device: cpu, cuda, cuda:1 …")] = "cpu",
    interval: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between looks.")] = 60.0,
    idle: Annotated[
        float | None, typer.Option("--idle", min=0, help="Stop after this many seconds with nothing new.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Evaluate what is there now and stop.")] = False,
) -> None:
    """Evaluate checkpoints as they appear, judge each by the gate and keep a curve. Exits like gate, by the worst one."""
    from rice_eval.results.gate import Policy, load_policy
    from rice_eval.results.store import StoredRecord
    from rice_eval.results.watch import CURVE, Step, Watch, worst
    from rice_eval.results.watch import watch as run_watch

    rules = Policy() if policy is None else load_policy(policy)

    def evaluate_one(checkpoint: Path) -> list[StoredRecord]:
        from rice_eval.run import evaluate

        done = evaluate(
            [encoder],
            task,
            weights={encoder: checkpoint},
            protocols=protocol or (),
            data=data,
            results=results,
            device=device,
        )
        return [StoredRecord(r.path, r.record) for r in done]

    def say(step: Step) -> None:
        if step.error:
            typer.echo(f"{step.checkpoint}: {step.error}", err=True)
        for verdict in step.verdicts or ([] if step.error else [{"status": "start", "task": "", "reason": ""}]):
            typer.echo(f"{step.checkpoint}: {verdict['status']} {verdict['task']} {verdict['reason']}".rstrip())

    steps = run_watch(Watch(pattern, results, rules, against, interval, idle, once), evaluate_one, say)
    if not steps:
        raise UsageError(
            f"no checkpoint matches '{pattern}'", "check the glob, and quote it so that the shell leaves it alone"
        )
    typer.echo(f"{len(steps)} checkpoints, curve in {results / CURVE}")
    code = worst(steps)
    if code:
        raise typer.Exit(code)
