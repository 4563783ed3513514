"""Intersection over union of label maps, from per-image areas.

IoU, accuracy and their means are ratios of areas summed over images (mmseg's ``IoUMetric`` and PASCAL VOC's evaluation
define them so), so three areas a class and image are enough for any weighting of images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rice_eval.metrics.statistics import Floats, Statistics

__all__ = ["IoUStatistics", "areas_of", "confusion", "scores"]

Areas = NDArray[np.int64]

_BLOCK = 1024
"""Rows of weights scored at once: bounds the memory of ``IoUStatistics.values`` to a few megabytes."""


def confusion(
    prediction: NDArray[np.integer[Any]], truth: NDArray[np.integer[Any]], classes: int, ignore: int
) -> Areas:
    """Confusion matrix of one image.

    Args:
        prediction: labels, any shape, all in 0 to C - 1 where the truth counts.
        truth: labels of the same shape; pixels of ``ignore`` drop out, whatever was predicted there.
        classes: C.
        ignore: the label that counts nowhere.

    Returns:
        ``(C, C)`` pixels, truth by row, prediction by column.

    Raises:
        ValueError: shapes that differ, or a label outside 0 to C - 1.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} differ in shape")
    keep = truth != ignore
    kept_truth = truth[keep].astype(np.int64)
    kept_prediction = prediction[keep].astype(np.int64)
    for name, labels in (("truth", kept_truth), ("prediction", kept_prediction)):
        if labels.size and (labels.min() < 0 or labels.max() >= classes):
            worst = int(labels.max()) if labels.max() >= classes else int(labels.min())
            raise ValueError(f"{name} has label {worst}, classes are 0 to {classes - 1}")
    counts = np.bincount(kept_truth * classes + kept_prediction, minlength=classes * classes)
    return counts.reshape(classes, classes).astype(np.int64)


def areas_of(matrix: Areas) -> Areas:
    """``(C, C)`` confusion matrix (truth by row) to ``(3, C)`` areas: intersection, prediction, label."""
    return np.stack([np.diagonal(matrix), matrix.sum(axis=0), matrix.sum(axis=1)])


def scores(areas: Floats) -> dict[str, Floats]:
    """Metrics of summed areas.

    Args:
        areas: ``(..., 3, C)`` intersection, prediction and label areas, in any unit.

    Returns:
        ``miou``, ``pixel_accuracy`` and ``mean_accuracy``, each ``(...)`` in percent: the mean IoU runs over classes whose union
        is not empty (a class that is predicted but never labelled counts as 0), the mean accuracy over classes that are
        labelled. NaN where nothing is labelled or predicted.
    """
    intersect, predicted, label = areas[..., 0, :], areas[..., 1, :], areas[..., 2, :]
    union = predicted + label - intersect
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "miou": 100.0 * _mean_where(intersect / union, union > 0),
            "pixel_accuracy": 100.0 * intersect.sum(axis=-1) / label.sum(axis=-1),
            "mean_accuracy": 100.0 * _mean_where(intersect / label, label > 0),
        }


def _mean_where(values: Floats, keep: NDArray[np.bool_]) -> Floats:
    mean: Floats = np.where(keep, values, 0.0).sum(axis=-1) / keep.sum(axis=-1)
    return mean


class IoUStatistics(Statistics):
    """Areas of N images and C classes.

    Args:
        image_ids: N names.
        areas: ``(N, 3, C)`` pixels: intersection, prediction, label.
        classes: C names.
        matrix: ``(C, C)`` confusion matrix of the whole set, truth by row.

    Raises:
        ValueError: shapes that do not fit, a class name twice, or areas that the matrix does not add up to.
    """

    kind: ClassVar[str] = "iou"

    def __init__(self, image_ids: Sequence[str], areas: Areas, classes: Sequence[str], matrix: Areas) -> None:
        self.image_ids = tuple(image_ids)
        self.classes = tuple(classes)
        self.areas = np.asarray(areas, dtype=np.int64)
        self.matrix = np.asarray(matrix, dtype=np.int64)
        count = len(self.classes)
        if self.areas.shape != (len(self.image_ids), 3, count) or self.matrix.shape != (count, count):
            raise ValueError("areas must be (images, 3, classes) and the matrix (classes, classes)")
        if len(set(self.classes)) != count:
            raise ValueError("a class name occurs twice")
        if not np.array_equal(self.areas.sum(axis=0), areas_of(self.matrix)):
            raise ValueError("the confusion matrix does not add up to the areas")

    def values(self, weights: Floats) -> dict[str, Floats]:
        """See ``Statistics.values``. Exact for whole weights: sums of whole numbers below 2^53."""
        weights = np.asarray(weights, dtype=np.float64)
        flat = self.areas.reshape(len(self), -1).astype(np.float64)
        blocks: dict[str, list[Floats]] = {"miou": [], "pixel_accuracy": [], "mean_accuracy": []}
        for start in range(0, weights.shape[0], _BLOCK):
            summed = (weights[start : start + _BLOCK] @ flat).reshape(-1, 3, len(self.classes))
            for name, part in scores(summed).items():
                blocks[name].append(part)
        return {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in blocks.items()}

    def per_class(self) -> dict[str, dict[str, float]]:
        """``iou`` and ``accuracy`` a class in percent; NaN for a class that is neither labelled nor predicted (not labelled)."""
        intersect, predicted, label = self.areas.sum(axis=0).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            iou = 100.0 * intersect / (predicted + label - intersect)
            accuracy = 100.0 * intersect / label
        return {
            "iou": dict(zip(self.classes, iou.tolist())),
            "accuracy": dict(zip(self.classes, accuracy.tolist())),
        }

    def concat(self, other: Statistics) -> IoUStatistics:
        """See ``Statistics.concat``."""
        if not isinstance(other, IoUStatistics) or other.classes != self.classes:
            raise ValueError("the two sets have different classes")
        return IoUStatistics(
            self.image_ids + other.image_ids,
            np.concatenate([self.areas, other.areas]),
            self.classes,
            self.matrix + other.matrix,
        )

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """See ``Statistics.arrays``."""
        return {
            "image_ids": np.array(self.image_ids, dtype=np.str_),
            "classes": np.array(self.classes, dtype=np.str_),
            "areas": self.areas,
            "matrix": self.matrix,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> IoUStatistics:
        """See ``Statistics.from_arrays``."""
        return cls(
            tuple(str(i) for i in arrays["image_ids"]),
            np.asarray(arrays["areas"], dtype=np.int64),
            tuple(str(c) for c in arrays["classes"]),
            np.asarray(arrays["matrix"], dtype=np.int64),
        )
