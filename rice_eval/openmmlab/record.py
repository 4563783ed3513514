"""A record of an mmseg run: the same strict form as every other, under a protocol of its own."""

from __future__ import annotations

import copy
import datetime
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import mmseg
import torch
from mmengine.config import Config
from torch import nn

from rice_eval.adapters.base import facts_as_dict
from rice_eval.datasets.base import files_fingerprint
from rice_eval.environment import describe, peak_memory_mb
from rice_eval.errors import DataError, UsageError
from rice_eval.metrics.iou import IoUStatistics
from rice_eval.openmmlab.backbone import EncoderBackbone
from rice_eval.openmmlab.run import MmsegResult, heads_of, run_config
from rice_eval.protocols.base import Context, Outcome, Protocol
from rice_eval.results.bootstrap import KIND as INTERVAL_KIND
from rice_eval.results.bootstrap import intervals
from rice_eval.results.entries import class_entries, metric_entries
from rice_eval.results.record import Cost, EncoderEntry, Environment, IntervalEntry, ProtocolEntry, Record, TaskEntry
from rice_eval.results.store import ResultStore

__all__ = ["MmsegConfig", "config_hash", "evaluate_config"]

_MACHINE = ("work_dir", "data_root", "launcher", "log_level", "resume", "randomness", "load_from")
"""Top-level values that say where a run happens, not what it measures. Seed and weights are fields of their own."""


@dataclass(frozen=True)
class MmsegConfig(Protocol):
    """An mmseg config as a protocol: everything in it, and mmseg's version, is in the hash.

    Attributes:
        config: sha256 of the config as run, see ``config_hash``.
        engine: mmseg's version.
        trained: whether the run trained the head, or tested weights it was given.
        weights: sha256 of ``load_from``'s file; empty without one.
    """

    id: ClassVar[str] = "mmseg"
    kind: ClassVar[str] = "segmentation"
    metric: ClassVar[str] = "miou"

    view: str = "config"
    tokens: str = "online"
    config: str = ""
    engine: str = ""
    trained: bool = True
    weights: str = ""

    def run(self, context: Context) -> Outcome:
        """Not run on the bank: ``evaluate_config`` runs mmseg."""
        raise NotImplementedError("use evaluate_config")


def config_hash(config: Config, folders: Mapping[str, str]) -> str:
    """sha256 of a config's text without machine, paths, encoder and what follows from the encoder's width.

    Two encoders under one config share a protocol, so they are ranked.

    Args:
        config: as run.
        folders: what stands for a path -> the path.
    """
    config = copy.deepcopy(config)
    for name in _MACHINE:
        config.pop(name, None)
    for name in ("name", "weights"):
        config.model.backbone.pop(name, None)
    for head in heads_of(config.model):
        head.in_channels = "ENCODER"
        if head.get("num_convs") == 0:
            head.channels = "ENCODER"
    plain = str(config.pretty_text)
    for name, path in sorted(folders.items(), key=lambda item: -len(item[1])):
        plain = plain.replace(path, name) if path else plain
    return hashlib.sha256(plain.encode()).hexdigest()


def evaluate_config(
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
    """Run an mmseg config and write our record of its test.

    Args:
        path: the config. Its backbone is ``dict(type="rice_eval.Encoder", name=...)`` or gives way to ``encoder``.
        results: folder that the record goes to.
        train: off to test the weights of the config's ``load_from``.
        options: values set in the config, by dotted key.
        encoder, weights: see ``run_config``.
        work_dir: where mmengine writes logs and checkpoints; ``mmseg`` beside the records by default.
        resamples: of the intervals.

    Returns:
        The record and its file.

    Raises:
        UsageError: a config that can't be read, has no test, or whose backbone is no encoder of ours.
        DataError: test images without a labelled pixel.
    """
    store = ResultStore(results)
    store.check_writable()
    start = time.perf_counter()
    folder = work_dir or results / "mmseg" / path.stem
    done = run_config(path, folder, train=train, options=dict(options or {}), encoder=encoder, weights=weights)
    backbone = _backbone(done.runner.model, path)
    bounds = intervals(done.statistics, resamples=resamples)
    record = _record(path, done, backbone, bounds, train, weights, resamples, time.perf_counter() - start)
    saved = store.save(record, done.statistics)
    return store.load(saved), saved


def _backbone(model: nn.Module, path: Path) -> EncoderBackbone:
    backbone = getattr(getattr(model, "module", model), "backbone", None)
    if not isinstance(backbone, EncoderBackbone):
        raise UsageError(
            f"--config {path}: its backbone is no encoder of the registry, so there is nothing to record it under",
            'write backbone=dict(type="rice_eval.Encoder", name=NAME), or give --encoder NAME',
        )
    return backbone


def _record(
    path: Path,
    done: MmsegResult,
    backbone: EncoderBackbone,
    bounds: Mapping[str, tuple[float, float]],
    trained: bool,
    weights: Path | None,
    resamples: int,
    total: float,
) -> Record:
    encoder, runner = backbone.encoder, done.runner
    config = runner.cfg
    test = runner.test_dataloader.dataset
    fitted = trained and config.get("train_cfg") is not None
    train = runner.train_dataloader.dataset if fitted and hasattr(runner.train_dataloader, "dataset") else None
    load_from = config.get("load_from")
    roots = {"TEST": str(getattr(test, "data_root", "") or ""), "TRAIN": str(getattr(train, "data_root", "") or "")}
    protocol = MmsegConfig(
        norm=backbone.norm,
        seed=int((config.get("randomness") or {}).get("seed") or 0),
        config=config_hash(config, roots),
        engine=f"mmseg {mmseg.__version__}",
        trained=fitted,
        weights=hashlib.sha256(Path(load_from).read_bytes()).hexdigest() if load_from else "",
    )
    metrics = metric_entries(done.statistics, bounds)
    if protocol.metric not in metrics:
        raise DataError(f"--config {path}: no test image has a labelled pixel", "check the config's paths and labels")
    seconds = {**done.seconds, "total": total}
    return Record(
        created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        encoder=EncoderEntry(**facts_as_dict(encoder.facts), weights=weights.name if weights is not None else None),
        task=_task(test, train, done.statistics),
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
        cost=_cost(backbone),
        bank=None,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        peak_memory_mb=peak_memory_mb(),
        environment=Environment.model_validate(describe(str(encoder.device), torch.get_num_threads())),
        statistics=None,
        warnings=(*done.notes, *_unseeded(config)),
    )


def _task(test: Any, train: Any, statistics: IoUStatistics) -> TaskEntry:
    name = type(test).__name__
    return TaskEntry(
        name=f"segmentation/mmseg-{name.lower()}",
        kind="segmentation",
        dataset=f"mmseg {name}",
        options={},
        train_split="train" if train is not None else "none",
        test_split="test",
        train_fingerprint=_fingerprint(train) if train is not None else "none",
        test_fingerprint=_fingerprint(test),
        n_train=len(train) if train is not None else 0,
        n_test=len(statistics.image_ids),
        classes=statistics.classes,
    )


def _fingerprint(dataset: Any) -> str:
    """sha256 over names and sizes of images, bytes of label maps, classes and the label shift."""
    parts: list[tuple[str, Path | bytes]] = []
    inner = dataset
    while not hasattr(inner, "get_data_info") and hasattr(inner, "dataset"):
        inner = inner.dataset  # mmengine's wrappers
    for index in range(len(inner)):
        info = inner.get_data_info(index)
        image, labels = Path(info["img_path"]), info.get("seg_map_path")
        parts.append((image.name, f"{image.stat().st_size}".encode()))
        if labels:
            parts.append((Path(labels).name, Path(labels)))
    facts = {"classes": inner.metainfo.get("classes"), "shift": bool(getattr(inner, "reduce_zero_label", False))}
    return files_fingerprint(parts, facts)


def _cost(backbone: EncoderBackbone) -> Cost:
    """Windows count as images here: the config decides how many an image has."""
    return Cost(
        params=backbone.encoder.facts.params,
        flops=None,
        tokens_per_image=backbone.tokens / max(1, backbone.forwards),
        images_per_second=None,
        forwards=backbone.forwards,
    )


def _unseeded(config: Any) -> tuple[str, ...]:
    seeded = (config.get("randomness") or {}).get("seed") is not None
    return () if seeded else ("the config sets no seed (randomness = dict(seed=0)): another run gives another number",)
