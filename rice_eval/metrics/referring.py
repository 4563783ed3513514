"""Referring expressions: box accuracy at IoU 0.5, and the cIoU and gIoU of predicted masks.

cIoU is the ratio of summed intersections to summed unions over all expressions; gIoU is the mean of each expression's IoU, where an
expression without a target scores 1 if nothing is predicted and 0 otherwise (LISA, arXiv 2308.00692; ``utils/utils.py`` of its code).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rice_eval.errors import DataError
from rice_eval.metrics.coco_match import box_iou
from rice_eval.metrics.runs import check_runs, decode_runs
from rice_eval.metrics.statistics import RatioStatistics

__all__ = ["box_accuracy", "mask_overlap", "read_mask_predictions"]

Masks = Mapping[str, Any]
"""COCO run lengths: ``{"size": [H, W], "counts": …}``."""


def box_accuracy(
    image_ids: Sequence[str],
    image: NDArray[np.int64],
    found: NDArray[np.float64],
    truth: NDArray[np.float64],
    iou: float = 0.5,
) -> RatioStatistics:
    """Share of expressions whose box overlaps the target by ``iou`` or more (RefCOCO's accuracy).

    Args:
        image_ids: N names.
        image: ``(n,)`` image of each expression.
        found, truth: ``(n, 4)`` xyxy boxes; a row of NaN is no answer, and wrong.
    """
    if not len(image) == len(found) == len(truth):
        raise ValueError(f"{len(image)} expressions, {len(found)} boxes and {len(truth)} targets must agree")
    none = np.zeros(1, bool)
    pairs = zip(np.nan_to_num(found), truth)
    right = np.array([box_iou(f[None], t[None], none)[0, 0] >= iou for f, t in pairs], dtype=float)
    hits = np.bincount(image, weights=right, minlength=len(image_ids)).astype(np.float64)
    totals = np.bincount(image, minlength=len(image_ids)).astype(float)
    return RatioStatistics(tuple(image_ids), hits[:, None], totals[:, None], ("accuracy",))


def mask_overlap(
    image_ids: Sequence[str], image: NDArray[np.int64], found: Sequence[Masks | None], truth: Sequence[Masks | None]
) -> RatioStatistics:
    """``ciou`` and ``giou`` of predicted masks.

    Args:
        image_ids: N names.
        image: ``(n,)`` image of each expression.
        found, truth: n masks; None for an empty one.

    Raises:
        ValueError: numbers or sizes of masks that differ.
    """
    from pycocotools import mask as coco_mask

    if not len(image) == len(found) == len(truth):
        raise ValueError(f"{len(image)} expressions, {len(found)} masks and {len(truth)} targets must agree")
    up, down = np.zeros((len(image_ids), 2)), np.zeros((len(image_ids), 2))
    for row, f, t in zip(image.tolist(), found, truth):
        if f is not None and t is not None and list(f["size"]) != list(t["size"]):
            raise ValueError(f"image {image_ids[row]}: masks of {list(f['size'])} and {list(t['size'])} pixels")
        areas = [float(coco_mask.area(dict(m))) if m is not None else 0.0 for m in (f, t)]
        both = (
            float(coco_mask.area(coco_mask.merge([dict(f), dict(t)], True))) if f is not None and t is not None else 0.0
        )
        union = sum(areas) - both
        up[row] += (both, both / union if union else 1.0)
        down[row] += (union, 1.0)
    return RatioStatistics(tuple(image_ids), up, down, ("ciou", "giou"))


def read_mask_predictions(path: Path) -> dict[tuple[str, int], Masks | None]:
    """Predicted masks from a file: a line of JSON an expression, of any model that writes LISA-like results.

    ``{"image_id": "…", "ref_id": 7, "segmentation": {"size": [H, W], "counts": "…"}}``; null for an empty mask.

    Returns:
        (image, expression) -> mask.

    Raises:
        DataError: a file that can't be read, or a line that is malformed or repeated; it is named.
    """
    out: dict[tuple[str, int], Masks | None] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error})", "check the path") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            key = (str(entry["image_id"]), int(entry["ref_id"]))
            mask = entry["segmentation"]
            if mask is not None:
                height, width = (int(v) for v in mask["size"])
                counts = mask["counts"]
                # pycocotools would loop without end over two masks of which one has too few runs.
                check_runs(counts if isinstance(counts, list) else decode_runs(counts), height, width)
                if isinstance(counts, list):
                    from pycocotools import mask as coco_mask

                    mask = coco_mask.frPyObjects(mask, height, width)
                else:
                    mask = {"size": [height, width], "counts": str(counts).encode("ascii")}
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            fix = "a line is an object with image_id, ref_id and segmentation (COCO run lengths, or null)"
            raise DataError(f"{path}:{number}: malformed ({type(error).__name__}: {error})", fix) from error
        if key in out:
            raise DataError(f"{path}:{number}: expression {key[1]} of image {key[0]} is there twice", "remove one")
        out[key] = mask
    return out
