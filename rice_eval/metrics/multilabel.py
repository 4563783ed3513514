"""Multi-label scores of regions: mean average precision over classes, recall among the first k, ranking precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from rice_eval.metrics.statistics import Statistics

__all__ = ["MultilabelStatistics", "average_precisions"]

Floats = NDArray[np.float64]


def average_precisions(scores: NDArray[np.floating], positive: NDArray[np.bool_], weights: Floats) -> Floats:
    """Average precision of one class under each row of weights, as scikit-learn defines it (no interpolation).

    Args:
        scores: ``(n,)``.
        positive: ``(n,)``.
        weights: ``(R, n)`` non-negative.

    Returns:
        ``(R,)``, 0 to 1; NaN where no weighted region is positive. Equal scores count as one threshold.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(weights[:, order] * positive[order], axis=1)
    seen = np.cumsum(weights[:, order], axis=1)
    ordered = scores[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # the end of each run of equal scores
    hits, seen = hits[:, last], seen[:, last]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(seen > 0, hits / seen, 0.0)
        gained = np.diff(hits, axis=1, prepend=0.0)
        out: Floats = (precision * gained).sum(axis=1) / hits[:, -1]
    return out


class MultilabelStatistics(Statistics):
    """Scores and labels of regions, and the image each lies on.

    Args:
        image_ids: N names.
        image: ``(n,)`` index of each region's image.
        scores: ``(n, C)``.
        labels: ``(n, C)`` bool.
        classes: C names.
    """

    kind: ClassVar[str] = "multilabel"
    RECALLS: ClassVar[tuple[int, ...]] = (5, 10)

    def __init__(
        self,
        image_ids: Sequence[str],
        image: NDArray[np.int64],
        scores: NDArray[np.float32],
        labels: NDArray[np.bool_],
        classes: Sequence[str],
    ) -> None:
        self.image_ids, self.classes = tuple(image_ids), tuple(classes)
        self.image, self.scores, self.labels = image, np.asarray(scores, dtype=np.float32), labels
        if not scores.shape == labels.shape == (len(image), len(self.classes)):
            raise ValueError("scores and labels must be (regions, classes)")

    def values(self, weights: Floats) -> dict[str, Floats]:
        """``map`` over the classes that occur, and ``recall_at_k``: true labels among the k highest scores."""
        out: dict[str, Floats] = {}
        rows = weights[:, self.image]
        per_class = np.stack(
            [average_precisions(self.scores[:, c], self.labels[:, c], rows) for c in range(len(self.classes))]
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            present = ~np.isnan(per_class)
            out["map"] = 100 * np.where(present, per_class, 0.0).sum(axis=0) / present.sum(axis=0)
            order = np.argsort(-self.scores, axis=1, kind="stable")
            total = self.labels.sum(axis=1).astype(np.float64)
            for k in self.RECALLS:
                found = np.take_along_axis(self.labels, order[:, :k], axis=1).sum(axis=1).astype(np.float64)
                out[f"recall_at_{k}"] = 100 * (rows @ found) / (rows @ total)
        return out

    def per_class(self) -> dict[str, dict[str, float]]:
        """Average precision of each class."""
        ones = np.ones((1, len(self.image)))
        values = {
            name: float(100 * average_precisions(self.scores[:, c], self.labels[:, c], ones)[0])
            for c, name in enumerate(self.classes)
        }
        return {"map": values}

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """See ``Statistics.arrays``."""
        return {
            "image_ids": np.array(self.image_ids, dtype=np.str_),
            "classes": np.array(self.classes, dtype=np.str_),
            "image": self.image,
            "scores": self.scores,
            "labels": self.labels,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> MultilabelStatistics:
        """See ``Statistics.from_arrays``."""
        return cls(
            tuple(str(i) for i in arrays["image_ids"]),
            np.asarray(arrays["image"], dtype=np.int64),
            np.asarray(arrays["scores"], dtype=np.float32),
            np.asarray(arrays["labels"], dtype=np.bool_),
            tuple(str(c) for c in arrays["classes"]),
        )
