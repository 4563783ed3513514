"""Facts of ``scenes`` that its renderer, its writer and its reader share: names, limits, numbering, fingerprint."""

from __future__ import annotations

import colorsys

from rice_eval.datasets.base import files_fingerprint
from rice_eval.datasets.scenes_pack import SPLITS, pack
from rice_eval.errors import UsageError

__all__ = [
    "FORMAT",
    "MAX_SIZE",
    "MIN_SIZE",
    "annotation_id",
    "check_numbers",
    "classes",
    "fingerprint",
    "palette",
    "things",
]

FORMAT = 1
"""Version of the layout of a written folder."""

MIN_SIZE, MAX_SIZE = 64, 1024
"""Sides in pixels that can be rendered: below, text is lost; above, sprites of 128 px are enlarged beyond use."""


def things() -> tuple[str, ...]:
    """Names of the instance classes: the fifteen kinds of things, then ``sign``."""
    return (*pack().classes, "sign")


def classes() -> tuple[str, ...]:
    """Names of the semantic classes: ``background`` (evaluated like the others), then ``things()``."""
    return ("background", *things())


def palette() -> tuple[tuple[int, int, int], ...]:
    """RGB a semantic class: a dark grey, hues around the wheel in two brightnesses, white for signs."""
    count = len(pack().classes)
    wheel = [colorsys.hsv_to_rgb(k / count, 0.75, 0.95 if k % 2 else 0.7) for k in range(count)]
    colours = [(round(r * 255), round(g * 255), round(b * 255)) for r, g, b in wheel]
    return ((40, 40, 40), *colours, (255, 255, 255))


def fingerprint(split: str, n: int, size: int, seed: int, generator: int, assets: str) -> str:
    """sha256 over all that decides the images and annotations of a split."""
    facts = {"dataset": "scenes", "generator": generator, "assets": assets, "seed": seed}
    return files_fingerprint([], {**facts, "split": split, "n": n, "size": size})


def check_numbers(split: str, n: int, size: int, seed: int) -> None:
    """UsageError unless the numbers describe scenes that can be made."""
    if split not in SPLITS:
        raise UsageError(f"dataset 'scenes' has no split '{split}'", f"its splits: {', '.join(SPLITS)}")
    if not 1 <= n <= 1_000_000:
        raise UsageError(f"dataset 'scenes': {n} scenes of split '{split}'", "ask for 1 to 1000000")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise UsageError(f"dataset 'scenes': size {size}", f"give {MIN_SIZE} to {MAX_SIZE} pixels a side")
    if not 0 <= seed < 1 << 32:
        raise UsageError(f"dataset 'scenes': seed {seed}", "give 0 to 4294967295")


def annotation_id(index: int, owner: int) -> int:
    """The COCO annotation id of object ``owner`` (from 1) of scene ``index``: unique in a split, never 0."""
    return index * 16 + owner
