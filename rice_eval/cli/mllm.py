"""``rice-eval mllm``: the encoder inside a multimodal language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rice_eval.cli.evaluate import pairs, refuse_given
from rice_eval.cli.mllm_train import llava
from rice_eval.cli.shown import show_results
from rice_eval.errors import UsageError

__all__ = ["register"]

TRAINING = ("lm", "recipe", "setting", "bank", "batch_size", "limit_train", "trust_remote_code")
"""Options that say how a projector is trained: none of them means anything beside ``--model``."""


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    group = typer.Typer(
        help="The encoder inside a multimodal language model: train a projector, judge, record.",
        invoke_without_command=True,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    group.callback()(evaluate)
    group.command("task")(task)
    group.command("averages")(averages)
    group.command("llava")(llava)
    app.add_typer(group, name="mllm")


def evaluate(
    context: typer.Context,
    encoder: Annotated[
        list[str] | None, typer.Option("--encoder", "-e", help="Encoder: NAME or NAME@WEIGHTS. Repeatable.")
    ] = None,
    lm: Annotated[
        str, typer.Option("--lm", help="Language model: smollm2-135m, tiny-random, a folder, a .gguf file or a hub id.")
    ] = "smollm2-135m",
    recipe: Annotated[str, typer.Option("--recipe", help="How it is trained: perception-probe.")] = "perception-probe",
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="Task of kind mllm; scenes-vqa by default. Repeatable.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="A trained probe's .files folder, or a LLaVA checkpoint: judge it, train nothing."
        ),
    ] = None,
    lmms_python: Annotated[
        Path | None, typer.Option("--lmms-python", help="Python of the environment that has lmms-eval, to judge by it.")
    ] = None,
    judge: Annotated[
        str, typer.Option("--judge", help="auto (lmms-eval where it is installed), rice-eval, or lmms-eval.")
    ] = "auto",
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="FIELD=VALUE of the recipe; part of its hash. Repeatable.")
    ] = None,
    results: Annotated[Path, typer.Option("--results", "--out", help="Folder that records go to.")] = Path("results"),
    bank: Annotated[Path | None, typer.Option("--bank", help="Folder of the bank of tokens.")] = None,
    device: Annotated[str, typer.Option("--device", help="Torch device: cpu, cuda, cuda:1 …")] = "cpu",
    dtype: Annotated[
        str, typer.Option("--dtype", help="With --model: its language model's type: float32, bfloat16, float16.")
    ] = "float32",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images a forward of the encoder.")] = 16,
    limit_train: Annotated[
        int | None, typer.Option("--limit-train", min=1, help="Only this many training images.")
    ] = None,
    limit_test: Annotated[int | None, typer.Option("--limit-test", min=1, help="Only this many test images.")] = None,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Data-parallel processes of lmms-eval.")] = 1,
    include: Annotated[
        list[Path] | None, typer.Option("--include", help="Folder with more cards or code. Repeatable.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let code shipped with a checkpoint run on this machine.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write leaderboards and the page when done.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")] = False,
) -> None:
    """Put encoders into a multimodal language model and see what it sees, with the image and without."""
    if context.invoked_subcommand is not None:
        return
    names = [name if "/" in name else f"mllm/{name}" for name in task or ("scenes-vqa",)]
    if model is not None:
        if encoder:
            raise UsageError("--model is a whole model and takes no --encoder", "give one of the two")
        from rice_eval.mllm_run import judge_model

        refuse_given(context, TRAINING, "says how a projector is trained, and --model trains none")
        done = judge_model(
            model,
            names,
            judge=judge,
            lmms_python=lmms_python,
            results=results,
            device=device,
            dtype=dtype,
            limit=limit_test,
            processes=processes,
            include=tuple(include or ()),
        )
    else:
        if not encoder:
            raise UsageError("no encoder is given", "add --encoder NAME, or --model for a trained model")
        refuse_given(context, ("processes", "dtype"), "is for judging with --model")
        from rice_eval.mllm_run import train_and_judge

        done = train_and_judge(
            encoder,
            names,
            recipe=recipe,
            settings=_settings(context, lm, pairs("--set", setting)),
            judge=judge,
            lmms_python=lmms_python,
            results=results,
            bank=bank,
            device=device,
            batch_size=batch_size,
            limit_train=limit_train,
            limit_test=limit_test,
            include=include or (),
            trust_remote_code=trust_remote_code,
        )
    show_results(done, as_json)
    if report and done:
        from rice_eval.publish import publish

        for label, path in publish(results).items():
            if not as_json:
                typer.echo(f"{label}: {path}")


def _settings(context: typer.Context, lm: str, given: dict[str, Any]) -> dict[str, Any]:
    """Fields of the recipe: ``--lm`` and those of ``--set``, which may name it instead, but not as well."""
    if "lm" in given:
        refuse_given(context, ("lm",), "and --set lm= both name a language model")
    return {"lm": lm, **given}


def task(
    out: Annotated[Path, typer.Option("--out", help="Folder to write to; give it to lmms-eval as --include_path.")],
    name: Annotated[str, typer.Option("--task", "-t", help="Task whose questions are written.")] = "mllm/scenes-vqa",
    train: Annotated[bool, typer.Option("--train", help="Also the training split, in LLaVA's format.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only this many images a split.")] = None,
) -> None:
    """Write an embedded task's questions and images as a local task of lmms-eval."""
    from rice_eval.mllm_run import write_local_task

    path, written = write_local_task(name if "/" in name else f"mllm/{name}", out, train=train, limit=limit)
    typer.echo(f"lmms-eval --model rice_eval --model_args model=DIR --tasks {written} --include_path {path}")


def averages(
    results: Annotated[
        Path | None, typer.Option("--results", help="Folder of records; printed cells by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Averages over benchmarks, from cells: of your records, or of RICE's Table 1 beside the averages printed with it."""
    from rice_eval.cli.tables import print_table
    from rice_eval.mllm.averages import averages_of_records, table_1

    rows: list[dict[str, Any]]
    if results is None:
        rows = [
            {
                "encoder": f"{r.encoder} {r.arch}",
                "px": r.resolution,
                "model": r.protocol,
                "ocr": round(r.ocr, 2),
                "ocr printed": r.ocr_printed,
                "ocr reprinted": r.ocr_reprinted,
                "other": round(r.other, 2),
                "other reprinted": r.other_reprinted,
                "other, cognition / 6": round(r.other_printed_rule, 2),
                "other printed": r.other_printed,
            }
            for r in table_1()
        ]
    else:
        rows = averages_of_records(results)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        print_table(rows)
