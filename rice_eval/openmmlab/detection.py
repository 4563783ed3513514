"""Run an mmdet config as it is, or with another backbone, and keep our statistics of its test."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.runner import Runner
from torch import Tensor
from torch.nn import functional as F

from rice_eval.adapters import load_encoder
from rice_eval.errors import DataError, UsageError
from rice_eval.metrics.coco import Found, Truth, ap_statistics
from rice_eval.metrics.coco_masks import BoxMaskStatistics
from rice_eval.metrics.statistics import Statistics
from rice_eval.openmmlab.backbone import MODELS, EncoderBackbone
from rice_eval.openmmlab.run import METRICS

__all__ = ["STRIDES", "Instances", "MmdetResult", "StridedBackbone", "run_detection", "with_strides"]

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
        encoder, (height, width) = self.encoder, images.shape[2:]
        if encoder.device != images.device:
            encoder.to(images.device)
        plain = images.float() * self._std + self._mean
        own = torch.tensor(encoder.facts.mean, device=images.device).view(1, 3, 1, 1)
        padded = F.pad(plain - own, (0, -width % encoder.multiple, 0, -height % encoder.multiple)) + own
        tokens = encoder.encode(padded, self.layers, self.norm)
        h, w = tokens.grids[self.layers[-1]]
        self.forwards += len(images)
        self.tokens += len(images) * h * w
        grid = tokens.last.float().clone().transpose(1, 2).reshape(len(images), -1, h, w)
        maps = []
        for stride in self._strides:
            y = (torch.arange(math.ceil(height / stride), device=grid.device) + 0.5) * (
                2 * stride / padded.shape[2]
            ) - 1
            x = (torch.arange(math.ceil(width / stride), device=grid.device) + 0.5) * (2 * stride / padded.shape[3]) - 1
            places = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).expand(len(images), -1, -1, -1)
            maps.append(F.grid_sample(grid, places, padding_mode="border", align_corners=False))
        return tuple(maps)


@METRICS.register_module(name="Instances")
class Instances(BaseMetric):  # type: ignore[misc]
    """mmengine metric that keeps each test image's detections and scores them by COCO's rule.

    Truth is that of the annotation file, as mmdet's own ``CocoMetric`` reads it: original pixels, labels in the file's order of categories. After
    ``compute_metrics``, ``statistics`` holds the statistics, of boxes and, where the model predicts masks, of both.

    Args:
        ann_file: the test split's annotations in COCO format.
    """

    default_prefix = "rice_eval"

    def __init__(self, ann_file: str, collect_device: str = "cpu", prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self._file = ann_file
        self.statistics: Statistics | None = None
        self.classes: tuple[str, ...] = ()

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
        classes = tuple(str(c["name"]) for c in categories)
        self.classes = classes
        label_of = {c["id"]: k for k, c in enumerate(categories)}
        found = dict(results)
        keys = sorted(found)
        masked = any(f.masks is not None for f in found.values())
        truth = [_truth(source, key, label_of, masked) for key in keys]
        names = [Path(source.imgs[key]["file_name"]).stem for key in keys]
        if len(set(names)) != len(names):
            names = [str(key) for key in keys]
        parts = [found[key] for key in keys]
        boxes = ap_statistics(names, truth, parts, classes)
        self.statistics = boxes
        if masked:
            self.statistics = BoxMaskStatistics(boxes, ap_statistics(names, truth, parts, classes, "segm"))
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
class MmdetResult:
    """What a config's run gave.

    Attributes:
        statistics: per-image statistics of its test split.
        classes: names, in the order of the labels.
        metrics: what its own evaluators said.
        seconds: wall clock of ``fit`` and ``predict``.
        runner: mmengine's runner, with the model and the data sets.
        notes: what was changed in the config, in words.
    """

    statistics: Statistics
    classes: tuple[str, ...]
    metrics: dict[str, float]
    seconds: dict[str, float]
    runner: Runner
    notes: tuple[str, ...] = ()


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
    backbone: dict[str, Any] = {"type": "rice_eval.StridedEncoder", "name": name, "strides": list(strides)}
    if weights is not None:
        backbone["weights"] = str(weights)
    normalised = model.get("data_preprocessor") or {}
    backbone.update({k: list(normalised[k]) for k in ("mean", "std") if normalised.get(k) is not None})
    neck["in_channels"] = [load_encoder(name, weights=weights).facts.widths[-1]] * several
    if "start_level" in neck:
        neck["start_level"] = 0
    model["backbone"] = backbone
    model.pop("pretrained", None)
    steps = ", ".join(map(str, strides))
    return (f"the config's backbone {old} gave way to {name}; the neck reads its last layer at strides {steps}",)


def run_detection(
    path: Path,
    work_dir: Path,
    *,
    train: bool = True,
    options: dict[str, Any] | None = None,
    encoder: str | None = None,
    weights: Path | None = None,
) -> MmdetResult:
    """Train (where the config says how, unless ``train`` is off) and test a config unchanged but for one more evaluator.

    Args:
        path: the config; its backbone may be ``dict(type="rice_eval.StridedEncoder", name=...)``.
        work_dir: where mmengine writes.
        train: off to test the weights of the config's ``load_from``.
        options: values set in the config first, by dotted key, as mmdet's ``--cfg-options``.
        encoder: an encoder that takes the place of the config's backbone, see ``with_strides``.
        weights: a checkpoint for it.

    Raises:
        UsageError: a config that can't be read, or one without a test on an annotation file.
    """
    try:
        config = Config.fromfile(str(path))
    except (OSError, SyntaxError, ValueError, KeyError, ImportError) as error:
        raise UsageError(f"--config {path}: can't be read ({error})", "give an mmdet config") from error
    config.merge_from_dict(options or {})
    config.work_dir = str(work_dir)
    notes = with_strides(config, encoder, weights) if encoder is not None else ()
    if config.get("test_dataloader") is None or config.get("test_evaluator") is None or config.get("test_cfg") is None:
        raise UsageError(f"--config {path}: has no test", "it needs test_dataloader, test_evaluator and test_cfg")
    given = config.test_evaluator if isinstance(config.test_evaluator, list) else [config.test_evaluator]
    files = [e["ann_file"] for e in given if e.get("ann_file")]
    if not files:
        raise UsageError(f"--config {path}: no test_evaluator names an ann_file", "use mmdet's CocoMetric")
    config.test_evaluator = [*given, {"type": "rice_eval.Instances", "ann_file": files[0]}]
    runner = Runner.from_cfg(config)
    seconds = {}
    if train and config.get("train_cfg") is not None:
        start = time.perf_counter()
        runner.train()
        seconds["fit"] = time.perf_counter() - start
    start = time.perf_counter()
    metrics = {str(k): float(v) for k, v in runner.test().items()}
    seconds["predict"] = time.perf_counter() - start
    ours = next(m for m in runner.test_evaluator.metrics if isinstance(m, Instances))
    if ours.statistics is None:
        raise UsageError(f"--config {path}: its test split has no images", "check the config's paths")
    return MmdetResult(ours.statistics, ours.classes, metrics, seconds, runner, notes)
