"""mmseg's configs: the metric that keeps our statistics, and an encoder in a segmentor's backbone's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import mmseg
import numpy as np
from mmengine.config import Config
from numpy.typing import NDArray

from rice_eval.adapters import load_encoder
from rice_eval.datasets.base import files_fingerprint
from rice_eval.errors import DataError, UsageError
from rice_eval.metrics.iou import IoUStatistics, areas_of, confusion
from rice_eval.openmmlab.config import EngineConfig, backbone_config
from rice_eval.openmmlab.engine import METRICS, Engine, StatisticsMetric, image_part

__all__ = ["PYRAMID", "Areas", "MmsegConfig", "evaluate_config", "run_config", "with_encoder"]

PYRAMID = (4, 2, 1, 0.5)
"""Scales of the maps that a head with several inputs reads: strides 4 to 32 of a patch of 16, as a ResNet's."""


@METRICS.register_module(name="Areas")
class Areas(StatisticsMetric):
    """mmengine metric that keeps each test image's confusion matrix.

    Predictions and labels are those mmseg's own ``IoUMetric`` is given: at the original resolution,
    after the data set's label shift.

    Args:
        ignore_index: label that counts nowhere.
    """

    def __init__(self, ignore_index: int = 255, collect_device: str = "cpu", prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self._ignore = ignore_index

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Take in one batch."""
        classes = len(self.dataset_meta["classes"])
        for sample in data_samples:
            predicted: NDArray[np.int64] = sample["pred_sem_seg"]["data"].squeeze(0).cpu().numpy()
            truth: NDArray[np.int64] = sample["gt_sem_seg"]["data"].squeeze(0).cpu().numpy()
            name = Path(sample["img_path"]).stem
            try:
                self.results.append((name, confusion(predicted, truth, classes, self._ignore)))
            except ValueError as error:
                raise DataError(f"image '{name}': {error}", "check the config's classes and label shift") from error

    def compute_metrics(self, results: list[tuple[str, NDArray[np.int64]]]) -> dict[str, float]:
        """The statistics' values over all images."""
        ids, matrices = [r[0] for r in results], [r[1] for r in results]
        areas = np.stack([areas_of(m) for m in matrices])
        self.classes = tuple(self.dataset_meta["classes"])
        self.statistics = IoUStatistics(ids, areas, self.classes, np.sum(matrices, axis=0))
        return self.statistics.point()


@dataclass(frozen=True)
class MmsegConfig(EngineConfig):
    """An mmseg config as a protocol."""

    id: ClassVar[str] = "mmseg"
    kind: ClassVar[str] = "segmentation"
    metric: ClassVar[str] = "miou"


def with_encoder(config: Config, name: str, weights: Path | None = None) -> tuple[str, ...]:
    """Put an encoder of the registry in place of a config's backbone, and fit the heads' inputs to it.

    A head that reads one map gets the last layer; one that reads several gets a parameter-free pyramid of it, at four, two, one
    and half its resolution.

    Returns:
        What was changed, in words.

    Raises:
        UsageError: a model without a backbone and a decode head, or a head that reads more than four maps.
    """
    model = config.get("model") or {}
    if "backbone" not in model or "decode_head" not in model:
        raise UsageError("the config's model has no backbone and decode_head", "write the backbone into the config")
    heads = _heads(model)
    several = max((len(h["in_index"]) for h in heads if isinstance(h.get("in_index"), (list, tuple))), default=0)
    if several > len(PYRAMID):
        raise UsageError(f"a head of the config reads {several} maps", f"the encoder's pyramid has {len(PYRAMID)}")
    old = model["backbone"].get("type")
    width = load_encoder(name, weights=weights).facts.widths[-1]
    for head in heads:
        if isinstance(head.get("in_index"), (list, tuple)):
            head["in_channels"] = [width] * len(head["in_index"])
            head["in_index"] = list(range(len(head["in_index"])))
        else:
            head["in_channels"], head["in_index"] = width, 2 if several else 0
            if head.get("num_convs") == 0:
                head["channels"] = width  # mmseg's FCNHead without convolutions asks for as many
    scales = {"scales": list(PYRAMID)} if several else {}
    model["backbone"] = backbone_config(model, "Encoder", name, weights, **scales)
    model["pretrained"] = None
    maps = f"a pyramid of its last layer at {', '.join(map(str, PYRAMID))}" if several else "its last layer"
    return (f"the config's backbone {old} gave way to {name}; heads read {maps}",)


def _heads(model: Any) -> list[Any]:
    """The decode and auxiliary heads of a model's config."""
    found = []
    for name in ("decode_head", "auxiliary_head"):
        value = model.get(name)
        found += list(value) if isinstance(value, (list, tuple)) else [value]
    return [head for head in found if head is not None]


def _evaluator(config: Config) -> dict[str, Any]:
    ignore = next((e.get("ignore_index", 255) for e in config.test_evaluator), 255)
    return {"type": "rice_eval.Areas", "ignore_index": ignore}


def _blank(model: Any) -> None:
    for head in _heads(model):
        head.in_channels = "ENCODER"
        if head.get("num_convs") == 0:
            head.channels = "ENCODER"


def _fingerprint(dataset: Any) -> str:
    """sha256 over names and sizes of images, bytes of label maps, classes and the label shift."""
    parts: list[tuple[str, Path | bytes]] = []
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        parts.append(image_part(info))
        if labels := info.get("seg_map_path"):
            parts.append((Path(labels).name, Path(labels)))
    facts = {"classes": dataset.metainfo.get("classes"), "shift": bool(getattr(dataset, "reduce_zero_label", False))}
    return files_fingerprint(parts, facts)


_MMSEG = Engine(
    MmsegConfig,
    version=mmseg.__version__,
    backbone="Encoder",
    replace=with_encoder,
    evaluator=_evaluator,
    blank=_blank,
    fingerprint=_fingerprint,
    nothing=("no test image has a labelled pixel", "check the config's paths and labels"),
)

run_config, evaluate_config = _MMSEG.run, _MMSEG.evaluate
