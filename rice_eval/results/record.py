"""The record: one strict JSON file a run of (encoder, task, protocol).

Unknown fields, newer versions and edited values are refused: the file carries a hash of its own content.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "SCHEMA_VERSION",
    "BankFacts",
    "Cost",
    "EncoderEntry",
    "Environment",
    "HeadScore",
    "Metric",
    "ProtocolEntry",
    "Record",
    "StatisticsFile",
    "TaskEntry",
    "canonical_json",
]

SCHEMA_VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EncoderEntry(_Strict):
    """The encoder: every field of ``EncoderFacts``, and the weights file where the user gave one."""

    name: str
    family: str
    arch: str
    params: int
    patch: int
    resolution: int
    layers: int
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    abilities: tuple[str, ...]
    license: str | None
    source: str
    sha256: str
    notes: tuple[str, ...]
    weights: str | None = Field(None, description="file name of --weights, None for the card's own source")


class TaskEntry(_Strict):
    """The task: dataset, splits, fingerprints and sizes."""

    name: str
    kind: str
    dataset: str
    options: dict[str, Any]
    train_split: str
    test_split: str
    train_fingerprint: str
    test_fingerprint: str
    n_train: int
    n_test: int
    classes: tuple[str, ...]
    license: str | None = None


class ProtocolEntry(_Strict):
    """The protocol: its id, its hash, and every field that went into the hash."""

    id: str
    hash: str
    settings: dict[str, Any]


class Metric(_Strict):
    """One number with its 95 % interval over test images."""

    value: float
    low: float | None = None
    high: float | None = None
    unit: str = "%"
    higher_is_better: bool = True


class HeadScore(_Strict):
    """One head of a sweep and its score on the held-out part of train."""

    settings: dict[str, Any]
    score: float | None


class Cost(_Strict):
    """What the encoder costs. ``flops`` is of one image at the view, None where it can't be counted."""

    params: int
    flops: int | None
    tokens_per_image: float
    images_per_second: float | None = Field(None, description="of the pass that made the tokens; None from a warm bank")
    forwards: int = Field(description="images pushed through the encoder in this run; 0 from a warm bank")


class BankFacts(_Strict):
    """What the tokens were stored as."""

    dtype: str
    bytes: int
    keys: tuple[str, ...]


class Environment(_Strict):
    """Where the run happened."""

    rice_eval: str
    git: str | None
    python: str
    platform: str
    packages: dict[str, str]
    device: str
    threads: int


class StatisticsFile(_Strict):
    """Per-image statistics stored beside the record."""

    file: str
    kind: str
    sha256: str
    images: int


class Record(_Strict):
    """One result."""

    schema_version: Literal[1] = 1
    created: str = Field(description="UTC, ISO 8601, seconds")
    encoder: EncoderEntry
    task: TaskEntry
    protocol: ProtocolEntry
    metric: str = Field(description="headline metric: a key of `metrics`")
    metrics: dict[str, Metric]
    per_class: dict[str, dict[str, float | None]]
    view: str
    layers: tuple[int, ...]
    norm: bool
    seeds: tuple[int, ...]
    chosen: dict[str, Any] = Field(description="hyper-parameters chosen on the held-out part of train")
    heads: tuple[HeadScore, ...]
    cost: Cost
    bank: BankFacts | None
    seconds: dict[str, float] = Field(description="wall clock by phase")
    peak_memory_mb: float
    environment: Environment
    statistics: StatisticsFile | None
    skipped: tuple[str, ...] = Field((), description="images left out by --on-bad-image=skip")
    warnings: tuple[str, ...] = ()
    sha256: str = Field("", description="of the canonical JSON of every other field")

    @property
    def comparability_key(self) -> str:
        """sha256 of task, dataset fingerprints, split, metric and protocol hash: ranks exist only inside one key."""
        return hashlib.sha256(canonical_json(self.comparability()).encode()).hexdigest()[:16]

    def comparability(self) -> dict[str, str]:
        """The fields of the key, by name, for messages that say which one differs."""
        return {
            "task": self.task.name,
            "train fingerprint": self.task.train_fingerprint,
            "test fingerprint": self.task.test_fingerprint,
            "test split": self.task.test_split,
            "metric": self.metric,
            "protocol": self.protocol.id,
            "protocol hash": self.protocol.hash,
            "images skipped": ",".join(self.skipped),
        }

    def content_sha256(self) -> str:
        """What ``sha256`` must be."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json", exclude={"sha256"})).encode()).hexdigest()

    def sealed(self) -> Record:
        """The same record with its hash filled in."""
        return self.model_copy(update={"sha256": self.content_sha256()})


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no blanks, floats as Python's shortest repr: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
