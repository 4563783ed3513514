"""Scaling of images as the processors of multimodal models do it."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Scaler", "crop_square", "pad_square", "scale", "smart_size"]

Pixels = NDArray[np.uint8]
Scaler = Literal["pil", "torchvision"]
_PIL = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def scale(pixels: Pixels, size: tuple[int, int], scaler: Scaler, resample: str) -> Pixels:
    """``(H, W, 3)`` uint8 to ``(*size, 3)`` uint8, antialiased.

    ``pil`` is what LLaVA trained with, ``torchvision`` what transformers 5 runs by default; on uint8 some pixels differ by one
    level.
    """
    if pixels.shape[:2] == size:
        return pixels
    if scaler == "pil":
        return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), _PIL[resample]), dtype=np.uint8)
    from torchvision.transforms.v2 import InterpolationMode, functional

    mode = InterpolationMode.BICUBIC if resample == "bicubic" else InterpolationMode.BILINEAR
    planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    out = functional.resize(planes, list(size), interpolation=mode, antialias=True)
    return np.asarray(out.numpy(), dtype=np.uint8).transpose(1, 2, 0)


def crop_square(pixels: Pixels, side: int, scaler: Scaler, resample: str) -> Pixels:
    """Shorter side to ``side``, then the centre (CLIPImageProcessor: the longer side is rounded down)."""
    height, width = pixels.shape[:2]
    if height <= width:
        size = (side, int(side * width / height))
    else:
        size = (int(side * height / width), side)
    scaled = scale(pixels, size, scaler, resample)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return scaled[top : top + side, left : left + side]


def pad_square(pixels: Pixels, mean: tuple[float, float, float]) -> Pixels:
    """Padded to a square with the mean colour, image in the middle (LLaVA-1.5, ``expand2square``)."""
    height, width = pixels.shape[:2]
    side = max(height, width)
    out = np.empty((side, side, 3), dtype=np.uint8)
    out[:] = np.array([int(255 * m) for m in mean], dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    out[top : top + height, left : left + width] = pixels
    return out


def smart_size(size: tuple[int, int], factor: int, pixel_range: tuple[int, int]) -> tuple[int, int]:
    """The image's own size, sides rounded to multiples of ``factor``, pixels kept within ``pixel_range`` (Qwen2-VL).

    Args:
        size: ``(H, W)``.
        factor: pixels a merged token covers.
        pixel_range: fewest (at least 1) and most pixels.
    """
    height, width = size
    fewest, most = pixel_range
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > most:
        shrink = math.sqrt(height * width / most)
        h, w = (max(factor, math.floor(s / shrink / factor) * factor) for s in size)
    elif h * w < fewest:
        grow = math.sqrt(fewest / (height * width))
        h, w = (math.ceil(s * grow / factor) * factor for s in size)
    return h, w
