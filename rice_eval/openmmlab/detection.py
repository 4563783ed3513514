"""mmdet's configs: the metric that keeps our statistics, and an encoder in a detector's backbone's place at exact strides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import mmdet
import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor
from torch.nn import functional as F

from rice_eval.adapters import load_encoder
from rice_eval.datasets.base import files_fingerprint
from rice_eval.errors import DataError, UsageError
from rice_eval.metrics.coco import Found, Truth, ap_statistics
from rice_eval.metrics.coco_masks import BoxMaskStatistics
from rice_eval.openmmlab.backbone import MODELS, EncoderBackbone
from rice_eval.openmmlab.config import EngineConfig, backbone_config
from rice_eval.openmmlab.engine import METRICS, Engine, StatisticsMetric, image_part

__all__ = [
    "STRIDES",
    "Instances",
    "MmdetConfig",
    "StridedBackbone",
    "evaluate_detection",
    "run_detection",
    "with_strides",
]

STRIDES = (4, 8, 16, 32)
"""Pixels: what a ResNet gives to a detector's neck, and what its anchors take for granted."""


@MODELS.register_module(name="StridedEncoder")
class StridedBackbone(EncoderBackbone):
    """A frozen encoder's last layer at exact strides, whatever its patch: what anchors and RoIAlign of a detector expect.

    Images are padded below and on the right to the encoder's multiple. The cell (i, j) of the map of stride s is the tokens' bilinear
    value at the pixel ((j + 1/2) s, (i + 1/2) s), so that a box in pixels means the same on every map.

    Args:
        name, weights, norm, mean, std, init_cfg: see ``EncoderBackbone``.
        strides: pixels, a map each.
    """

    def __init__(self, name: str, weights: str | None = None, strides: Sequence[int] = STRIDES, **rest: Any) -> None:
        super().__init__(name, weights, **rest)
        self._strides = tuple(strides)
        self.channels = [self.encoder.facts.widths[self.layers[-1] - 1]] * len(self._strides)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """``(B, 3, H, W)`` normalised images to maps ``(B, D, ceil(H / s), ceil(W / s))``."""
        height, width = images.shape[2:]
        down, right = -height % self.encoder.multiple, -width % self.encoder.multiple
        grid = self._layer_maps(images, (0, right, 0, down))[-1]
        maps = []
        for stride in self._strides:
            y = (torch.arange(math.ceil(height / stride), device=grid.device) + 0.5) * (
                2 * stride / (height + down)
            ) - 1
            x = (torch.arange(math.ceil(width / stride), device=grid.device) + 0.5) * (2 * stride / (width + right)) - 1
            places = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).expand(len(images), -1, -1, -1)
            maps.append(F.grid_sample(grid, places, padding_mode="border", align_corners=False))
        return tuple(maps)


@METRICS.register_module(name="Instances")
class Instances(StatisticsMetric):
    """mmengine metric that keeps each test image's detections and scores them by COCO's rule.

    Truth is that of the annotation file, as mmdet's own ``CocoMetric`` reads it: original pixels, labels in the file's order of categories. After
    ``compute_metrics``, ``statistics`` holds the statistics, of boxes and, where the model predicts masks, of both.

    Args:
        ann_file: the test split's annotations in COCO format.
    """

    def __init__(self, ann_file: str, collect_device: str = "cpu", prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self._file = ann_file

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Take in one batch."""
        for sample in data_samples:
            found = sample["pred_instances"]
            masks = None
            if "masks" in found:
                masks = [_run_lengths(m) for m in found["masks"].cpu().numpy()]
            self.results.append(
                (
                    int(sample["img_id"]),
                    Found(
                        found["bboxes"].double().cpu().numpy(),
                        found["scores"].double().cpu().numpy(),
                        found["labels"].cpu().numpy().astype(np.int64),
                        masks,
                    ),
                )
            )

    def compute_metrics(self, results: list[tuple[int, Found]]) -> dict[str, float]:
        """The statistics' values over all images."""
        from pycocotools.coco import COCO

        source = COCO(self._file)
        # mmdet numbers its labels in the file's order of the named categories, whatever the order of metainfo.classes.
        wanted = set(self.dataset_meta["classes"])
        categories = [c for c in source.dataset["categories"] if c["name"] in wanted]
        missing = sorted(wanted - {c["name"] for c in categories})
        if missing:
            raise DataError(f"{self._file}: has no category '{missing[0]}'", "check the config's metainfo.classes")
        self.classes = tuple(str(c["name"]) for c in categories)
        label_of = {c["id"]: k for k, c in enumerate(categories)}
        found = dict(results)
        keys = sorted(found)
        masked = any(f.masks is not None for f in found.values())
        truth = [_truth(source, key, label_of, masked) for key in keys]
        names = [Path(source.imgs[key]["file_name"]).stem for key in keys]
        if len(set(names)) != len(names):
            names = [str(key) for key in keys]
        parts = [found[key] for key in keys]
        boxes = ap_statistics(names, truth, parts, self.classes)
        self.statistics = boxes
        if masked:
            self.statistics = BoxMaskStatistics(boxes, ap_statistics(names, truth, parts, self.classes, "segm"))
        return self.statistics.point()


def _run_lengths(mask: Any) -> Mapping[str, Any]:
    from pycocotools import mask as coco_mask

    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))  # type: ignore[no-any-return]


def _truth(source: Any, key: int, label_of: Mapping[int, int], masks: bool) -> Truth:
    rows = [a for a in source.imgToAnns[key] if a["category_id"] in label_of]
    boxes = np.array([a["bbox"] for a in rows], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Truth(
        boxes,
        np.array([label_of[a["category_id"]] for a in rows], dtype=np.int64),
        np.array([bool(a.get("iscrowd", 0)) for a in rows], dtype=np.bool_),
        np.array([a["area"] for a in rows], dtype=np.float64),
        [source.annToRLE(a) for a in rows] if masks else None,
    )


@dataclass(frozen=True)
class MmdetConfig(EngineConfig):
    """An mmdet config as a protocol."""

    id: ClassVar[str] = "mmdet"
    kind: ClassVar[str] = "detection"
    metric: ClassVar[str] = "ap"


def with_strides(config: Config, name: str, weights: Path | None = None) -> tuple[str, ...]:
    """Put an encoder of the registry in place of a config's backbone, as ``StridedEncoder``, and fit the neck's inputs to it.

    Returns:
        What was changed, in words.

    Raises:
        UsageError: a model without a backbone and a neck with ``in_channels``, or one that reads more than four maps.
    """
    model = config.get("model") or {}
    neck = model.get("neck")
    if "backbone" not in model or neck is None or not isinstance(neck.get("in_channels"), (list, tuple)):
        raise UsageError(
            "the config's model has no backbone and neck with in_channels", "write the backbone into the config"
        )
    several = len(neck["in_channels"])
    if several > len(STRIDES):
        raise UsageError(f"the config's neck reads {several} maps", f"the encoder gives {len(STRIDES)}")
    # Necks that read three maps start at stride 8 (RetinaNet, FCOS), four at stride 4.
    strides = STRIDES[-several:]
    old = model["backbone"].get("type")
    neck["in_channels"] = [load_encoder(name, weights=weights).facts.widths[-1]] * several
    if "start_level" in neck:
        neck["start_level"] = 0
    model["backbone"] = backbone_config(model, "StridedEncoder", name, weights, strides=list(strides))
    model.pop("pretrained", None)
    steps = ", ".join(map(str, strides))
    return (f"the config's backbone {old} gave way to {name}; the neck reads its last layer at strides {steps}",)


def _evaluator(config: Config) -> dict[str, Any]:
    files = [e["ann_file"] for e in config.test_evaluator if e.get("ann_file")]
    if not files:
        raise UsageError(f"--config {config.filename}: no test_evaluator names an ann_file", "use mmdet's CocoMetric")
    return {"type": "rice_eval.Instances", "ann_file": files[0]}


def _blank(model: Any) -> None:
    if "neck" in model and "in_channels" in model.neck:
        model.neck.in_channels = "ENCODER"


def _fingerprint(dataset: Any) -> str:
    """sha256 over names and sizes of images, the annotation file's bytes and the classes."""
    parts: list[tuple[str, Path | bytes]] = [("annotations", Path(dataset.ann_file))]
    parts += [image_part(dataset.get_data_info(index)) for index in range(len(dataset))]
    return files_fingerprint(parts, {"classes": dataset.metainfo.get("classes")})


_MMDET = Engine(
    MmdetConfig,
    version=mmdet.__version__,
    backbone="StridedEncoder",
    replace=with_strides,
    evaluator=_evaluator,
    blank=_blank,
    fingerprint=_fingerprint,
    nothing=("no test image has a target", "check the config's paths and classes"),
)

run_detection, evaluate_detection = _MMDET.run, _MMDET.evaluate
