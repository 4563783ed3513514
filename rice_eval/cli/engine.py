"""``rice-eval segmentation --engine mmseg`` and ``detection --engine mmdet``: a config of theirs, a record of ours."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rice_eval.errors import UsageError

if TYPE_CHECKING:
    from rice_eval.run import Result

__all__ = ["ENGINE", "THEIRS", "other_engine"]

THEIRS = {"segmentation": "mmseg", "detection": "mmdet"}
"""The engine besides our own of each kind of task."""

ENGINE: dict[str, tuple[Any, Any]] = {
    "encoder": (
        Annotated[
            list[str] | None,
            typer.Option(
                "--encoder",
                "-e",
                help="Encoder: NAME, NAME@WEIGHTS, or ADAPTER:REFERENCE. Repeatable. With another --engine one NAME, in place of the "
                "config's backbone, or none.",
            ),
        ],
        None,
    ),
    "engine": (
        Annotated[
            str,
            typer.Option(
                "--engine",
                help="own, or mmseg (segmentation) or mmdet (detection): run --config and record what comes out.",
            ),
        ],
        "own",
    ),
    "config": (
        Annotated[Path | None, typer.Option("--config", help="mmseg, mmdet: the config; --set KEY=VALUE changes it.")],
        None,
    ),
    "work_dir": (
        Annotated[Path | None, typer.Option("--work-dir", help="mmseg, mmdet: where it writes logs and weights.")],
        None,
    ),
    "train": (
        Annotated[
            bool, typer.Option("--train/--no-train", help="mmseg, mmdet: train first, or test load_from's weights.")
        ],
        True,
    ),
}
"""Flags of ``segmentation`` and ``detection`` beyond those of every command on one dataset: annotation and default."""

_SHARED = {"setting", "weights", "results", "report", "as_json"}
"""Flags of every command that mean the same with both engines."""


def other_engine(
    kind: str, given: dict[str, Any], values: Mapping[str, str], defaults: Mapping[str, Any]
) -> Result | None:
    """The result of ``--engine mmseg`` or ``mmdet``; None where our own engine was asked for.

    Args:
        kind: of the task.
        given: every flag; those of this module except ``encoder`` are taken out.
        values: ``--set`` as a mapping.
        defaults: of the flags of every command.

    Raises:
        UsageError: a flag that goes with one engine alone, given with the other; no encoder, no config.
    """
    engine, config, work_dir, train = (given.pop(name) for name in ("engine", "config", "work_dir", "train"))
    encoders: list[str] = given["encoder"] or []
    theirs = THEIRS[kind]
    if engine not in ("own", theirs):
        raise UsageError(f"--engine {engine} is not known", f"choose own or {theirs}")
    if engine == "own":
        if config is not None or work_dir is not None or not train:
            raise UsageError(
                f"--config, --work-dir and --no-train go with --engine {theirs}", "add it, or leave them out"
            )
        if not encoders:
            raise UsageError("no --encoder is given", "see rice-eval list encoders")
        return None
    if config is None:
        raise UsageError(f"--engine {theirs} runs a config", "add --config CONFIG.py")
    extra = [name for name, default in defaults.items() if name not in _SHARED and given[name] != default]
    own = {"dataset": "scenes", "classes": None, "train_json": None, "val_json": None, "images": None}
    extra += [name for name, default in own.items() if given.get(name, default) != default]
    if extra:
        raise UsageError(
            f"--{extra[0].replace('_', '-')} does not reach into a config of {theirs}", "write it into the config"
        )
    if len(encoders) > 1:
        raise UsageError(f"--engine {theirs} runs one --encoder at a time", "start it once for each")
    if given["weights"] is not None and not encoders:
        raise UsageError(
            "--weights goes with exactly one --encoder", "or write weights=PATH into the config's backbone"
        )
    from rice_eval.run import Result

    if kind == "detection":
        from rice_eval.openmmlab.detection import evaluate_detection as evaluate_config
    else:
        from rice_eval.openmmlab.run import evaluate_config
    record, path = evaluate_config(
        config,
        given["results"],
        train=train,
        options={name: _literal(value) for name, value in values.items()},
        encoder=encoders[0] if encoders else None,
        weights=given["weights"],
        work_dir=work_dir,
    )
    return Result(record, path)


def _literal(value: str) -> Any:
    """A Python literal where the text is one, else the text, as mmengine's ``--cfg-options`` reads it."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
