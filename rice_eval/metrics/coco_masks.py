"""AP of boxes and of masks of the same detections, kept together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from rice_eval.metrics.coco import ApStatistics
from rice_eval.metrics.statistics import Floats, Statistics

__all__ = ["BoxMaskStatistics"]


class BoxMaskStatistics(Statistics):
    """Every metric of ``boxes`` under its own name, every metric of ``masks`` with ``mask_`` before it.

    Args:
        boxes, masks: of the same images and classes.
    """

    kind: ClassVar[str] = "ap-masks"

    def __init__(self, boxes: ApStatistics, masks: ApStatistics) -> None:
        if (boxes.image_ids, boxes.classes) != (masks.image_ids, masks.classes):
            raise ValueError("boxes and masks are of different images or classes")
        self.image_ids, self.boxes, self.masks = boxes.image_ids, boxes, masks

    def values(self, weights: Floats) -> dict[str, Floats]:
        """See ``Statistics.values``."""
        return {**self.boxes.values(weights), **{f"mask_{k}": v for k, v in self.masks.values(weights).items()}}

    def per_class(self) -> dict[str, dict[str, float]]:
        """See ``ApStatistics.per_class``."""
        return {**self.boxes.per_class(), **{f"mask_{k}": v for k, v in self.masks.per_class().items()}}

    def concat(self, other: Statistics) -> BoxMaskStatistics:
        """See ``Statistics.concat``."""
        if not isinstance(other, BoxMaskStatistics):
            raise ValueError("the other set has no masks")
        return BoxMaskStatistics(self.boxes.concat(other.boxes), self.masks.concat(other.masks))

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """See ``Statistics.arrays``."""
        parts = {"box": self.boxes.arrays(), "mask": self.masks.arrays()}
        return {f"{part}_{name}": array for part, arrays in parts.items() for name, array in arrays.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> BoxMaskStatistics:
        """See ``Statistics.from_arrays``."""

        def part(prefix: str) -> ApStatistics:
            mine = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
            return ApStatistics.from_arrays(mine)

        return cls(part("box_"), part("mask_"))
