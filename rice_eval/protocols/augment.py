"""Training views of the published recipes: random scale, crop, flip and colours, on uint8 images and their labels.

Every function takes its randomness from a generator that is handed in, so a sample is a function of (seed, step, slot) alone: a
resumed run and a run on another number of processes see the same crops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional as tv

from rice_eval.datasets.base import IGNORE
from rice_eval.views import resize

__all__ = ["AUGMENTS", "Augment", "AugmentName", "colours", "from_hsv", "resize_labels", "to_hsv"]

Image = NDArray[np.uint8]
Labels = NDArray[np.int64]
AugmentName = Literal["mmseg", "dinov3", "vfm", "none"]
AUGMENTS: tuple[AugmentName, ...] = ("mmseg", "dinov3", "vfm", "none")


@dataclass(frozen=True)
class Augment:
    """Numbers of a training view.

    ==========  =========================================================================================================
    ``mmseg``   mmseg's ``RandomResize`` (short side; OpenCV's filters), ``RandomCrop``, ``RandomFlip``,
                ``PhotoMetricDistortion``, padding right and below
    ``dinov3``  the same order with Pillow's antialiased filters and torchvision's saturation and hue
    ``vfm``     benchmark-vfm-ss: torchvision's colours, flip, ``ScaleJitter`` (the whole image fits the crop at scale 1), padding,
                a crop that holds at least one label
    ``none``    not made here: the online engine then trains on the test view
    ==========  =========================================================================================================

    Attributes:
        kind: one of the above.
        side: pixels of the side that is scaled.
        ratios: range of the random scale.
        crop: pixels a side of the crop.
        cat_max_ratio: of the labelled pixels, the share that one class may fill before the crop is drawn again (10 times);
            1 accepts any crop. ``vfm`` does not read it.
        flip: probability of mirroring.
        brightness: of the shift, in levels of 255.
        contrast, saturation: ranges of the factors are 1 minus and plus these.
        hue: of the shift, in turns of the colour wheel.
        fill: RGB of padded pixels.
    """

    kind: AugmentName
    side: int
    ratios: tuple[float, float]
    crop: int
    cat_max_ratio: float
    flip: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    fill: tuple[int, int, int]

    def __call__(self, image: Image, labels: Labels, rng: np.random.Generator) -> tuple[Image, Labels]:
        """``(H, W, 3)`` and ``(H, W)`` to ``(crop, crop, 3)`` and ``(crop, crop)``; ``IGNORE`` where padded."""
        if self.kind == "vfm":
            image = colours(self, image, rng)
            image, labels = _flip(image, labels, self.flip, rng)
            image, labels = self._scaled(image, labels, rng)
            image, labels = self._padded(image, labels)
            return self._any_label(image, labels, rng)
        image, labels = self._scaled(image, labels, rng)
        image, labels = self._cropped(image, labels, rng)
        image, labels = _flip(image, labels, self.flip, rng)
        return self._padded(colours(self, image, rng), labels)

    def _scaled(self, image: Image, labels: Labels, rng: np.random.Generator) -> tuple[Image, Labels]:
        height, width = labels.shape
        low, high = self.ratios
        ratio = low + rng.random() * (high - low)
        if self.kind == "vfm":
            scale = ratio * min(self.side / height, self.side / width)
            size = (max(1, int(height * scale)), max(1, int(width * scale)))
        else:
            scale = int(self.side * ratio) / min(height, width)
            size = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
        plain = self.kind == "mmseg"
        return resize(image, size, "plain" if plain else "bilinear"), resize_labels(labels, size, centred=not plain)

    def _corner(self, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[int, int]:
        top, left = (int(rng.integers(0, max(side - self.crop, 0) + 1)) for side in shape[:2])
        return top, left

    def _cropped(self, image: Image, labels: Labels, rng: np.random.Generator) -> tuple[Image, Labels]:
        top, left = self._corner(labels.shape, rng)
        if self.cat_max_ratio < 1:
            for _ in range(10):
                cut = labels[top : top + self.crop, left : left + self.crop]
                counts = np.unique(cut[cut != IGNORE], return_counts=True)[1]
                if len(counts) > 1 and counts.max() / counts.sum() < self.cat_max_ratio:
                    break
                top, left = self._corner(labels.shape, rng)
        window = np.s_[top : top + self.crop, left : left + self.crop]
        return image[window], labels[window]

    def _any_label(self, image: Image, labels: Labels, rng: np.random.Generator) -> tuple[Image, Labels]:
        labelled = bool((labels != IGNORE).any())
        while True:
            top, left = self._corner(labels.shape, rng)
            window = np.s_[top : top + self.crop, left : left + self.crop]
            if not labelled or bool((labels[window] != IGNORE).any()):
                return image[window], labels[window]

    def _padded(self, image: Image, labels: Labels) -> tuple[Image, Labels]:
        height, width = labels.shape
        below, right = max(0, self.crop - height), max(0, self.crop - width)
        if not below and not right:
            return image, labels
        grown = np.empty((height + below, width + right, 3), dtype=np.uint8)
        grown[:] = np.asarray(self.fill, dtype=np.uint8)
        grown[:height, :width] = image
        return grown, np.pad(labels, ((0, below), (0, right)), constant_values=IGNORE)


def resize_labels(labels: Labels, size: tuple[int, int], centred: bool) -> Labels:
    """Nearest neighbours: at pixel centres as Pillow, or at floor(k * full / wanted) as OpenCV."""
    half = 1 if centred else 0
    rows, cols = (((2 * np.arange(wanted) + half) * full) // (2 * wanted) for full, wanted in zip(labels.shape, size))
    out: Labels = labels[rows[:, None], cols[None, :]]
    return out


def _flip(image: Image, labels: Labels, share: float, rng: np.random.Generator) -> tuple[Image, Labels]:
    if rng.random() < share:
        return np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(labels[:, ::-1])
    return image, labels


def colours(augment: Augment, image: Image, rng: np.random.Generator) -> Image:
    """Brightness, contrast, saturation and hue, each with probability 1/2, contrast first or last by the flip of a coin."""

    def chance() -> bool:
        return bool(rng.integers(2))

    def factor(spread: float) -> float:
        return float(rng.uniform(1 - spread, 1 + spread))

    def contrast(img: Image) -> Image:
        if not chance():
            return img
        by = factor(augment.contrast)
        return _tv(tv.adjust_contrast, img, by) if augment.kind == "vfm" else _levels(img, by, 0.0)

    if chance():
        if augment.kind == "vfm":
            image = _tv(tv.adjust_brightness, image, factor(augment.brightness / 255))
        else:
            image = _levels(image, 1.0, float(rng.uniform(-augment.brightness, augment.brightness)))
    first = chance()
    if first:
        image = contrast(image)
    if chance():
        by = factor(augment.saturation)
        image = _saturated(image, by) if augment.kind == "mmseg" else _tv(tv.adjust_saturation, image, by)
    if chance():
        image = _hued(image, augment.hue, augment.kind, rng)
    return image if first else contrast(image)


def _tv(adjust: Any, image: Image, by: float) -> Image:
    out: Image = adjust(torch.from_numpy(np.array(image)).permute(2, 0, 1), by).permute(1, 2, 0).numpy()
    return out


def _levels(image: NDArray[Any], factor: float, shift: float) -> Image:
    # Truncated, not rounded: so does mmseg's PhotoMetricDistortion.
    out: Image = np.clip(image.astype(np.float32) * np.float32(factor) + np.float32(shift), 0, 255).astype(np.uint8)
    return out


def _saturated(image: Image, factor: float) -> Image:
    hsv = to_hsv(image)
    hsv[..., 1] = _levels(hsv[..., 1], factor, 0.0)
    return from_hsv(hsv)


def _hued(image: Image, spread: float, kind: AugmentName, rng: np.random.Generator) -> Image:
    if kind != "mmseg":
        return _tv(tv.adjust_hue, image, float(rng.uniform(-spread, spread)))
    # mmseg turns OpenCV's 8-bit hue (180 levels a turn) by a whole number of levels; the upper end is left out.
    levels = round(spread * 180)
    if not levels:
        return image
    hsv = to_hsv(image)
    hsv[..., 0] = (hsv[..., 0].astype(np.int64) + int(rng.integers(-levels, levels))) % 180
    return from_hsv(hsv)


def to_hsv(image: Image) -> Image:
    """RGB to OpenCV's 8-bit HSV: hue 0 to 179 (two degrees a level), saturation and value 0 to 255."""
    rgb = image.astype(np.float32)
    value, low = rgb.max(axis=-1), rgb.min(axis=-1)
    spread = value - low
    safe = np.where(spread > 0, spread, 1)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    hue = np.where(
        value == red, (green - blue) / safe,
        np.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )  # fmt: skip
    level = np.rint(np.where(spread > 0, hue, np.float32(0)) * 30) % 180
    saturation = np.rint(255 * spread / np.where(value > 0, value, 1))
    return np.stack([level, saturation, value], axis=-1).astype(np.uint8)


def from_hsv(hsv: Image) -> Image:
    """OpenCV's 8-bit HSV to RGB."""
    hue = hsv[..., 0].astype(np.float32) / np.float32(30)
    saturation = hsv[..., 1].astype(np.float32) / np.float32(255)
    value = hsv[..., 2].astype(np.float32)
    sector = np.floor(hue)
    share = hue - sector
    p = value * (1 - saturation)
    q = value * (1 - saturation * share)
    t = value * (1 - saturation * (1 - share))
    which = sector.astype(np.int64) % 6
    red = np.choose(which, [value, q, p, p, t, value])
    green = np.choose(which, [t, value, value, q, p, p])
    blue = np.choose(which, [p, p, t, value, value, q])
    out: Image = np.rint(np.stack([red, green, blue], axis=-1)).astype(np.uint8)
    return out
