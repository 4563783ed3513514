"""Running a config of an engine that is not ours and recording its test: what goes alike for mmseg and mmdet."""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS as ROOT
from mmengine.registry import Registry
from mmengine.runner import Runner

from rice_eval.adapters.base import facts_as_dict
from rice_eval.environment import describe, peak_memory_mb
from rice_eval.errors import DataError, UsageError
from rice_eval.metrics.statistics import Statistics
from rice_eval.openmmlab.backbone import EncoderBackbone
from rice_eval.openmmlab.config import EngineConfig, config_hash
from rice_eval.results.bootstrap import KIND as INTERVAL_KIND
from rice_eval.results.bootstrap import intervals
from rice_eval.results.entries import class_entries, metric_entries
from rice_eval.results.record import Cost, EncoderEntry, Environment, IntervalEntry, ProtocolEntry, Record, TaskEntry
from rice_eval.results.store import ResultStore

__all__ = ["METRICS", "Engine", "EngineResult", "StatisticsMetric", "image_part"]

METRICS = Registry("metric", parent=ROOT, scope="rice_eval")

_UNSEEDED = "the config sets no seed (randomness = dict(seed=0)): another run gives another number"


class StatisticsMetric(BaseMetric):  # type: ignore[misc]
    """mmengine metric that keeps per-image statistics of the test split.

    ``compute_metrics`` of a subclass sets both attributes.

    Attributes:
        statistics: None before.
        classes: names, in the order of the labels.
    """

    default_prefix = "rice_eval"
    statistics: Statistics | None = None
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineResult:
    """What a config's run gave.

    Attributes:
        statistics: per-image statistics of its test split.
        classes: names, in the order of the labels.
        metrics: what its own evaluators said.
        seconds: wall clock of ``fit``, where it trained, and ``predict``.
        runner: mmengine's runner, with the config as run, the model and the data sets.
        notes: what was changed in the config, in words.
    """

    statistics: Statistics
    classes: tuple[str, ...]
    metrics: dict[str, float]
    seconds: dict[str, float]
    runner: Runner
    notes: tuple[str, ...]

    @property
    def seed(self) -> int | None:
        """What the config sets."""
        seed = (self.runner.cfg.get("randomness") or {}).get("seed")
        return None if seed is None else int(seed)

    @property
    def trained(self) -> bool:
        """Whether the run trained before its test."""
        return "fit" in self.seconds

    @property
    def train_set(self) -> Any:
        """The data set it trained on; None where it did not."""
        return getattr(self.runner.train_dataloader, "dataset", None) if self.trained else None

    @property
    def test_set(self) -> Any:
        """The data set it was tested on."""
        return self.runner.test_dataloader.dataset


@dataclass(frozen=True)
class Engine:
    """A package of the mm* family: where it differs from the others, and what goes alike for all.

    Attributes:
        protocol: of its configs; the id is the package's name.
        version: of the package.
        backbone: name of our backbone in its configs.
        replace: puts an encoder (name, checkpoint) in place of a config's backbone and says in words what was changed.
        evaluator: a ``StatisticsMetric`` as a config writes it, to join the list of the config's own.
        blank: takes out of a config's model what follows from the encoder's width.
        fingerprint: sha256 of a data set's images and labels, mmengine's wrappers taken off.
        nothing: of a test split without a score: what it lacks, and the fix.
    """

    protocol: type[EngineConfig]
    version: str
    backbone: str
    replace: Callable[[Config, str, Path | None], tuple[str, ...]]
    evaluator: Callable[[Config], dict[str, Any]]
    blank: Callable[[Any], None]
    fingerprint: Callable[[Any], str]
    nothing: tuple[str, str]

    def run(
        self,
        path: Path,
        work_dir: Path,
        *,
        train: bool = True,
        options: Mapping[str, Any] | None = None,
        encoder: str | None = None,
        weights: Path | None = None,
    ) -> EngineResult:
        """Train (where the config says how, unless ``train`` is off) and test a config unchanged but for one more evaluator.

        Args:
            path: the config; its backbone may be ``dict(type="rice_eval.Encoder", name=...)`` (mmseg) or
                ``"rice_eval.StridedEncoder"`` (mmdet).
            work_dir: where mmengine writes.
            train: off to test the weights of the config's ``load_from``.
            options: values set in the config first, by dotted key, as the engine's ``--cfg-options``.
            encoder: an encoder that takes the place of the config's backbone, see ``with_encoder`` and ``with_strides``.
            weights: a checkpoint for it.

        Raises:
            UsageError: a config that can't be read, or one without a test (mmdet: on an annotation file).
        """
        try:
            config = Config.fromfile(str(path))
        except (OSError, SyntaxError, ValueError, KeyError, ImportError) as error:
            raise UsageError(
                f"--config {path}: can't be read ({error})", f"give an {self.protocol.id} config"
            ) from error
        config.merge_from_dict(dict(options or {}))
        config.work_dir = str(work_dir)
        start_from = config.get("load_from")
        if start_from and not Path(start_from).is_file():
            raise UsageError(
                f"--config {path}: load_from '{start_from}' is no file here", "download it and give its path"
            )
        notes = self.replace(config, encoder, weights) if encoder is not None else ()
        if any(config.get(name) is None for name in ("test_dataloader", "test_evaluator", "test_cfg")):
            raise UsageError(f"--config {path}: has no test", "it needs test_dataloader, test_evaluator and test_cfg")
        if not isinstance(config.test_evaluator, list):
            config.test_evaluator = [config.test_evaluator]
        config.test_evaluator = [*config.test_evaluator, self.evaluator(config)]
        runner = Runner.from_cfg(config)
        seconds = {}
        if train and config.get("train_cfg") is not None:
            start = time.perf_counter()
            runner.train()
            seconds["fit"] = time.perf_counter() - start
        start = time.perf_counter()
        metrics = {str(k): float(v) for k, v in runner.test().items()}
        seconds["predict"] = time.perf_counter() - start
        ours = next(m for m in runner.test_evaluator.metrics if isinstance(m, StatisticsMetric))
        if ours.statistics is None:
            raise UsageError(f"--config {path}: its test split has no images", "check the config's paths")
        return EngineResult(ours.statistics, ours.classes, metrics, seconds, runner, notes)

    def evaluate(
        self,
        path: Path,
        results: Path,
        *,
        train: bool = True,
        options: Mapping[str, Any] | None = None,
        encoder: str | None = None,
        weights: Path | None = None,
        work_dir: Path | None = None,
        resamples: int = 2000,
    ) -> tuple[Record, Path]:
        """Run a config and write our record of its test.

        Args:
            path: the config. Its backbone is one of ours, see ``run``, or gives way to ``encoder``.
            results: folder that the record goes to.
            train, options, encoder, weights: see ``run``.
            work_dir: where mmengine writes logs and checkpoints; a folder of the engine's name beside the records by default.
            resamples: of the intervals.

        Returns:
            The record and its file.

        Raises:
            UsageError: a config that can't be read, has no test, or whose backbone is no encoder of ours.
            DataError: test images without a target.
        """
        store = ResultStore(results)
        store.check_writable()
        start = time.perf_counter()
        folder = work_dir or results / self.protocol.id / path.stem
        done = self.run(path, folder, train=train, options=options, encoder=encoder, weights=weights)
        model = getattr(done.runner.model, "module", done.runner.model)
        backbone = getattr(model, "backbone", None)
        if not isinstance(backbone, EncoderBackbone):
            raise UsageError(
                f"--config {path}: its backbone is no encoder of the registry, so there is nothing to record it under",
                f'write backbone=dict(type="rice_eval.{self.backbone}", name=NAME), or give --encoder NAME',
            )
        bounds = intervals(done.statistics, resamples=resamples)
        seconds = {**done.seconds, "total": time.perf_counter() - start}
        metrics = metric_entries(done.statistics, bounds)
        if self.protocol.metric not in metrics:
            raise DataError(f"--config {path}: {self.nothing[0]}", self.nothing[1])
        protocol = self._protocol(done, backbone)
        record = Record(
            created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            encoder=EncoderEntry(
                **facts_as_dict(backbone.encoder.facts), weights=weights.name if weights is not None else None
            ),
            task=self._task(done),
            protocol=ProtocolEntry(
                id=protocol.id, hash=protocol.hash, settings=protocol.settings(), version=protocol.version
            ),
            metric=protocol.metric,
            metrics=metrics,
            interval=IntervalEntry(kind=INTERVAL_KIND, level=0.95, resamples=resamples),
            per_class=class_entries(done.statistics),
            view=protocol.view,
            layers=backbone.layers,
            norm=backbone.norm,
            seeds=(protocol.seed,),
            chosen={"config": path.name},
            heads=(),
            # Windows count as images here: the config decides how many an image has.
            cost=Cost(
                params=backbone.encoder.facts.params,
                flops=None,
                tokens_per_image=backbone.tokens / max(1, backbone.forwards),
                images_per_second=None,
                forwards=backbone.forwards,
            ),
            bank=None,
            seconds={name: round(value, 3) for name, value in seconds.items()},
            peak_memory_mb=peak_memory_mb(),
            environment=Environment.model_validate(describe(str(backbone.encoder.device), torch.get_num_threads())),
            statistics=None,
            warnings=done.notes if done.seed is not None else (*done.notes, _UNSEEDED),
        )
        saved = store.save(record, done.statistics)
        return store.load(saved), saved

    def _protocol(self, done: EngineResult, backbone: EncoderBackbone) -> EngineConfig:
        config, load_from = done.runner.cfg, done.runner.cfg.get("load_from")
        folders = {"TEST": _root(done.test_set), "TRAIN": _root(done.train_set)}
        return self.protocol(
            norm=backbone.norm,
            seed=done.seed or 0,
            config=config_hash(config, folders, self.blank),
            engine=f"{self.protocol.id} {self.version}",
            trained=done.trained,
            weights=hashlib.sha256(Path(load_from).read_bytes()).hexdigest() if load_from else "",
        )

    def _task(self, done: EngineResult) -> TaskEntry:
        test, train = done.test_set, done.train_set
        name = type(test).__name__
        return TaskEntry(
            name=f"{self.protocol.kind}/{self.protocol.id}-{name.lower()}",
            kind=self.protocol.kind,
            dataset=f"{self.protocol.id} {name}",
            options={},
            train_split="train" if train is not None else "none",
            test_split="test",
            train_fingerprint=self.fingerprint(_inner(train)) if train is not None else "none",
            test_fingerprint=self.fingerprint(_inner(test)),
            n_train=len(train) if train is not None else 0,
            n_test=len(done.statistics.image_ids),
            classes=done.classes,
        )


def image_part(info: Mapping[str, Any]) -> tuple[str, bytes]:
    """Name and size of an image of a data set, for its fingerprint."""
    image = Path(info["img_path"])
    return image.name, f"{image.stat().st_size}".encode()


def _inner(dataset: Any) -> Any:
    # mmengine's wrappers give items of their own, and are no BaseDataset.
    while not isinstance(dataset, BaseDataset) and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset


def _root(dataset: Any) -> str:
    return str(getattr(_inner(dataset), "data_root", "") or "")
