"""``watch``: checkpoints of a training run as they appear."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rice_eval.errors import UsageError

__all__ = ["watch"]


def watch(
    pattern: Annotated[str, typer.Argument(help="Checkpoints as a quoted glob, e.g. 'runs/a/step-*.safetensors'.")],
    encoder: Annotated[str, typer.Option("--encoder", "-e", help="Encoder whose weights the checkpoints are.")],
    task: Annotated[list[str], typer.Option("--task", "-t", help="Task to evaluate on. Repeatable.")],
    policy: Annotated[
        Path | None,
        typer.Option("--policy", help="Policy in YAML; any significant drop fails by default.", show_default=False),
    ] = None,
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
    from rice_eval.results.policy import Policy, load_policy
    from rice_eval.results.store import StoredRecord
    from rice_eval.results.watch import CURVE, Step, Watch, worst
    from rice_eval.results.watch import watch as run_watch
    from rice_eval.run import plan_of

    rules = Policy() if policy is None else load_policy(policy)
    # A slip in a name is no checkpoint's fault: it is said before the first one is waited for.
    plan_of([encoder], task, protocols=protocol or (), data=data)

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

    used = f" by {', '.join(sorted(set(protocol)))}" if protocol else ""
    name = f"{encoder} on {', '.join(sorted(set(task)))}{used}"
    settings = Watch(pattern, results, rules, against, interval, idle, once, run=name, encoder=encoder)
    steps = run_watch(settings, evaluate_one, say)
    if not steps:
        raise UsageError(
            f"no checkpoint matches '{pattern}'", "check the glob, and quote it so that the shell leaves it alone"
        )
    typer.echo(f"{len(steps)} checkpoints, curve in {results / CURVE}")
    code = worst(steps)
    if code:
        raise typer.Exit(code)
