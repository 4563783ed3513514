"""Run an mmseg config as it is, or with another backbone, and keep our statistics of its test."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS as ROOT
from mmengine.registry import Registry
from mmengine.runner import Runner
from numpy.typing import NDArray

from rice_eval.adapters import load_encoder
from rice_eval.errors import DataError, UsageError
from rice_eval.metrics.iou import IoUStatistics, areas_of, confusion

__all__ = ["METRICS", "PYRAMID", "Areas", "MmsegResult", "heads_of", "run_config", "with_encoder"]

PYRAMID = (4, 2, 1, 0.5)
"""Scales of the maps that a head with several inputs reads: strides 4 to 32 of a patch of 16, as a ResNet's."""

METRICS = Registry("metric", parent=ROOT, scope="rice_eval")


@METRICS.register_module(name="Areas")
class Areas(BaseMetric):  # type: ignore[misc]
    """mmengine metric that keeps each test image's confusion matrix.

    After ``compute_metrics``, ``statistics`` holds them. Predictions and labels are those mmseg's own ``IoUMetric`` is given: at the
    original resolution, after the data set's label shift.

    Args:
        ignore_index: label that counts nowhere.
    """

    default_prefix = "rice_eval"

    def __init__(self, ignore_index: int = 255, collect_device: str = "cpu", prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self._ignore = ignore_index
        self.statistics: IoUStatistics | None = None

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
        self.statistics = IoUStatistics(ids, areas, tuple(self.dataset_meta["classes"]), np.sum(matrices, axis=0))
        return self.statistics.point()


@dataclass(frozen=True)
class MmsegResult:
    """What a config's run gave.

    Attributes:
        statistics: per-image statistics of its test split.
        metrics: what its own evaluators said.
        config: the config as run, in mmengine's text form: everything that decided the number.
        seconds: wall clock of ``fit`` and ``predict``.
        runner: mmengine's runner, with the model and the data sets.
        notes: what was changed in the config, in words.
    """

    statistics: IoUStatistics
    metrics: dict[str, float]
    config: str
    seconds: dict[str, float]
    runner: Runner
    notes: tuple[str, ...] = ()


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
    heads = heads_of(model)
    several = max((len(h["in_index"]) for h in heads if isinstance(h.get("in_index"), (list, tuple))), default=0)
    if several > len(PYRAMID):
        raise UsageError(f"a head of the config reads {several} maps", f"the encoder's pyramid has {len(PYRAMID)}")
    old = model["backbone"].get("type")
    normalised = model.get("data_preprocessor") or {}
    backbone: dict[str, Any] = {"type": "rice_eval.Encoder", "name": name}
    if weights is not None:
        backbone["weights"] = str(weights)
    backbone.update({k: list(normalised[k]) for k in ("mean", "std") if normalised.get(k) is not None})
    if several:
        backbone["scales"] = list(PYRAMID)
    width = load_encoder(name, weights=weights).facts.widths[-1]
    for head in heads:
        if isinstance(head.get("in_index"), (list, tuple)):
            head["in_channels"] = [width] * len(head["in_index"])
            head["in_index"] = list(range(len(head["in_index"])))
        else:
            head["in_channels"], head["in_index"] = width, 2 if several else 0
            if head.get("num_convs") == 0:
                head["channels"] = width  # mmseg's FCNHead without convolutions asks for as many
    model["backbone"] = backbone
    model["pretrained"] = None
    maps = f"a pyramid of its last layer at {', '.join(map(str, PYRAMID))}" if several else "its last layer"
    return (f"the config's backbone {old} gave way to {name}; heads read {maps}",)


def heads_of(model: Any) -> list[Any]:
    """The decode and auxiliary heads of a model's config."""
    found = []
    for name in ("decode_head", "auxiliary_head"):
        value = model.get(name)
        found += list(value) if isinstance(value, (list, tuple)) else [value]
    return [head for head in found if head is not None]


def run_config(
    path: Path,
    work_dir: Path,
    *,
    train: bool = True,
    options: dict[str, Any] | None = None,
    encoder: str | None = None,
    weights: Path | None = None,
) -> MmsegResult:
    """Train (where the config says how, unless ``train`` is off) and test a config unchanged but for one more evaluator.

    Args:
        path: the config; its backbone may be ``dict(type="rice_eval.Encoder", name=...)``.
        work_dir: where mmengine writes.
        train: off to test the weights of the config's ``load_from``.
        options: values set in the config first, by dotted key, as mmseg's ``--cfg-options``.
        encoder: an encoder that takes the place of the config's backbone, see ``with_encoder``.
        weights: a checkpoint for it.

    Raises:
        UsageError: a config that can't be read, or one without a test.
    """
    try:
        config = Config.fromfile(str(path))
    except (OSError, SyntaxError, ValueError, KeyError, ImportError) as error:
        raise UsageError(f"--config {path}: can't be read ({error})", "give an mmseg config") from error
    config.merge_from_dict(options or {})
    config.work_dir = str(work_dir)
    notes = with_encoder(config, encoder, weights) if encoder is not None else ()
    if config.get("test_dataloader") is None or config.get("test_evaluator") is None or config.get("test_cfg") is None:
        raise UsageError(f"--config {path}: has no test", "it needs test_dataloader, test_evaluator and test_cfg")
    given = config.test_evaluator if isinstance(config.test_evaluator, list) else [config.test_evaluator]
    ignore = next((e.get("ignore_index", 255) for e in given), 255)
    config.test_evaluator = [*given, {"type": "rice_eval.Areas", "ignore_index": ignore}]
    text = str(config.pretty_text)
    runner = Runner.from_cfg(config)
    seconds = {}
    if train and config.get("train_cfg") is not None:
        start = time.perf_counter()
        runner.train()
        seconds["fit"] = time.perf_counter() - start
    start = time.perf_counter()
    metrics = {str(k): float(v) for k, v in runner.test().items()}
    seconds["predict"] = time.perf_counter() - start
    ours = next(m for m in runner.test_evaluator.metrics if isinstance(m, Areas))
    if ours.statistics is None:
        raise UsageError(f"--config {path}: its test split has no images", "check the config's paths")
    return MmsegResult(ours.statistics, metrics, text, seconds, runner, notes)
