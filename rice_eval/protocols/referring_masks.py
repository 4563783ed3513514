"""Masks that a model predicted elsewhere, against a dataset's referring expressions."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from rice_eval.datasets.base import Dataset
from rice_eval.datasets.detection import CocoDetection
from rice_eval.errors import DataError
from rice_eval.metrics.referring import mask_overlap, read_mask_predictions
from rice_eval.results.bootstrap import intervals

__all__ = ["score_masks"]


def score_masks(dataset: Dataset, predictions: Path, resamples: int = 2000) -> dict[str, Any]:
    """cIoU and gIoU of a file of predicted masks.

    Args:
        dataset: a set whose ``instances`` has a row, a mask and an id an expression (RefCOCO, +, g).
        predictions: see ``read_mask_predictions``. ``image_id`` is the image's name, or its number in the annotation file;
            ``ref_id`` is the sentence's id (``sent_id`` of the references).
        resamples: of the intervals.

    Returns:
        ``metrics`` name -> value, low and high in percent; ``expressions``, ``images``, ``fingerprint`` of the split and ``sha256`` of the file.

    Raises:
        DataError: a set without masks, an expression without a prediction, a prediction of no expression, masks of another size.
    """
    found = read_mask_predictions(predictions)
    ids = [dataset.image_id(i) for i in range(len(dataset))]
    names = {name: name for name in ids}
    if isinstance(dataset, CocoDetection):
        names |= {str(key): ids[i] for i, key in enumerate(dataset.image_keys)}
    given = {}
    for (image, ref), mask in found.items():
        if image not in names:
            raise DataError(f"{predictions}: image {image} is not in split '{dataset.split}'", "check --split")
        given[names[image], ref] = mask
    rows, masks, truth, lost = [], [], [], []
    for index, name in enumerate(ids):
        asked = dataset.instances(index)
        if asked.masks is None:
            raise DataError(f"dataset '{dataset.name}' was read without masks", "leave out --option masks=false")
        for ref, mask in zip(asked.ids.tolist(), asked.masks):
            if (name, ref) not in given:
                lost.append((name, ref))
                continue
            rows.append(index)
            masks.append(given.pop((name, ref)))
            truth.append(mask)
    if lost:
        raise DataError(
            f"{predictions}: {len(lost)} expressions have no prediction, the first is {lost[0][1]} of image {lost[0][0]}",
            "write null for an empty mask",
        )
    if given:
        name, ref = next(iter(given))
        raise DataError(f"{predictions}: image {name} has no expression {ref}", "check --option by= and --split")
    try:
        statistics = mask_overlap(ids, np.array(rows, dtype=np.int64), masks, truth)
    except ValueError as error:
        raise DataError(f"{predictions}: {error}", "predict at the image's own size") from error
    bounds = intervals(statistics, resamples=resamples)
    metrics = {
        name: {"value": value, "low": bounds[name][0], "high": bounds[name][1]}
        for name, value in statistics.point().items()
    }
    return {
        "metrics": metrics,
        "expressions": len(rows),
        "images": len(ids),
        "fingerprint": dataset.fingerprint,
        "sha256": hashlib.sha256(predictions.read_bytes()).hexdigest(),
    }
