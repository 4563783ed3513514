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
    """``RatioStatistics`` with groups of lines.

    Args:
        image_ids, numerators, denominators, metrics: see ``RatioStatistics``.
        groups: G names of groups (``height 8-10 px``).
        group_numerators: ``(G, M)`` over all images.
        group_denominators: ``(G, M)``.
    """

    kind: ClassVar[str] = "text"

    def __init__(
        self,
        image_ids: Sequence[str],
        numerators: Floats,
        denominators: Floats,
        metrics: Sequence[str],
        groups: Sequence[str] = (),
        group_numerators: Floats | None = None,
        group_denominators: Floats | None = None,
    ) -> None:
        super().__init__(tuple(image_ids), numerators, denominators, tuple(metrics))
        self.groups = tuple(groups)
        shape = (len(self.groups), len(self.metrics))
        empty = np.zeros(shape)
        self.group_numerators = empty if group_numerators is None else np.asarray(group_numerators, dtype=np.float64)
        self.group_denominators = (
            empty if group_denominators is None else np.asarray(group_denominators, dtype=np.float64)
        )
        if not self.group_numerators.shape == self.group_denominators.shape == shape:
            raise ValueError("numerators and denominators of groups must be (groups, metrics)")

    def per_class(self) -> dict[str, dict[str, float]]:
        """Metric -> group -> value; metrics that no group has are left out."""
        out = {}
        for m, name in enumerate(self.metrics):
            if not self.group_denominators[:, m].any():
                continue
            with np.errstate(invalid="ignore", divide="ignore"):
                values = 100.0 * self.group_numerators[:, m] / self.group_denominators[:, m]
            out[name] = {group: float(v) for group, v in zip(self.groups, values)}
        return out

    def concat(self, other: Statistics) -> TextStatistics:
        """See ``Statistics.concat``; groups of both are added up."""
        plain = super().concat(other)
        assert isinstance(other, RatioStatistics)
        joined = TextStatistics(plain.image_ids, plain.numerators, plain.denominators, plain.metrics)
        if isinstance(other, TextStatistics) and other.groups == self.groups:
            joined.groups = self.groups
            joined.group_numerators = self.group_numerators + other.group_numerators
            joined.group_denominators = self.group_denominators + other.group_denominators
        return joined

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """See ``Statistics.arrays``."""
        return {
            **super().arrays(),
            "groups": np.array(self.groups, dtype=np.str_),
            "group_numerators": self.group_numerators,
            "group_denominators": self.group_denominators,
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
            np.asarray(arrays["group_numerators"], dtype=np.float64),
            np.asarray(arrays["group_denominators"], dtype=np.float64),
        )


class TextSums:
    """Adds up shares of lines and images, then gives their statistics.

    Args:
        metrics: M names.
    """

    def __init__(self, metrics: Sequence[str]) -> None:
        self.metrics = tuple(metrics)
        self._images: dict[str, Floats] = {}
        self._groups: dict[str, Floats] = {}

    def image(self, image_id: str) -> None:
        """Make sure that an image counts, even where it has nothing to score."""
        self._images.setdefault(image_id, np.zeros((2, len(self.metrics))))

    def add(
        self, image_id: str, numerators: Sequence[float], denominators: Sequence[float], groups: Sequence[str] = ()
    ) -> None:
        """Add a share of M numerators and denominators to an image and to groups."""
        share = np.array([numerators, denominators], dtype=np.float64)
        self.image(image_id)
        self._images[image_id] += share
        self.groups(numerators, denominators, groups)

    def groups(self, numerators: Sequence[float], denominators: Sequence[float], groups: Sequence[str]) -> None:
        """Add a share to groups alone."""
        share = np.array([numerators, denominators], dtype=np.float64)
        for group in groups:
            self._groups.setdefault(group, np.zeros((2, len(self.metrics))))
            self._groups[group] += share

    def statistics(self, groups: Sequence[str] | None = None) -> TextStatistics:
        """Images in the order they came; ``groups`` in the order given, else sorted."""
        order = [g for g in groups if g in self._groups] if groups is not None else sorted(self._groups)
        images = np.array(list(self._images.values())).reshape(-1, 2, len(self.metrics))
        parts = np.array([self._groups[g] for g in order]).reshape(-1, 2, len(self.metrics))
        return TextStatistics(
            list(self._images), images[:, 0], images[:, 1], self.metrics, order, parts[:, 0], parts[:, 1]
        )
