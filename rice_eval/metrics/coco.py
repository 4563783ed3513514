"""COCO detection numbers from per-image matches, equal to pycocotools' cell by cell, and LVIS's federated rule.

Matching follows ``pycocotools/cocoeval.py`` (``evaluateImg`` and ``accumulate``), with every (image, class) pair of the set
matched side by side instead of one at a time. What is kept of an image is its detections' scores and match flags and its
numbers of targets, so that any weighting of images can be scored again without matching again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from rice_eval.metrics.coco_match import Groups, match_groups
from rice_eval.metrics.statistics import Statistics

__all__ = ["AREAS", "IOU_THRESHOLDS", "ApStatistics", "Found", "Truth", "ap_statistics"]

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""0.50, 0.55 … 0.95 as pycocotools' ``Params`` makes them."""
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS: dict[str, tuple[float, float]] = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
"""Square pixels, both ends included, of pycocotools' ``Params``; LVIS uses the same."""
MAX_DETECTIONS = {"coco": (1, 10, 100), "lvis": (300,)}
_EPS = np.spacing(1)
_CHUNK = 1 << 25  # elements of one intermediate array


@dataclass(frozen=True)
class Truth:
    """Targets of one image: ``boxes (n, 4)`` xyxy, ``labels (n,)`` class indices, crowd flags, areas, masks as COCO RLE.

    ``negative`` and ``not_exhaustive`` are LVIS's class lists of the image; None under COCO's rule.
    """

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    area: NDArray[np.float64]
    masks: Sequence[Mapping[str, Any]] | None = None
    negative: frozenset[int] | None = None
    not_exhaustive: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Found:
    """Detections of one image: ``boxes (m, 4)`` xyxy, ``scores (m,)``, ``labels (m,)``, masks as COCO RLE where asked for."""

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    masks: Sequence[Mapping[str, Any]] | None = None


def ap_statistics(
    image_ids: Sequence[str],
    truth: Sequence[Truth],
    found: Sequence[Found],
    classes: Sequence[str],
    kind: Literal["bbox", "segm"] = "bbox",
    rule: Literal["coco", "lvis"] = "coco",
    frequency: Sequence[str] | None = None,
) -> ApStatistics:
    """Match the detections of a set.

    Args:
        image_ids: N names. Ties of score between images are broken in this order, so give them as the annotation file's
            sorted image ids to agree with pycocotools.
        truth, found: N each.
        classes: names; labels index them.
        kind: IoU of boxes or of masks.
        rule: COCO's, or LVIS's federated one (classes not checked in an image are left out of it; 300 detections an image).
        frequency: LVIS's ``r``, ``c`` or ``f`` a class.

    Raises:
        ValueError: numbers that do not agree, a label outside ``classes``, masks that are missing, NaN scores.
    """
    if not len(image_ids) == len(truth) == len(found):
        raise ValueError(f"{len(image_ids)} images, {len(truth)} truths and {len(found)} detections must agree")
    groups = Groups.of(truth, found, len(classes), kind, rule, MAX_DETECTIONS[rule][-1])
    flags = match_groups(groups, IOU_THRESHOLDS, list(AREAS.values()))
    return ApStatistics(
        tuple(image_ids),
        tuple(classes),
        rule,
        groups.detection_image,
        groups.detection_class,
        groups.detection_score,
        groups.detection_rank,
        flags.matched,
        flags.ignored,
        groups.target_counts(list(AREAS.values())),
        tuple(frequency) if frequency is not None else None,
    )


class ApStatistics(Statistics):
    """Scores and match flags of every detection, and numbers of targets.

    Attributes:
        detection_image, detection_class, detection_score: ``(M,)``; sorted by class, then by descending score (stable).
        detection_rank: ``(M,)`` place of the detection in its image and class, from 0.
        matched, ignored: ``(M, A, T)`` bool for areas ``AREAS`` and thresholds ``IOU_THRESHOLDS``.
        targets: ``(P, 3)`` int64 rows (image, class, area index) and ``target_counts (P,)``: targets that count.
    """

    kind: ClassVar[str] = "ap"

    def __init__(
        self,
        image_ids: tuple[str, ...],
        classes: tuple[str, ...],
        rule: str,
        detection_image: NDArray[np.int64],
        detection_class: NDArray[np.int64],
        detection_score: NDArray[np.float64],
        detection_rank: NDArray[np.int64],
        matched: NDArray[np.bool_],
        ignored: NDArray[np.bool_],
        targets: NDArray[np.int64],
        frequency: tuple[str, ...] | None = None,
    ) -> None:
        # Stable by score inside a class: ties stay in the order of images, then of rank, as pycocotools' mergesort leaves them.
        order = np.lexsort((-detection_score, detection_class))
        self.image_ids, self.classes, self.rule, self.frequency = tuple(image_ids), tuple(classes), rule, frequency
        self.detection_image = detection_image[order]
        self.detection_class = detection_class[order]
        self.detection_score = detection_score[order]
        self.detection_rank = detection_rank[order]
        self.matched, self.ignored = matched[order], ignored[order]
        self.targets = targets
        """``(P, 4)``: image, class, area index, number of targets that count."""

    def values(self, weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """In percent; see ``Statistics.values``.

        ``ap``, ``ap50``, ``ap75``; ``aps``, ``apm``, ``apl`` of small, medium and large targets; ``ar`` with the most
        detections an image; under LVIS's rule ``apr``, ``apc``, ``apf`` too.
        """
        weights = np.asarray(weights, dtype=np.float64)
        limit = MAX_DETECTIONS[self.rule][-1]
        table = self._precision(weights, area=0, limit=limit)
        out = {
            "ap": _mean(table, (1, 2)),
            "ap50": _mean(table[:, :, :1], (1, 2)),
            "ap75": _mean(table[:, :, 5:6], (1, 2)),
            "ar": _mean(self._recall(weights, 0, limit), (1, 2)),
        }
        for k, name in enumerate(("aps", "apm", "apl"), 1):
            out[name] = _mean(self._precision(weights, k, limit), (1, 2))
        for group, name in (("r", "apr"), ("c", "apc"), ("f", "apf")):
            if self.frequency is not None:
                picked = np.array([f == group for f in self.frequency])
                out[name] = _mean(table[:, picked], (1, 2)) if picked.any() else np.full(len(table), np.nan)
        return {name: 100.0 * value for name, value in out.items()}

    def concat(self, other: Statistics) -> ApStatistics:
        """See ``Statistics.concat``."""
        if not isinstance(other, ApStatistics) or (other.classes, other.rule) != (self.classes, self.rule):
            raise ValueError("the two sets have different classes or rules")
        shifted = other.targets.copy()
        shifted[:, 0] += len(self)
        return ApStatistics(
            self.image_ids + other.image_ids,
            self.classes,
            self.rule,
            np.concatenate([self.detection_image, other.detection_image + len(self)]),
            np.concatenate([self.detection_class, other.detection_class]),
            np.concatenate([self.detection_score, other.detection_score]),
            np.concatenate([self.detection_rank, other.detection_rank]),
            np.concatenate([self.matched, other.matched]),
            np.concatenate([self.ignored, other.ignored]),
            np.concatenate([self.targets, shifted]),
            self.frequency,
        )

    def summary(self) -> dict[str, float]:
        """COCO's twelve numbers (LVIS's thirteen) as fractions, -1 where there are no targets, as the reference prints them."""
        ones = np.ones((1, len(self)))
        limits = MAX_DETECTIONS[self.rule]
        out: dict[str, float] = {}
        tables = {a: self._precision(ones, k, limits[-1]) for k, a in enumerate(AREAS)}
        out["AP"] = _plain(tables["all"])
        out["AP50"], out["AP75"] = _plain(tables["all"][:, :, :1]), _plain(tables["all"][:, :, 5:6])
        out |= {f"AP{a[0]}": _plain(tables[a]) for a in ("small", "medium", "large")}
        if self.frequency is not None:
            for group in "rcf":
                picked = np.array([f == group for f in self.frequency])
                out[f"AP{group}"] = _plain(tables["all"][:, picked])
        for limit in limits:
            out[f"AR@{limit}"] = _plain(self._recall(ones, 0, limit))
        for k, a in enumerate(AREAS):
            if a != "all":
                out[f"AR{a[0]}@{limits[-1]}"] = _plain(self._recall(ones, k, limits[-1]))
        return out

    def per_class(self) -> dict[str, dict[str, float]]:
        """``ap`` and ``ap50`` of each class in percent; NaN for a class without targets."""
        table = self._precision(np.ones((1, len(self))), 0, MAX_DETECTIONS[self.rule][-1])[0]
        with np.errstate(invalid="ignore"):
            return {
                "ap": {c: 100.0 * float(v) for c, v in zip(self.classes, table.mean(axis=1))},
                "ap50": {c: 100.0 * float(v) for c, v in zip(self.classes, table[:, 0])},
            }

    def curves(self) -> NDArray[np.float64]:
        """``(T, 101)`` interpolated precision at the 101 recalls, the mean over the classes that have targets, for each threshold.

        The mean of row 0 is ``ap50`` as a fraction.
        """
        wanted = self._wanted(np.ones((1, len(self))), 0)[0]
        total, classes = np.zeros((len(IOU_THRESHOLDS), len(RECALLS))), int((wanted > 0).sum())
        for k, part in self._slices():
            if not wanted[k]:
                continue
            keep = np.flatnonzero(self.detection_rank[part] < MAX_DETECTIONS[self.rule][-1]) + part.start
            tp = np.cumsum(self._flag(keep, 0, True), axis=0, dtype=np.float64)
            fp = np.cumsum(self._flag(keep, 0, False), axis=0, dtype=np.float64)
            precision = np.maximum.accumulate((tp / (tp + fp + _EPS))[::-1], axis=0)[::-1]
            for t in range(len(IOU_THRESHOLDS)):
                place = np.searchsorted(tp[:, t] / wanted[k], RECALLS, side="left")
                total[t, place < len(keep)] += precision[place[place < len(keep)], t]
        return total / max(1, classes)

    def _slices(self) -> list[tuple[int, slice]]:
        edges = np.searchsorted(self.detection_class, np.arange(len(self.classes) + 1))
        return [(k, slice(int(edges[k]), int(edges[k + 1]))) for k in range(len(self.classes))]

    def _wanted(self, weights: NDArray[np.float64], area: int) -> NDArray[np.float64]:
        """``(R, K)`` weighted numbers of targets that count."""
        rows = self.targets[self.targets[:, 2] == area]
        out = np.zeros((len(weights), len(self.classes)))
        for k in np.unique(rows[:, 1]):
            mine = rows[rows[:, 1] == k]
            out[:, k] = weights[:, mine[:, 0]] @ mine[:, 3].astype(np.float64)
        return out

    def _precision(self, weights: NDArray[np.float64], area: int, limit: int) -> NDArray[np.float64]:
        """``(R, K, T)`` AP of each class and threshold under each row of weights; NaN where a class has no target."""
        rows, thresholds = len(weights), len(IOU_THRESHOLDS)
        wanted = self._wanted(weights, area)
        out = np.full((rows, len(self.classes), thresholds), np.nan)
        for k, part in self._slices():
            some = wanted[:, k] > 0
            out[some, k] = 0.0
            keep = np.flatnonzero(self.detection_rank[part] < limit) + part.start
            if not len(keep) or not some.any():
                continue
            hit = self._flag(keep, area, True)
            miss = self._flag(keep, area, False)
            step = max(1, _CHUNK // (len(keep) * 2))
            for start in range(0, rows, step):
                pick = np.flatnonzero(some[start : start + step]) + start
                if len(pick):
                    out[pick, k] = _average_precision(
                        weights[np.ix_(pick, self.detection_image[keep])], hit, miss, wanted[pick, k]
                    )
        return out

    def _flag(self, keep: NDArray[np.int64], area: int, matched: bool) -> NDArray[np.bool_]:
        """``(m, T)`` true positives, or false positives, among the detections that are not ignored."""
        flags: NDArray[np.bool_] = (self.matched[keep, area] == matched) & ~self.ignored[keep, area]
        return flags

    def _recall(self, weights: NDArray[np.float64], area: int, limit: int) -> NDArray[np.float64]:
        """``(R, K, T)`` recall with at most ``limit`` detections an image and class."""
        wanted = self._wanted(weights, area)
        out = np.full((len(weights), len(self.classes), len(IOU_THRESHOLDS)), np.nan)
        for k, part in self._slices():
            keep = np.flatnonzero(self.detection_rank[part] < limit) + part.start
            hits = weights[:, self.detection_image[keep]] @ self._flag(keep, area, True).astype(np.float64)
            some = wanted[:, k] > 0
            out[some, k] = hits[some] / wanted[some, k][:, None]
        return out

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """See ``Statistics.arrays``; flags are packed, eight to a byte."""
        return {
            "image_ids": np.array(self.image_ids, dtype=np.str_),
            "classes": np.array(self.classes, dtype=np.str_),
            "rule": np.array([self.rule], dtype=np.str_),
            "frequency": np.array(self.frequency or (), dtype=np.str_),
            "detection_image": self.detection_image.astype(np.int32),
            "detection_class": self.detection_class.astype(np.int32),
            "detection_score": self.detection_score,
            "detection_rank": self.detection_rank.astype(np.int32),
            "matched": np.packbits(self.matched.reshape(len(self.matched), -1), axis=1),
            "ignored": np.packbits(self.ignored.reshape(len(self.ignored), -1), axis=1),
            "targets": self.targets.astype(np.int32),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> ApStatistics:
        """See ``Statistics.from_arrays``."""
        shape = (len(arrays["detection_image"]), len(AREAS), len(IOU_THRESHOLDS))

        def flags(name: str) -> NDArray[np.bool_]:
            packed = np.asarray(arrays[name], dtype=np.uint8)
            return np.unpackbits(packed, axis=1, count=shape[1] * shape[2]).astype(bool).reshape(shape)

        frequency = tuple(str(f) for f in arrays["frequency"])
        return cls(
            tuple(str(i) for i in arrays["image_ids"]),
            tuple(str(c) for c in arrays["classes"]),
            str(arrays["rule"][0]),
            np.asarray(arrays["detection_image"], dtype=np.int64),
            np.asarray(arrays["detection_class"], dtype=np.int64),
            np.asarray(arrays["detection_score"], dtype=np.float64),
            np.asarray(arrays["detection_rank"], dtype=np.int64),
            flags("matched"),
            flags("ignored"),
            np.asarray(arrays["targets"], dtype=np.int64).reshape(-1, 4),
            frequency or None,
        )


def _average_precision(
    weights: NDArray[np.float64], hit: NDArray[np.bool_], miss: NDArray[np.bool_], wanted: NDArray[np.float64]
) -> NDArray[np.float64]:
    """``(R, T)`` 101-point AP of one class.

    Only places of true positives are looked at: recall rises nowhere else, and precision is highest there. A true positive
    brings its (interpolated) precision to as many of the 101 recalls as its rise of recall passes.

    Args:
        weights: ``(R, m)`` weight of each detection's image, in order of descending score.
        hit, miss: ``(m, T)``.
        wanted: ``(R,)`` weighted targets, above zero.
    """
    out = np.zeros((len(weights), hit.shape[1]))
    for t in range(hit.shape[1]):
        places = np.flatnonzero(hit[:, t])
        if not len(places):
            continue
        last = places[-1] + 1
        tp = np.cumsum(weights[:, places], axis=1)
        fp = np.cumsum(weights[:, :last] * miss[:last, t], axis=1)[:, places]
        precision = tp / (fp + tp + _EPS)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        passed = np.searchsorted(RECALLS, tp / wanted[:, None], side="right")
        out[:, t] = (precision * np.diff(passed, axis=1, prepend=0)).sum(axis=1) / len(RECALLS)
    return out


def _mean(table: NDArray[np.float64], axes: tuple[int, ...]) -> NDArray[np.float64]:
    """Mean over what is not NaN; NaN where nothing is."""
    count = (~np.isnan(table)).sum(axis=axes)
    with np.errstate(invalid="ignore"):
        mean: NDArray[np.float64] = np.nansum(table, axis=axes) / np.where(count, count, np.nan)
    return mean


def _plain(table: NDArray[np.float64]) -> float:
    good = table[~np.isnan(table)]
    return float(good.mean()) if good.size else -1.0
