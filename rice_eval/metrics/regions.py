"""Accuracy over given regions: the mean over classes of each class's share of regions recognised, and the plain share.

Both are ratios of counts summed over images, so counts a class and image are enough for any weighting of images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from rice_eval.metrics.statistics import Floats, Statistics

__all__ = ["RegionStatistics"]

Ints = NDArray[np.int64]
_BLOCK = 1 << 24  # elements of one (rows of weights, counts) array


class RegionStatistics(Statistics):
    """Regions and hits of each image and class.

    Metrics are ``macc`` and ``accuracy`` of the first method, and with ``_NAME`` appended of each further one (``macc_crop``).

    Args:
        image_ids: N names.
        classes: C names.
        methods: M names; the first is the one that is ranked.
        cells: ``(P, 2)`` image and class of each pair that has regions, without repeats.
        totals: ``(P,)`` regions.
        hits: ``(P, M)`` regions recognised.
    """

    kind: ClassVar[str] = "regions"

    def __init__(
        self,
        image_ids: Sequence[str],
        classes: Sequence[str],
        methods: Sequence[str],
        cells: Ints,
        totals: Ints,
        hits: Ints,
    ) -> None:
        order = np.lexsort((cells[:, 0], cells[:, 1]))
        self.image_ids, self.classes, self.methods = tuple(image_ids), tuple(classes), tuple(methods)
        self.cells, self.totals, self.hits = cells[order], totals[order], hits[order]
        if not len(cells) == len(totals) == len(hits) or hits.shape[1:] != (len(self.methods),):
            raise ValueError("cells, totals and hits differ in shape")

    @classmethod
    def of(
        cls,
        image_ids: Sequence[str],
        classes: Sequence[str],
        image: Ints,
        label: Ints,
        right: Mapping[str, NDArray[np.bool_]],
    ) -> RegionStatistics:
        """From single regions.

        Args:
            image_ids, classes: N and C names.
            image, label: ``(n,)`` image and class of each region.
            right: method -> ``(n,)`` whether it recognised the region.
        """
        if len(label) and (label.min() < 0 or label.max() >= len(classes)):
            raise ValueError(f"a label lies outside the {len(classes)} classes")
        key, place = np.unique(image * len(classes) + label, return_inverse=True)
        totals = np.bincount(place, minlength=len(key))
        hits = [np.bincount(place, weights=r.astype(np.float64), minlength=len(key)) for r in right.values()]
        cells = np.stack([key // max(len(classes), 1), key % max(len(classes), 1)], axis=1)
        table = np.stack(hits, axis=1) if hits else np.zeros((len(key), 0))
        return cls(image_ids, classes, tuple(right), cells.astype(np.int64), totals, table.astype(np.int64))

    def values(self, weights: Floats) -> dict[str, Floats]:
        """See ``Statistics.values``; a class without regions under a row of weights is left out of its mean."""
        weights = np.asarray(weights, dtype=np.float64)
        out = {name: np.full(len(weights), np.nan) for name in self._names()}
        if not len(self.cells):
            return out
        starts = np.flatnonzero(np.diff(self.cells[:, 1], prepend=-1))
        step = max(1, _BLOCK // len(self.cells))
        for first in range(0, len(weights), step):
            rows = slice(first, first + step)
            mine = weights[rows][:, self.cells[:, 0]]
            total = np.add.reduceat(mine * self.totals, starts, axis=1)
            for m, (mean, plain) in enumerate(self._pairs()):
                hit = np.add.reduceat(mine * self.hits[:, m], starts, axis=1)
                with np.errstate(invalid="ignore", divide="ignore"):
                    share = np.where(total > 0, hit / total, 0.0)
                    out[mean][rows] = 100.0 * share.sum(axis=1) / (total > 0).sum(axis=1)
                    out[plain][rows] = 100.0 * hit.sum(axis=1) / total.sum(axis=1)
        return out

    def _pairs(self) -> list[tuple[str, str]]:
        tails = ["", *(f"_{name}" for name in self.methods[1:])]
        return [(f"macc{tail}", f"accuracy{tail}") for tail in tails]

    def _names(self) -> list[str]:
        return [name for pair in self._pairs() for name in pair]

    def per_class(self) -> dict[str, dict[str, float]]:
        """``accuracy`` of each class, a method; NaN for a class without regions."""
        out = {}
        totals = np.bincount(self.cells[:, 1], weights=self.totals, minlength=len(self.classes))
        for m, (_, name) in enumerate(self._pairs()):
            hits = np.bincount(self.cells[:, 1], weights=self.hits[:, m], minlength=len(self.classes))
            with np.errstate(invalid="ignore", divide="ignore"):
                out[name] = dict(zip(self.classes, (100.0 * hits / totals).tolist()))
        return out

    def concat(self, other: Statistics) -> RegionStatistics:
        """See ``Statistics.concat``."""
        if not isinstance(other, RegionStatistics) or (other.classes, other.methods) != (self.classes, self.methods):
            raise ValueError("the two sets have different classes or methods")
        return RegionStatistics(
            self.image_ids + other.image_ids,
            self.classes,
            self.methods,
            np.concatenate([self.cells, other.cells + np.array([[len(self), 0]])]),
            np.concatenate([self.totals, other.totals]),
            np.concatenate([self.hits, other.hits]),
        )

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """See ``Statistics.arrays``."""
        return {
            "image_ids": np.array(self.image_ids, dtype=np.str_),
            "classes": np.array(self.classes, dtype=np.str_),
            "methods": np.array(self.methods, dtype=np.str_),
            "cells": self.cells.astype(np.int32),
            "totals": self.totals.astype(np.int32),
            "hits": self.hits.astype(np.int32),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> RegionStatistics:
        """See ``Statistics.from_arrays``."""
        return cls(
            [str(i) for i in arrays["image_ids"]],
            [str(c) for c in arrays["classes"]],
            [str(m) for m in arrays["methods"]],
            np.asarray(arrays["cells"], dtype=np.int64).reshape(-1, 2),
            np.asarray(arrays["totals"], dtype=np.int64),
            np.asarray(arrays["hits"], dtype=np.int64),
        )
