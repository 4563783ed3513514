"""A record of an mmdet run: the same strict form as every other, under a protocol of its own."""

from __future__ import annotations

import copy
import datetime
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import mmdet
import torch
from mmengine.config import Config

from rice_eval.adapters.base import facts_as_dict
from rice_eval.datasets.base import files_fingerprint
from rice_eval.environment import describe, peak_memory_mb
from rice_eval.errors import DataError, UsageError
from rice_eval.openmmlab.backbone import EncoderBackbone
from rice_eval.openmmlab.detection import MmdetResult, run_detection
from rice_eval.protocols.base import Context, Outcome, Protocol
from rice_eval.results.bootstrap import KIND as INTERVAL_KIND
from rice_eval.results.bootstrap import intervals
from rice_eval.results.entries import class_entries, metric_entries
from rice_eval.results.record import Cost, EncoderEntry, Environment, IntervalEntry, ProtocolEntry, Record, TaskEntry
from rice_eval.results.store import ResultStore

__all__ = ["MmdetConfig", "detection_hash", "evaluate_detection"]

_MACHINE = ("work_dir", "data_root", "launcher", "log_level", "resume", "randomness", "load_from")
"""Top-level values that say where a run happens, not what it measures. Seed and weights are fields of their own."""


@dataclass(frozen=True)
class MmdetConfig(Protocol):
    """An mmdet config as a protocol: everything in it, and mmdet's version, is in the hash.

    Attributes:
        config: sha256 of the config as run, see ``detection_hash``.
        engine: mmdet's version.
        trained: whether the run trained, or tested weights it was given.
        weights: sha256 of ``load_from``'s file; empty without one.
    """

    id: ClassVar[str] = "mmdet"
    kind: ClassVar[str] = "detection"
    metric: ClassVar[str] = "ap"

    view: str = "config"
    tokens: str = "online"
    config: str = ""
    engine: str = ""
    trained: bool = True
    weights: str = ""

    def run(self, context: Context) -> Outcome:
        """Not run on the bank: ``evaluate_detection`` runs mmdet."""
        raise NotImplementedError("use evaluate_detection")


def detection_hash(config: Config, folders: Mapping[str, str]) -> str:
    """sha256 of a config's text without machine, paths, encoder and the encoder's width, so that two encoders share a protocol.

    Args:
        config: as run.
        folders: what stands for a path -> the path.
    """
    config = copy.deepcopy(config)
    for name in _MACHINE:
        config.pop(name, None)
    for name in ("name", "weights"):
        config.model.backbone.pop(name, None)
    if "neck" in config.model and "in_channels" in config.model.neck:
        config.model.neck.in_channels = "ENCODER"
    plain = str(config.pretty_text)
    for name, path in sorted(folders.items(), key=lambda item: -len(item[1])):
        plain = plain.replace(path, name) if path else plain
    return hashlib.sha256(plain.encode()).hexdigest()


def evaluate_detection(
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
    """Run an mmdet config and write our record of its test.

    Args:
        path: the config. Its backbone is ``dict(type="rice_eval.StridedEncoder", name=...)`` or gives way to ``encoder``.
        results: folder that the record goes to.
        train: off to test the weights of the config's ``load_from``.
        options: values set in the config, by dotted key.
        encoder, weights: see ``run_detection``.
        work_dir: where mmengine writes logs and checkpoints; ``mmdet`` beside the records by default.
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
    folder = work_dir or results / "mmdet" / path.stem
    done = run_detection(path, folder, train=train, options=dict(options or {}), encoder=encoder, weights=weights)
    model = getattr(done.runner.model, "module", done.runner.model)
    if not isinstance(getattr(model, "backbone", None), EncoderBackbone):
        raise UsageError(
            f"--config {path}: its backbone is no encoder of the registry, so there is nothing to record it under",
            'write backbone=dict(type="rice_eval.StridedEncoder", name=NAME), or give --encoder NAME',
        )
    bounds = intervals(done.statistics, resamples=resamples)
    seconds = {**done.seconds, "total": time.perf_counter() - start}
    record = _record(path, done, model.backbone, bounds, train, weights, resamples, seconds)
    saved = store.save(record, done.statistics)
    return store.load(saved), saved


def _record(
    path: Path,
    done: MmdetResult,
    backbone: EncoderBackbone,
    bounds: Mapping[str, tuple[float, float]],
    trained: bool,
    weights: Path | None,
    resamples: int,
    seconds: Mapping[str, float],
) -> Record:
    runner, config = done.runner, done.runner.cfg
    test = runner.test_dataloader.dataset
    fitted = trained and config.get("train_cfg") is not None
    train = runner.train_dataloader.dataset if fitted and hasattr(runner.train_dataloader, "dataset") else None
    load_from = config.get("load_from")
    roots = {"TEST": _root(test), "TRAIN": _root(train) if train is not None else ""}
    seed = (config.get("randomness") or {}).get("seed")
    protocol = MmdetConfig(
        norm=backbone.norm,
        seed=int(seed or 0),
        config=detection_hash(config, roots),
        engine=f"mmdet {mmdet.__version__}",
        trained=fitted,
        weights=hashlib.sha256(Path(load_from).read_bytes()).hexdigest() if load_from else "",
    )
    metrics = metric_entries(done.statistics, bounds)
    if protocol.metric not in metrics:
        raise DataError(f"--config {path}: no test image has a target", "check the config's paths and classes")
    facts = backbone.encoder.facts
    said = (
        ()
        if seed is not None
        else ("the config sets no seed (randomness = dict(seed=0)): another run gives another number",)
    )
    return Record(
        created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        encoder=EncoderEntry(**facts_as_dict(facts), weights=weights.name if weights is not None else None),
        task=TaskEntry(
            name=f"detection/mmdet-{type(test).__name__.lower()}",
            kind="detection",
            dataset=f"mmdet {type(test).__name__}",
            options={},
            train_split="train" if train is not None else "none",
            test_split="test",
            train_fingerprint=_fingerprint(train) if train is not None else "none",
            test_fingerprint=_fingerprint(test),
            n_train=len(train) if train is not None else 0,
            n_test=len(done.statistics.image_ids),
            classes=done.classes,
        ),
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
        cost=Cost(
            params=facts.params,
            flops=None,
            tokens_per_image=backbone.tokens / max(1, backbone.forwards),
            images_per_second=None,
            forwards=backbone.forwards,
        ),
        bank=None,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        peak_memory_mb=peak_memory_mb(),
        environment=Environment.model_validate(describe(str(next(backbone.buffers()).device), torch.get_num_threads())),
        statistics=None,
        warnings=(*done.notes, *said),
    )


def _inner(dataset: Any) -> Any:
    while not hasattr(dataset, "get_data_info") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset  # mmengine's wrappers
    return dataset


def _root(dataset: Any) -> str:
    return str(getattr(_inner(dataset), "data_root", "") or "")


def _fingerprint(dataset: Any) -> str:
    """sha256 over names and sizes of images, the annotation file's bytes and the classes."""
    inner = _inner(dataset)
    parts: list[tuple[str, Path | bytes]] = [("annotations", Path(inner.ann_file))]
    for index in range(len(inner)):
        image = Path(inner.get_data_info(index)["img_path"])
        parts.append((image.name, f"{image.stat().st_size}".encode()))
    return files_fingerprint(parts, {"classes": inner.metainfo.get("classes")})
