"""Synthetic records and statistics for the tests of results."""

from __future__ import annotations

from typing import Any

import numpy as np

from rice_eval.metrics.statistics import RatioStatistics
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
