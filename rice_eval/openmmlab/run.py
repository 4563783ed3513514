"""Run an mmseg config as it is, and keep our statistics of its test."""

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

from rice_eval.errors import DataError, UsageError
from rice_eval.metrics.iou import IoUStatistics, areas_of, confusion

__all__ = ["METRICS", "Areas", "MmsegResult", "run_config"]

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
        seconds: wall clock of ``train`` and ``test``.
    """

    statistics: IoUStatistics
    metrics: dict[str, float]
    config: str
    seconds: dict[str, float]


def run_config(path: Path, work_dir: Path, *, train: bool = True, options: dict[str, Any] | None = None) -> MmsegResult:
    """Train (where the config says how, unless ``train`` is off) and test a config unchanged but for one more evaluator.

    Args:
        path: the config; its backbone may be ``dict(type="rice_eval.Encoder", name=...)``.
        work_dir: where mmengine writes.
        train: off to test the weights of the config's ``load_from``.
        options: values set in the config first, by dotted key, as mmseg's ``--cfg-options``.

    Raises:
        UsageError: a config that can't be read, or one without a test.
    """
    try:
        config = Config.fromfile(str(path))
    except (OSError, SyntaxError, ValueError, KeyError, ImportError) as error:
        raise UsageError(f"--config {path}: can't be read ({error})", "give an mmseg config") from error
    config.merge_from_dict(options or {})
    config.work_dir = str(work_dir)
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
    return MmsegResult(ours.statistics, metrics, text, seconds)
