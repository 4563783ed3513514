"""Records of simulated runs, whose statistics never see a disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rice_eval.metrics.statistics import Statistics
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
from rice_eval.results.store import StoredRecord


@dataclass(frozen=True)
class Held(StoredRecord):
    """A record whose statistics are in memory."""

    held: Statistics

    def statistics(self) -> Statistics:
        return self.held


def held_record(weights: str, task: str, statistics: Statistics) -> Held:
    """A record as small as the schema allows."""
    value = statistics.point()["miou"]
    record = Record(
        created="2026-01-01T00:00:00Z",
        encoder=EncoderEntry(
            name="model", family="model", arch="ViT", params=1, patch=14, resolution=224, layers=1, widths=(1,), strides=(14,),
            mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), abilities=(), license=None, source="simulated", sha256=weights, notes=(),
        ),
        task=TaskEntry(
            name=task, kind="segmentation", dataset="simulated", options={}, train_split="train", test_split="val",
            train_fingerprint="", test_fingerprint="", n_train=1, n_test=len(statistics), classes=(),
        ),
        protocol=ProtocolEntry(id="linear", hash=settings_hash("linear", 1, {}), settings={}),
        metric="miou", metrics={"miou": Metric(value=value)}, statistics=None, per_class={}, view="square=224", layers=(1,), norm=True,
        seeds=(0,), chosen={}, heads=(), cost=Cost(params=1, flops=None, tokens_per_image=1.0, forwards=0), bank=None,
        seconds={}, peak_memory_mb=0.0,
        environment=Environment(
            rice_eval="", git=None, python="", platform="", packages={}, device="cpu", threads=1
        ),
    )  # fmt: skip
    entry = {"file": "-", "kind": "iou", "sha256": "", "images": len(statistics)}
    record = Record.model_validate({**record.model_dump(), "statistics": entry})
    return Held(path=Path(f"{weights}-{task}.json"), record=record, held=statistics)
