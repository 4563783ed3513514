"""Per-image sufficient statistics: what a metric needs of each image, so that any weighting of images can be scored.

A bootstrap resample, a paired test or a fold is a row of image weights. ``Statistics.values`` scores many rows at once, as
matrix products wherever the metric is a ratio of sums.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["METRICS", "MetricInfo", "RatioStatistics", "Statistics", "statistics_from_arrays"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MetricInfo:
    """How to read a metric: its unit and which way is better."""

    title: str
    unit: Literal["%", "", "nats"] = "%"
    higher_is_better: bool = True


METRICS: dict[str, MetricInfo] = {
    "miou": MetricInfo("mIoU"),
    "pixel_accuracy": MetricInfo("pixel accuracy"),
    "mean_accuracy": MetricInfo("mean class accuracy"),
    "ap": MetricInfo("AP"),
    "ap50": MetricInfo("AP50"),
    "ap75": MetricInfo("AP75"),
    "aps": MetricInfo("AP small"),
    "apm": MetricInfo("AP medium"),
    "apl": MetricInfo("AP large"),
    "ar": MetricInfo("AR"),
    "apr": MetricInfo("AP rare"),
    "apc": MetricInfo("AP common"),
    "apf": MetricInfo("AP frequent"),
    "mask_ap": MetricInfo("mask AP"),
    "mask_ap50": MetricInfo("mask AP50"),
    "mask_ap75": MetricInfo("mask AP75"),
    "macc": MetricInfo("mAcc"),
    "macc_crop": MetricInfo("mAcc, cut out"),
    "accuracy_crop": MetricInfo("accuracy, cut out"),
    "text_to_region_r1": MetricInfo("text to region R@1"),
    "text_to_region_r5": MetricInfo("text to region R@5"),
    "text_to_region_r10": MetricInfo("text to region R@10"),
    "region_to_text_r1": MetricInfo("region to text R@1"),
    "region_to_text_r5": MetricInfo("region to text R@5"),
    "region_to_text_r10": MetricInfo("region to text R@10"),
    "word_accuracy": MetricInfo("word accuracy"),
    "one_minus_ned": MetricInfo("1-NED"),
    "cer": MetricInfo("CER", higher_is_better=False),
    "wer": MetricInfo("WER", higher_is_better=False),
    "word_accuracy_exact": MetricInfo("exact word accuracy"),
    "hmean": MetricInfo("Hmean"),
    "precision": MetricInfo("precision"),
    "recall": MetricInfo("recall"),
    "text_iou": MetricInfo("text IoU"),
    "spotting": MetricInfo("word-spotting F"),
    "map": MetricInfo("mAP of labels"),
    "recall_at_5": MetricInfo("recall at 5"),
    "recall_at_10": MetricInfo("recall at 10"),
    "accuracy": MetricInfo("accuracy"),
    "anls": MetricInfo("ANLS"),
    "blind_accuracy": MetricInfo("accuracy without the image"),
    "mean_image_accuracy": MetricInfo("accuracy with the mean image"),
}
"""Metrics by the name a record uses. Rates are in percent, 0 to 100."""

_KINDS: dict[str, type[Statistics]] = {}


class Statistics(ABC):
    """Sufficient statistics of N images.

    Attributes:
        kind: name under which ``from_arrays`` finds the class again.
        image_ids: ``N`` names, in the order of every array.
    """

    kind: ClassVar[str]
    image_ids: tuple[str, ...]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" in cls.__dict__:
            _KINDS[cls.kind] = cls

    def __len__(self) -> int:
        return len(self.image_ids)

    @abstractmethod
    def values(self, weights: Floats) -> dict[str, Floats]:
        """Each metric under each row of image weights.

        Args:
            weights: ``(R, N)`` non-negative; a row of ones scores the whole set, a row of multinomial counts a resample.

        Returns:
            metric name -> ``(R,)``; NaN where a row gives the metric nothing to divide by.
        """

    @abstractmethod
    def per_class(self) -> dict[str, dict[str, float]]:
        """metric -> class name -> value over the whole set; NaN where the class never occurs. Empty where there are none."""

    @abstractmethod
    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Everything needed to build this again, as arrays; the inverse of ``from_arrays``."""

    @classmethod
    @abstractmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Statistics:
        """Build from what ``arrays`` gave."""

    def concat(self, other: Statistics) -> Statistics:
        """This set's N images followed by those of ``other``: what a permutation test mixes.

        Raises:
            NotImplementedError: this kind does not offer it; paired tests then rest on the bootstrap alone.
            ValueError: the two sets don't measure the same thing.
        """
        raise NotImplementedError(f"statistics of kind '{self.kind}' can't be joined")

    def point(self) -> dict[str, float]:
        """Each metric over the whole set."""
        return {name: float(v[0]) for name, v in self.values(np.ones((1, len(self)))).items()}


def statistics_from_arrays(kind: str, arrays: Mapping[str, NDArray[np.generic]]) -> Statistics:
    """The statistics of ``kind`` from their arrays.

    A kind that is not imported yet is found among this package's own, then by the entry point of its name in the group
    ``rice_eval.statistics`` (its value names the module that defines the class).

    Raises:
        KeyError: a kind nobody defines.
    """
    if kind not in _KINDS:
        _import_kind(kind)
    if kind not in _KINDS:
        raise KeyError(f"no statistics of kind '{kind}'")
    return _KINDS[kind].from_arrays(arrays)


_MODULES = {
    "iou": "rice_eval.metrics.iou",
    "ap": "rice_eval.metrics.coco",
    "ap-masks": "rice_eval.metrics.coco_masks",
    "text": "rice_eval.metrics.text_statistics",
    "multilabel": "rice_eval.metrics.multilabel",
    "regions": "rice_eval.metrics.regions",
}
"""Kinds defined in this package, imported when a file of theirs is read."""


def _import_kind(kind: str) -> None:
    if kind in _MODULES:
        importlib.import_module(_MODULES[kind])
        return
    for entry in importlib.metadata.entry_points(group="rice_eval.statistics"):
        if entry.name == kind:
            importlib.import_module(entry.value)
            return


class RatioStatistics(Statistics):
    """Metrics that are 100 times a ratio of sums over images: accuracy, CER, Hmean's parts, mean scores.

    Args:
        image_ids: N names.
        numerators: ``(N, M)``, one column a metric.
        denominators: ``(N, M)``.
        metrics: M names.
    """

    kind: ClassVar[str] = "ratio"

    def __init__(
        self, image_ids: tuple[str, ...], numerators: Floats, denominators: Floats, metrics: tuple[str, ...]
    ) -> None:
        self.image_ids = tuple(image_ids)
        self.numerators = np.asarray(numerators, dtype=np.float64)
        self.denominators = np.asarray(denominators, dtype=np.float64)
        self.metrics = tuple(metrics)
        if not self.numerators.shape == self.denominators.shape == (len(self.image_ids), len(self.metrics)):
            raise ValueError("numerators and denominators must be (images, metrics)")

    def values(self, weights: Floats) -> dict[str, Floats]:
        """See ``Statistics.values``."""
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = 100.0 * (weights @ self.numerators) / (weights @ self.denominators)
        return {name: ratio[:, m] for m, name in enumerate(self.metrics)}

    def per_class(self) -> dict[str, dict[str, float]]:
        """No classes."""
        return {}

    def concat(self, other: Statistics) -> RatioStatistics:
        """See ``Statistics.concat``."""
        if not isinstance(other, RatioStatistics) or other.metrics != self.metrics:
            raise ValueError("the two sets have different metrics")
        return RatioStatistics(
            self.image_ids + other.image_ids,
            np.concatenate([self.numerators, other.numerators]),
            np.concatenate([self.denominators, other.denominators]),
            self.metrics,
        )

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """See ``Statistics.arrays``."""
        return {
            "image_ids": np.array(self.image_ids, dtype=np.str_),
            "metrics": np.array(self.metrics, dtype=np.str_),
            "numerators": self.numerators,
            "denominators": self.denominators,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> RatioStatistics:
        """See ``Statistics.from_arrays``."""
        return cls(
            tuple(str(i) for i in arrays["image_ids"]),
            np.asarray(arrays["numerators"], dtype=np.float64),
            np.asarray(arrays["denominators"], dtype=np.float64),
            tuple(str(m) for m in arrays["metrics"]),
        )
