"""Synthetic records and statistics for the tests of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rice_eval.metrics.statistics import RatioStatistics
from rice_eval.results.policy import Policy
from rice_eval.results.record import (
    Cost,
    EncoderEntry,
    Environment,
    Metric,
    ProtocolEntry,
    Record,
    TaskEntry,
    settings_hash,
)
from rice_eval.results.store import ResultStore, StoredRecord, load_record


def make_statistics(n: int = 50, rate: float = 0.7, seed: int = 0) -> RatioStatistics:
    """Accuracy of ``n`` images with 10 items each."""
    rng = np.random.default_rng(seed)
    right = rng.binomial(10, rate, n).astype(float)
    return RatioStatistics(tuple(f"image-{i}" for i in range(n)), right[:, None], np.full((n, 1), 10.0), ("accuracy",))


def make_record(
    encoder: str = "toy-vit",
    task: str = "segmentation/toy",
    value: float = 70.0,
    *,
    weights: str = "a" * 64,
    seed: int = 0,
    low: float | None = 65.0,
    high: float | None = 75.0,
    metric: str = "accuracy",
    higher_is_better: bool = True,
    settings: dict[str, Any] | None = None,
    **changes: Any,
) -> Record:
    """A valid record; ``changes`` replace top-level fields."""
    settings = {"view": "square=64", "norm": True, "seed": seed, **(settings or {})}
    fields: dict[str, Any] = {
        "created": "2026-01-02T03:04:05Z",
        "encoder": EncoderEntry(
            name=encoder,
            family="toy",
            arch="ViT-T/8",
            params=1000,
            patch=8,
            resolution=64,
            layers=2,
            widths=(8, 8),
            strides=(8, 8),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            abilities=(),
            license="apache-2.0",
            source="seeded",
            sha256=weights,
            notes=(),
        ),
        "task": TaskEntry(
            name=task,
            kind=task.split("/")[0],
            dataset="toy",
            options={},
            train_split="train",
            test_split="val",
            train_fingerprint="t" * 8,
            test_fingerprint="v" * 8,
            n_train=10,
            n_test=50,
            classes=("sky", "<b>grass</b>"),
        ),
        "protocol": ProtocolEntry(id="linear", hash=settings_hash("linear", 1, settings), settings=settings),
        "metric": metric,
        "metrics": {metric: Metric(value=value, low=low, high=high, higher_is_better=higher_is_better)},
        "per_class": {metric: {"sky": value, "<b>grass</b>": None}},
        "view": "square=64",
        "layers": (2,),
        "norm": True,
        "seeds": (seed,),
        "chosen": {"lr": 0.001},
        "heads": (),
        "cost": Cost(params=1000, flops=12345, tokens_per_image=64.0, images_per_second=100.0, forwards=60),
        "bank": None,
        "seconds": {"fit": 1.0},
        "peak_memory_mb": 100.0,
        "environment": Environment(
            rice_eval="0.1.0", git=None, python="3.11.0", platform="linux", packages={}, device="cpu", threads=1
        ),
        "statistics": None,
    }
    return Record(**(fields | changes)).sealed()


QUICK = Policy(resamples=300, permutations=400)


def shifted(drop: float, n: int = 200, noise: float = 0.0, seed: int = 0) -> RatioStatistics:
    """Accuracy of images that lose ``drop`` points each, on average."""
    rng = np.random.default_rng(0)
    base = rng.uniform(3, 9, n)
    change = np.random.default_rng(seed + 1).normal(0, noise, n) if noise else 0.0
    return RatioStatistics(
        tuple(f"i{k}" for k in range(n)), (base - drop / 10 + change)[:, None], np.full((n, 1), 10.0), ("accuracy",)
    )


def put(root: Path, statistics: RatioStatistics | None, **changes: Any) -> StoredRecord:
    value = statistics.point()["accuracy"] if statistics is not None else 70.0
    path = ResultStore(root).save(make_record(value=value, low=value - 3, high=value + 3, **changes), statistics)
    return StoredRecord(path, load_record(path))
