"""``rice-eval mllm llava``: the two stages of ``llava-next``, on one process or under ``torchrun``."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rice_eval.cli.evaluate import pairs, refuse_given
from rice_eval.environment import launched
from rice_eval.errors import UsageError
from rice_eval.registry import did_you_mean

__all__ = ["llava"]


_PARTS = ("encoder", "lm", "projector", "layer", "side")
"""Options that say what a model is put together from: ``--start`` has them from its folder."""


def llava(
    context: typer.Context,
    stage: Annotated[
        str, typer.Option("--stage", help="1 (projector alone), 2 (tower, projector, language model), or 2-lora.")
    ],
    data: Annotated[Path, typer.Option("--data", help="Conversations in LLaVA's JSON or JSON lines.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the state and, at the end, of the trained parts.")],
    images: Annotated[Path | None, typer.Option("--images", help="Folder that image paths are relative to.")] = None,
    encoder: Annotated[str | None, typer.Option("--encoder", "-e", help="Encoder: NAME or NAME@WEIGHTS.")] = None,
    lm: Annotated[
        str | None, typer.Option("--lm", help="Language model: a folder, a hub id, smollm2-135m, tiny-random.")
    ] = None,
    start: Annotated[Path | None, typer.Option("--start", help="Folder of an earlier stage to go on from.")] = None,
    projector: Annotated[
        str, typer.Option("--projector", help="linear, mlp2x_gelu, pixel-shuffle or 2x2-merge.")
    ] = "mlp2x_gelu",
    layer: Annotated[
        int, typer.Option("--layer", help="Block of the encoder, from 1, or negative from the last.")
    ] = -2,
    side: Annotated[int, typer.Option("--side", min=0, help="Pixels of a tile; the encoder's own by default.")] = 0,
    setting: Annotated[list[str] | None, typer.Option("--set", help="FIELD=VALUE of the recipe. Repeatable.")] = None,
    portion: Annotated[
        int, typer.Option("--portion", min=1, help="Conversations that run together on one device.")
    ] = 1,
    save_every: Annotated[int, typer.Option("--save-every", min=1, help="Steps between two states.")] = 500,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Less memory, more time.")] = False,
    device: Annotated[
        str, typer.Option("--device", help="Torch device; under torchrun each process has its own.")
    ] = "cpu",
) -> None:
    """Train a LLaVA-NeXT model of registry parts; a killed run goes on. Under torchrun: -m rice_eval.cli.main mllm llava …"""
    from rice_eval.mllm import llava_recipe
    from rice_eval.mllm.llava_data import LlavaData
    from rice_eval.mllm.llava_train import train
    from rice_eval.mllm.parts import Parts, load_folder, read_parts

    recipes = {"1": llava_recipe.STAGE1, "2": llava_recipe.STAGE2, "2-lora": llava_recipe.STAGE2_LORA}
    if stage not in recipes:
        raise UsageError(f"--stage {stage}: no such stage", f"choose one of {', '.join(recipes)}")
    recipe = _set(recipes[stage], pairs("--set", setting))
    tiles: Literal["crop", "anyres"] = "crop" if stage == "1" else "anyres"
    if start is not None:
        refuse_given(context, _PARTS, "says what a model is made of, and --start is a whole one")
        parts = replace(read_parts(start), tiles=tiles)
    elif encoder and lm:
        name, _, weights = encoder.partition("@")
        parts = Parts(name, lm, weights or None, projector, layer, False, tiles, side)
    else:
        raise UsageError("no model is given", "add --encoder and --lm, or --start with an earlier stage's folder")
    rank, processes = launched()
    if device == "cuda" and processes > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    read = LlavaData(data, images, plain=recipe.plain)
    mllm = load_folder(start, device, parts=parts) if start is not None else parts.build(device)

    def say(step: int, steps: int, loss: float) -> None:
        if rank == 0 and (step % 10 == 0 or step in (1, steps)):
            typer.echo(f"step {step} of {steps}: loss {loss:.4f}")

    train(
        mllm,
        recipe,
        read,
        out,
        portion=portion,
        save_every=save_every,
        checkpointing=checkpointing,
        parts=parts.facts(),
        on_step=say,
    )
    if rank == 0:
        typer.echo(f"{out}: {recipe.name}, tuned {', '.join(recipe.tuned)}; judge it with rice-eval mllm --model {out}")


def _set(recipe: Any, settings: dict[str, str]) -> Any:
    known = {f.name for f in fields(recipe)} - {"name"}
    values: dict[str, Any] = {}
    for name, text in settings.items():
        if name not in known:
            raise UsageError(f"--set {name}: recipe '{recipe.name}' has no such field", did_you_mean(name, known))
        now = getattr(recipe, name)
        try:
            values[name] = _as(text, now)
        except (TypeError, ValueError) as error:
            raise UsageError(f"--set {name}={text}: does not fit ({error})", f"its default is {now!r}") from error
    return replace(recipe, **values)


def _as(text: str, now: Any) -> Any:
    """Text as the type of the field's value; rates that are None take a number."""
    if isinstance(now, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false is asked for")
        return text.lower() == "true"
    if isinstance(now, tuple):
        return tuple(_as(item, now[0]) for item in text.split(","))
    if isinstance(now, int):
        return int(text)
    return text if isinstance(now, str) else float(text)
