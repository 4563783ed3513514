"""What a recipe leaves behind, and putting it back into a model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rice_eval.adapters.checkpoints import few
from rice_eval.errors import CheckpointError, UsageError
from rice_eval.mllm.llava_recipe import Recipe
from rice_eval.mllm.model import Mllm
from rice_eval.mllm.projector import Projector

__all__ = ["TOLD", "load_trained", "save_trained"]

#: What a finished training says of itself.
TOLD = "trained.json"
_FILES = {"tower": "tower.safetensors", "newline": "newline.safetensors", "lm": "lm.safetensors"}


def save_trained(mllm: Mllm, folder: Path, facts: dict[str, Any]) -> None:
    """Write the parts that were ever tuned: ``projector.safetensors``, ``tower.safetensors``, ``newline.safetensors``, ``lm.safetensors``
    (LoRA's maps merged in), and ``trained.json``, which comes last and says what they are.

    Args:
        mllm: after training.
        folder: made where it is not there.
        facts: JSON values to keep beside (recipe, data, losses, the model before).

    Raises:
        UsageError: the folder can't be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if "projector" in _tuned(mllm.tuned):
            mllm.projector.save(folder / "projector.safetensors")
        for part, tensors in _parts(mllm, mllm.tuned).items():
            _write(folder / _FILES[part], save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}))
        told = {**facts, "stages": [r.facts() for r in mllm.tuned], "trained": mllm.facts()}
        _write(folder / TOLD, json.dumps(told, indent=1, sort_keys=True).encode())
    except OSError as error:
        raise UsageError(f"{folder}: can't be written to ({error.strerror})", "choose another folder") from error


def _tuned(stages: Sequence[Recipe]) -> set[str]:
    return {part for recipe in stages for part in recipe.tuned}


def _parts(mllm: Mllm, stages: Sequence[Recipe]) -> dict[str, dict[str, Tensor]]:
    """All tuned tensors but the projector's."""
    out: dict[str, dict[str, Tensor]] = {}
    tuned = _tuned(stages)
    if "tower" in tuned:
        out["tower"] = dict(mllm.encoder.tunable().state_dict())
    if "newline" in tuned and mllm.newline is not None:
        out["newline"] = {"image_newline": mllm.newline}
    if tuned & {"lm", "lm-lora"}:
        out["lm"] = _untied(mllm)
    return out


def _untied(mllm: Mllm) -> dict[str, Tensor]:
    """The language model's weights, tied ones once."""
    seen: set[int] = set()
    out = {}
    for name, tensor in mllm.lm.model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            out[name] = tensor
    return out


def load_trained(mllm: Mllm, folder: Path) -> dict[str, Any]:
    """Put trained parts into a model built from the same parts.

    Args:
        mllm: changed in place.
        folder: written by ``save_trained``.

    Returns:
        ``trained.json``: recipe, stages, data, losses.

    Raises:
        CheckpointError: a folder that is not whole, or parts that do not fit this model.
    """
    try:
        told: dict[str, Any] = json.loads((folder / TOLD).read_text())
        stages = [Recipe(**{**r, "tuned": tuple(r["tuned"]), "betas": tuple(r["betas"])}) for r in told["stages"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: holds no finished training ({type(error).__name__})", "let the recipe end"
        ) from error
    if "projector" in _tuned(stages):
        mllm.projector = Projector.load(folder / "projector.safetensors", mllm.sight.width, mllm.lm.width).to(
            mllm.device
        )
        mllm.projector.requires_grad_(False)
    for part, have in _parts(mllm, stages).items():
        tensors = _read(folder / _FILES[part])
        odd = sorted(set(have) ^ set(tensors)) or [n for n in have if have[n].shape != tensors[n].shape]
        if odd:
            raise CheckpointError(
                f"{folder / _FILES[part]}: does not fit the model's {part} ({few(odd)})", "build it from the same parts"
            )
        with torch.no_grad():
            for name, tensor in have.items():
                tensor.copy_(tensors[name])
    for recipe in stages:
        mllm.retuned(recipe)
    return told


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: can't be read ({str(error)[:120]})", "train it again") from error


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
