"""Statistics of text tasks: ratios of sums over images, and the same within groups of lines (height, rotation, length…)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from rice_eval.metrics.statistics import RatioStatistics, Statistics

__all__ = ["TextStatistics", "TextSums"]

Floats = NDArray[np.float64]


class TextStatistics(RatioStatistics):
    """``RatioStatistics`` with groups of lines, kept image by image, so that a group's value has an interval too.

    Args:
        image_ids, numerators, denominators, metrics: see ``RatioStatistics``.
        groups: G names of groups (``height 8-12 px``).
        shares: ``(E, 2)`` int: the numbers of an image and of a group, once each pair.
        share_numerators: ``(E, M)``: what the image's lines of the group add up to.
        share_denominators: ``(E, M)``.
    """

    kind: ClassVar[str] = "text"

    def __init__(
        self,
        image_ids: Sequence[str],
        numerators: Floats,
        denominators: Floats,
        metrics: Sequence[str],
        groups: Sequence[str] = (),
        shares: NDArray[np.integer] | None = None,
        share_numerators: Floats | None = None,
        share_denominators: Floats | None = None,
    ) -> None:
        super().__init__(tuple(image_ids), numerators, denominators, tuple(metrics))
        self.groups = tuple(groups)
        self.shares = np.zeros((0, 2), dtype=np.int64) if shares is None else np.asarray(shares, dtype=np.int64)
        empty = np.zeros((0, len(self.metrics)))
        self.share_numerators = empty if share_numerators is None else np.asarray(share_numerators, dtype=np.float64)
        self.share_denominators = (
            empty if share_denominators is None else np.asarray(share_denominators, dtype=np.float64)
        )
        rows = (len(self.shares), len(self.metrics))
        if not self.share_numerators.shape == self.share_denominators.shape == rows:
            raise ValueError("numerators and denominators of shares must be (shares, metrics)")

    def values(self, weights: Floats) -> dict[str, Floats]:
        """See ``Statistics.values``; edits over no true character at all are undefined too, not infinite."""
        found = super().values(weights)
        return {name: np.where(np.isinf(value), np.nan, value) for name, value in found.items()}

    def by_group(self, metric: str) -> RatioStatistics:
        """Statistics of one metric whose metrics are the groups: bootstraps and compares like any other.

        Raises:
            ValueError: no such metric.
        """
        if metric not in self.metrics:
            raise ValueError(f"no metric '{metric}' among {', '.join(self.metrics)}")
        m = self.metrics.index(metric)
        sums = np.zeros((2, len(self), len(self.groups)))
        images, groups = self.shares.T
        sums[0, images, groups] = self.share_numerators[:, m]
        sums[1, images, groups] = self.share_denominators[:, m]
        return RatioStatistics(self.image_ids, sums[0], sums[1], self.groups)

    def per_class(self) -> dict[str, dict[str, float]]:
        """Metric -> group -> value; metrics that no group has are left out."""
        sums = np.zeros((2, len(self.groups), len(self.metrics)))
        np.add.at(sums[0], self.shares[:, 1], self.share_numerators)
        np.add.at(sums[1], self.shares[:, 1], self.share_denominators)
        with np.errstate(invalid="ignore", divide="ignore"):
            values = 100.0 * sums[0] / sums[1]
        return {
            name: {group: float(v) for group, v in zip(self.groups, values[:, m])}
            for m, name in enumerate(self.metrics)
            if sums[1, :, m].any()
        }

    def concat(self, other: Statistics) -> TextStatistics:
        """See ``Statistics.concat``; groups of the same name become one."""
        plain = super().concat(other)
        none = np.zeros((0, len(self.metrics)))
        theirs = other if isinstance(other, TextStatistics) else TextStatistics((), none, none, self.metrics)
        groups = tuple(dict.fromkeys((*self.groups, *theirs.groups)))
        numbers = np.array([groups.index(g) for g in theirs.groups], dtype=np.int64)
        moved = np.stack([theirs.shares[:, 0] + len(self), numbers[theirs.shares[:, 1]]], axis=1)
        return TextStatistics(
            plain.image_ids,
            plain.numerators,
            plain.denominators,
            plain.metrics,
            groups,
            np.concatenate([self.shares, moved]),
            np.concatenate([self.share_numerators, theirs.share_numerators]),
            np.concatenate([self.share_denominators, theirs.share_denominators]),
        )

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """See ``Statistics.arrays``."""
        return {
            **super().arrays(),
            "groups": np.array(self.groups, dtype=np.str_),
            "shares": self.shares.astype(np.int32),
            "share_numerators": self.share_numerators,
            "share_denominators": self.share_denominators,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> TextStatistics:
        """See ``Statistics.from_arrays``."""
        return cls(
            tuple(str(i) for i in arrays["image_ids"]),
            np.asarray(arrays["numerators"], dtype=np.float64),
            np.asarray(arrays["denominators"], dtype=np.float64),
            tuple(str(m) for m in arrays["metrics"]),
            tuple(str(g) for g in arrays["groups"]),
            np.asarray(arrays["shares"], dtype=np.int64),
            np.asarray(arrays["share_numerators"], dtype=np.float64),
            np.asarray(arrays["share_denominators"], dtype=np.float64),
        )


class TextSums:
    """Adds up shares of lines and images, then gives their statistics.

    Args:
        metrics: M names.
    """

    def __init__(self, metrics: Sequence[str]) -> None:
        self.metrics = tuple(metrics)
        self._images: dict[str, Floats] = {}
        self._groups: dict[tuple[str, str], Floats] = {}

    def image(self, image_id: str) -> None:
        """Make sure that an image counts, even where it has nothing to score."""
        self._images.setdefault(image_id, np.zeros((2, len(self.metrics))))

    def add(
        self, image_id: str, numerators: Sequence[float], denominators: Sequence[float], groups: Sequence[str] = ()
    ) -> None:
        """Add a share of M numerators and denominators to an image and to groups of its lines."""
        self.image(image_id)
        self._images[image_id] += np.array([numerators, denominators], dtype=np.float64)
        self.groups(image_id, numerators, denominators, groups)

    def groups(
        self, image_id: str, numerators: Sequence[float], denominators: Sequence[float], groups: Sequence[str]
    ) -> None:
        """Add a share to groups of an image's lines alone."""
        self.image(image_id)
        share = np.array([numerators, denominators], dtype=np.float64)
        for group in groups:
            self._groups.setdefault((image_id, group), np.zeros((2, len(self.metrics))))
            self._groups[image_id, group] += share

    def statistics(self, groups: Sequence[str] | None = None) -> TextStatistics:
        """Images in the order they came; ``groups`` in the order given, else sorted."""
        met = {group for _, group in self._groups}
        order = [g for g in groups if g in met] if groups is not None else sorted(met)
        images = np.array(list(self._images.values())).reshape(-1, 2, len(self.metrics))
        image_numbers = {name: k for k, name in enumerate(self._images)}
        group_numbers = {name: k for k, name in enumerate(order)}
        kept = [(key, share) for key, share in self._groups.items() if key[1] in group_numbers]
        parts = np.array([share for _, share in kept]).reshape(-1, 2, len(self.metrics))
        numbers = [(image_numbers[image], group_numbers[group]) for (image, group), _ in kept]
        return TextStatistics(
            list(self._images), images[:, 0], images[:, 1], self.metrics, order,
            np.array(numbers, dtype=np.int64).reshape(-1, 2), parts[:, 0], parts[:, 1],
        )  # fmt: skip
