"""``rice-eval segmentation --engine mmseg``: a config of theirs, a record of ours."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rice_eval.errors import UsageError

if TYPE_CHECKING:
    from rice_eval.run import Result

__all__ = ["ENGINE", "other_engine"]

ENGINE: dict[str, tuple[Any, Any]] = {
    "encoder": (
        Annotated[
            list[str] | None,
            typer.Option(
                "--encoder",
                "-e",
                help="Encoder: NAME, NAME@WEIGHTS, or ADAPTER:REFERENCE. Repeatable. With --engine mmseg one NAME, in place of the "
                "config's backbone, or none.",
            ),
        ],
        None,
    ),
    "engine": (
        Annotated[str, typer.Option("--engine", help="own, or mmseg: run --config and record what comes out.")],
        "own",
    ),
    "config": (
        Annotated[Path | None, typer.Option("--config", help="mmseg: the config; --set KEY=VALUE changes it.")],
        None,
    ),
    "work_dir": (
        Annotated[Path | None, typer.Option("--work-dir", help="mmseg: where it writes logs and weights.")],
        None,
    ),
    "train": (
        Annotated[bool, typer.Option("--train/--no-train", help="mmseg: train first, or test load_from's weights.")],
        True,
    ),
}
"""Flags of ``segmentation`` beyond those of every command on one dataset: annotation and default."""

_SHARED = {"setting", "weights", "results", "report", "as_json"}
"""Flags of every command that mean the same with both engines."""


def other_engine(given: dict[str, Any], values: Mapping[str, str], defaults: Mapping[str, Any]) -> Result | None:
    """The result of ``--engine mmseg``; None where our own engine was asked for.

    Args:
        given: every flag; those of this module except ``encoder`` are taken out.
        values: ``--set`` as a mapping.
        defaults: of the flags of every command.

    Raises:
        UsageError: a flag that goes with one engine alone, given with the other; no encoder, no config.
    """
    engine, config, work_dir, train = (given.pop(name) for name in ("engine", "config", "work_dir", "train"))
    encoders: list[str] = given["encoder"] or []
    if engine not in ("own", "mmseg"):
        raise UsageError(f"--engine {engine} is not known", "choose own or mmseg")
    if engine == "own":
        if config is not None or work_dir is not None or not train:
            raise UsageError("--config, --work-dir and --no-train go with --engine mmseg", "add it, or leave them out")
        if not encoders:
            raise UsageError("no --encoder is given", "see rice-eval list encoders")
        return None
    if config is None:
        raise UsageError("--engine mmseg runs a config", "add --config CONFIG.py")
    extra = [name for name, default in defaults.items() if name not in _SHARED and given[name] != default]
    extra += [name for name, default in (("classes", None), ("dataset", "scenes")) if given[name] != default]
    if extra:
        raise UsageError(
            f"--{extra[0].replace('_', '-')} does not reach into an mmseg config", "write it into the config"
        )
    if len(encoders) > 1:
        raise UsageError("--engine mmseg runs one --encoder at a time", "start it once for each")
    if given["weights"] is not None and not encoders:
        raise UsageError(
            "--weights goes with exactly one --encoder", "or write weights=PATH into the config's backbone"
        )
    from rice_eval.openmmlab.record import evaluate_config
    from rice_eval.run import Result

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
