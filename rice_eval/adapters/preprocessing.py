"""Mean and standard deviation of an encoder's input, and where they were read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from rice_eval.adapters.checkpoints import read_json
from rice_eval.cards import EncoderCard
from rice_eval.errors import CheckpointError

__all__ = ["CLIP", "HALF", "IMAGENET", "Stats", "mean_and_std"]

Stats = tuple[tuple[float, float, float], tuple[float, float, float]]
#: openai/CLIP, clip/clip.py
CLIP: Stats = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
#: google/siglip-*, preprocessor_config.json
HALF: Stats = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
#: torchvision's classification recipes
IMAGENET: Stats = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_FAMILY: dict[str, Stats] = {"clip": CLIP, "half": HALF, "imagenet": IMAGENET}


def mean_and_std(
    folder: Path, card: EncoderCard, family: Literal["clip", "half", "imagenet"]
) -> tuple[tuple[float, float, float], tuple[float, float, float], list[str]]:
    """Mean, std and notes: from the preprocessor's file beside the weights, else the card, else the family's usual.

    The file is ``preprocessor_config.json``, or ``processor_config.json`` where a whole processor was saved by transformers 5.

    Raises:
        CheckpointError: a preprocessor whose numbers can't be.
    """
    for name, inside in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        told = read_json(folder / name) or {}
        told = told if inside is None else told.get(inside) or {}
        found = _of_processor(told, folder / name)
        if found is not None:
            carded = card.mean is None or card.std is None or found == (card.mean, card.std)
            return *found, [] if carded else [f"mean and std are the {name}'s, not the card's"]
    if card.mean is not None and card.std is not None:
        return card.mean, card.std, []
    mean, std = _FAMILY[family]
    return mean, std, [f"mean and std are the usual ones of the family ({family})"]


def _of_processor(told: Any, path: Path) -> Stats | None:
    """What a processor does to values 0 to 255, as mean and std of values 0 to 1; None where it does not say."""
    normalises = isinstance(told, dict) and told.get("do_normalize", True)
    if not isinstance(told, dict) or (normalises and "image_mean" not in told and "image_std" not in told):
        return None
    if not told:
        return None
    try:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if normalises:
            mean, std = _three(told.get("image_mean")), _three(told.get("image_std"))
        scale = 255 * float(told.get("rescale_factor", 1 / 255)) if told.get("do_rescale", True) else 255.0
        if not min(std) > 0 or not 0 < scale < math.inf or not all(map(math.isfinite, (*mean, *std))):
            raise ValueError("out of range")
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: image_mean and image_std are not three numbers each, or not positive ({error})", "mend the file"
        ) from error
    if abs(scale - 1) < 1e-6:
        return mean, std
    return _divided(mean, scale), _divided(std, scale)


def _divided(values: tuple[float, float, float], by: float) -> tuple[float, float, float]:
    return values[0] / by, values[1] / by, values[2] / by


def _three(values: object) -> tuple[float, float, float]:
    if not isinstance(values, list):
        raise TypeError("not a list")
    first, second, third = (float(v) for v in values)
    return first, second, third
