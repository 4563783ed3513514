"""Mean and standard deviation of an encoder's input, and where they were read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

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
    """Mean, std and notes: from ``preprocessor_config.json`` beside the weights, else the card, else the family's usual.

    Raises:
        CheckpointError: a preprocessor whose mean or std is not three numbers.
    """
    told = read_json(folder / "preprocessor_config.json") or {}
    if told.get("do_normalize", True) and "image_mean" in told and "image_std" in told:
        try:
            mean, std = _three(told["image_mean"]), _three(told["image_std"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / 'preprocessor_config.json'}: image_mean and image_std are not three numbers",
                "mend the file",
            ) from error
        carded = card.mean is None or card.std is None or (mean == card.mean and std == card.std)
        return mean, std, [] if carded else ["mean and std are the preprocessor_config.json's, not the card's"]
    if card.mean is not None and card.std is not None:
        return card.mean, card.std, []
    mean, std = _FAMILY[family]
    return mean, std, [f"mean and std are the usual ones of the family ({family})"]


def _three(values: object) -> tuple[float, float, float]:
    if not isinstance(values, list):
        raise TypeError("not a list")
    first, second, third = (float(v) for v in values)
    return first, second, third
