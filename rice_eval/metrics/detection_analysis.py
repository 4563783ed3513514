"""What a detector gets wrong, for the report: error breakdown, precision against recall, which class is taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rice_eval.metrics.coco import ApStatistics, Found, Truth
from rice_eval.metrics.coco_match import box_iou
from rice_eval.metrics.tide import ERRORS, FOREGROUND, breakdown, recall_by_crowding

__all__ = ["MATRIX_CLASSES", "analysis_of", "confusions"]

MATRIX_CLASSES = 40
"""Classes up to which the whole confusion matrix is kept; beyond, the commonest mistakes alone."""
_PAIRS = 20


def confusions(truth: Sequence[Truth], found: Sequence[Found], classes: int) -> NDArray[np.int64]:
    """``(C + 1, C + 1)`` counts: rows are true classes, columns what was said; the last row is background, the last column nothing said.

    Of every image as many detections count as it has objects, the surest ones, so that detectors with other scales of scores compare.
    They take targets one to one at IoU 0.5 whatever their class, surest first, each the free target it overlaps most. Crowds are left
    out, and so are detections that only a crowd explains.
    """
    matrix = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for t, f in zip(truth, found):
        plain = ~np.asarray(t.crowd, dtype=np.bool_)
        boxes, labels = t.boxes[plain], t.labels[plain]
        best = np.argsort(-f.scores, kind="stable")[: len(labels)]
        free = np.ones(len(labels), bool)
        if len(labels) and len(best):
            ious = box_iou(f.boxes[best], boxes, np.zeros(len(labels), bool))
            crowd = t.boxes[~plain]
            hidden = np.zeros(len(best))
            if len(crowd):
                hidden = box_iou(f.boxes[best], crowd, np.ones(len(crowd), bool)).max(axis=1)
            for row, d in enumerate(best.tolist()):
                overlap = np.where(free, ious[row], 0.0)
                pick = int(overlap.argmax())
                if overlap[pick] >= FOREGROUND:
                    free[pick] = False
                    matrix[labels[pick], f.labels[d]] += 1
                elif hidden[row] < FOREGROUND:
                    matrix[classes, f.labels[d]] += 1
        matrix[:, classes] += np.bincount(labels[free], minlength=classes + 1)
    return matrix


def analysis_of(truth: Sequence[Truth], found: Sequence[Found], statistics: ApStatistics) -> dict[str, Any]:
    """Plain JSON values for the report.

    Args:
        truth, found: of every image.
        statistics: of their boxes.

    Returns:
        ``errors`` (kind -> count and cost in points of AP50), ``crowding`` (bucket -> recall at IoU 0.5 in percent and targets), ``curves``
        (``50`` and ``75`` -> mean precision over the classes at the 101 recalls, in percent), and ``confusion``: ``matrix``, or its ``pairs``
        ``[truth, said, count]`` where there are over ``MATRIX_CLASSES`` classes; the class's number after the last stands for
        background and for nothing said.
    """
    classes = len(statistics.classes)
    lost = breakdown(truth, found, classes)
    matrix = confusions(truth, found, classes)
    curves = statistics.curves()
    out: dict[str, Any] = {
        "ap50": round(lost.ap50, 3),
        "errors": {kind: [lost.counts[kind], round(lost.costs[kind], 3)] for kind in ERRORS},
        "crowding": {
            bucket: [None if recall != recall else round(recall, 2), targets]
            for bucket, (recall, targets) in recall_by_crowding(truth, found).items()
        },
        "curves": {"50": (100 * curves[0]).round(1).tolist(), "75": (100 * curves[5]).round(1).tolist()},
    }
    if classes <= MATRIX_CLASSES:
        out["confusion"] = {"matrix": matrix.tolist()}
        return out
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    wrong[classes], wrong[:, classes] = 0, 0
    order = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    rows, columns = np.unravel_index(order, wrong.shape)
    out["confusion"] = {"pairs": [[int(r), int(c), int(wrong[r, c])] for r, c in zip(rows, columns) if wrong[r, c] > 0]}
    return out
