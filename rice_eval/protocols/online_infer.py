"""Inference of the online recipes: windows batched across images, logits averaged as mmseg does, scales and mirrors averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from rice_eval.datasets.base import Dataset
from rice_eval.protocols.segmentation import label_map, scaled_logits
from rice_eval.views import Frame, View

__all__ = ["averaged_views", "check_scales", "mean_colour", "segment"]

IMAGES_AT_ONCE = 4
"""Images whose windows wait for one another: bounds memory."""
WINDOWS_AT_ONCE = 16
"""Windows of one size in a forward."""


LARGEST_SCALE = 100.0
"""Of test-time augmentation; images beyond it fit no memory."""


def check_scales(scales: Sequence[float]) -> None:
    """ValueError unless there is a scale and an image can be tested at each."""
    if not scales or not all(0 < scale <= LARGEST_SCALE for scale in scales):
        raise ValueError(f"scales needs at least one value, each above 0 and at most {LARGEST_SCALE:g}")


def mean_colour(mean: Sequence[float]) -> tuple[int, int, int]:
    """An encoder's mean in [0, 1] as 8-bit RGB: what padding is filled with, 0 after normalisation up to rounding."""
    red, green, blue = (round(255 * m) for m in mean)
    return red, green, blue


def averaged_views(view: str, patch: int, scales: Sequence[float], flip: bool) -> tuple[View, ...]:
    """The views that are averaged: the base's side at each scale, each followed by its mirror image where asked for."""
    base = View.parse(view).resolve(patch)
    scaled = [replace(base, side=max(1, int(base.side * s)), crop=base.crop) for s in scales]
    return tuple(v for one in scaled for v in ((one, replace(one, flip=not one.flip)) if flip else (one,)))


def segment(
    dataset: Dataset,
    indices: Sequence[int],
    views: Sequence[View],
    fill: tuple[int, int, int],
    logits_of: Callable[[Tensor], Tensor],
    squeeze: bool,
    forwards: Callable[[int], None],
) -> Iterator[tuple[int, NDArray[np.int16]]]:
    """Predict images one after the other.

    Args:
        dataset: where images come from.
        indices: which ones.
        views: one view gives the argmax of its logits; several the argmax of their mean softmax, as mmseg's test-time
            augmentation.
        fill: colour of padding.
        logits_of: ``(B, 3, h, w)`` images in [0, 1] to ``(B, C, gh, gw)`` logits.
        squeeze: see ``scaled_logits``.
        forwards: told how many windows each forward had.

    Yields:
        index and ``(H, W)`` classes.
    """
    for start in range(0, len(indices), IMAGES_AT_ONCE):
        group = indices[start : start + IMAGES_AT_ONCE]
        frames: dict[tuple[int, int], list[Frame]] = {}
        buckets: dict[tuple[int, int], list[tuple[tuple[int, int], int, NDArray[np.uint8]]]] = {}
        for index in group:
            image = dataset.image(index)
            for number, view in enumerate(views):
                for place, (window, frame) in enumerate(view.apply(image, fill)):
                    frames.setdefault((index, number), []).append(frame)
                    buckets.setdefault(frame.size, []).append(((index, number), place, window))
        found: dict[tuple[int, int], dict[int, Tensor]] = {key: {} for key in frames}
        for waiting in buckets.values():
            for first in range(0, len(waiting), WINDOWS_AT_ONCE):
                batch = waiting[first : first + WINDOWS_AT_ONCE]
                images = torch.from_numpy(np.stack([window for _, _, window in batch])).permute(0, 3, 1, 2)
                with torch.no_grad():
                    logits = logits_of(images.float() / 255)
                forwards(len(batch))
                for (key, place, _), part in zip(batch, logits):
                    found[key][place] = part
        for index in group:
            size = dataset.size(index)
            parts = []
            for number in range(len(views)):
                key = (index, number)
                parts.append(
                    scaled_logits([found[key][k] for k in range(len(frames[key]))], frames[key], squeeze=squeeze)
                )
            yield index, _labels(parts, size)


def _labels(parts: Sequence[Tensor], size: tuple[int, int]) -> NDArray[np.int16]:
    if len(parts) == 1:
        labels: NDArray[np.int16] = label_map(parts[0], size).cpu().numpy()
        return labels
    total = torch.zeros(parts[0].shape[0], *size, device=parts[0].device)
    for part in parts:
        total += F.interpolate(part[None], size=size, mode="bilinear", align_corners=False)[0].softmax(dim=0)
    return total.argmax(dim=0).to(torch.int16).cpu().numpy()
