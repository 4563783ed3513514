"""The record: one strict JSON file a run of (encoder, task, protocol).

Unknown fields, newer versions and edited values are refused: the file carries a hash of its own content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "SCHEMA_VERSION",
    "BankFacts",
    "Cost",
    "EncoderEntry",
    "Environment",
    "HeadScore",
    "IntervalEntry",
    "JudgeEntry",
    "Metric",
    "ProtocolEntry",
    "Record",
    "StatisticsFile",
    "TaskEntry",
    "canonical_json",
    "differences",
    "field_digests",
    "record_text",
    "seal",
    "settings_hash",
    "text_sha256",
]

SCHEMA_VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, ser_json_inf_nan="constants")


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
    """The protocol: its id, its hash, and everything that went into the hash."""

    id: str
    hash: str
    settings: dict[str, Any]
    version: int = Field(1, ge=1, description="version of the protocol's code")

    @property
    def comparable_hash(self) -> str:
        """The hash without the seed: runs that differ in their seed alone measure the same thing."""
        return settings_hash(self.id, self.version, {k: v for k, v in self.settings.items() if k != "seed"})


class IntervalEntry(_Strict):
    """How the intervals of ``metrics`` were made."""

    kind: str = Field(description="name of the method, e.g. bca")
    level: float = Field(0.95, gt=0, lt=1)
    resamples: int = Field(gt=0)
    seed: int = 0
    groups: int | None = Field(None, description="clusters resampled as wholes; None where images were resampled")


class Metric(_Strict):
    """One number with its interval over test images; how it was made stands in ``Record.interval``."""

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


class JudgeEntry(_Strict):
    """Who asked a multimodal model and scored its answers."""

    name: str = Field(description="lmms-eval, or rice-eval for the judge in this package")
    version: str
    task: str = Field(description="the judge's own name of the task")
    task_version: str
    task_hash: str = Field(description="sha256 over the task's configuration, 16 digits")
    prompts_sha256: str = Field(description="over ids, prompts and truths, in order")
    questions: int


class Record(_Strict):
    """One result."""

    schema_version: Literal[1] = 1
    created: str = Field(description="UTC, ISO 8601, seconds")
    encoder: EncoderEntry
    task: TaskEntry
    protocol: ProtocolEntry
    metric: str = Field(description="headline metric: a key of `metrics`")
    metrics: dict[str, Metric]
    interval: IntervalEntry | None = Field(None, description="how low and high of `metrics` were made")
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
    judge: JudgeEntry | None = Field(None, description="of multimodal models' answers; None for other kinds")
    losses: tuple[tuple[float, float], ...] = Field(
        (), description="training loss: last step of each window of steps, its mean loss"
    )
    files: dict[str, str] = Field(
        default_factory=dict, description="files kept beside the record, in its `.files` folder: name -> sha256"
    )
    skipped: tuple[str, ...] = Field((), description="images left out by --on-bad-image=skip")
    warnings: tuple[str, ...] = ()
    digests: dict[str, str] = Field(
        default_factory=dict,
        description="field -> first 12 digits of the sha256 of its canonical JSON; names an edited field",
    )
    sha256: str = Field("", description="of the file with this one value left empty")

    @model_validator(mode="after")
    def _headline(self) -> Record:
        if self.metric not in self.metrics:
            raise ValueError(f"metric '{self.metric}' is not among metrics: {', '.join(sorted(self.metrics))}")
        return self

    @property
    def headline(self) -> Metric:
        """The metric that ranks: ``metrics[metric]``."""
        return self.metrics[self.metric]

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
            "protocol hash": self.protocol.comparable_hash,
            "images skipped": ",".join(self.skipped),
        }

    @property
    def identity(self) -> str:
        """16 hexadecimal digits that say what was run: comparability key, encoder, its weights and the seeds."""
        return self.identity_of(self.comparability_key)

    def identity_of(self, comparability_key: str) -> str:
        """``identity`` for a caller that has the comparability key at hand."""
        facts = (comparability_key, self.encoder.name, self.encoder.sha256, self.protocol.hash, *map(str, self.seeds))
        return hashlib.sha256("\x00".join(facts).encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def sealed(self) -> Record:
        """The same record with its digests and hash filled in."""
        return self.model_copy(update=dict(zip(("digests", "sha256"), seal(self.model_dump(mode="json")))))


def record_text(content: Mapping[str, Any]) -> str:
    """A record's file: JSON with sorted keys, one blank of indent a level, floats as Python's shortest repr, a final newline."""
    return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def text_sha256(content: Mapping[str, Any]) -> str:
    """What a record's ``sha256`` must be: of its file with that one value left empty."""
    return hashlib.sha256(record_text({**content, "sha256": ""}).encode()).hexdigest()


def seal(content: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """``digests`` and ``sha256`` of a record given as plain JSON values; old ones in ``content`` don't matter."""
    digests = field_digests(content)
    return digests, text_sha256({**content, "digests": digests})


def field_digests(content: Mapping[str, Any]) -> dict[str, str]:
    """A short digest a top-level field, one a metric under ``metrics``."""
    parts: dict[str, Any] = {k: v for k, v in content.items() if k not in ("sha256", "digests", "metrics")}
    parts |= {f"metrics.{name}": value for name, value in dict(content.get("metrics", {})).items()}
    return {k: hashlib.sha256(canonical_json(v).encode()).hexdigest()[:12] for k, v in parts.items()}


def settings_hash(id: str, version: int, settings: Mapping[str, Any]) -> str:
    """The hash of a protocol from what its record says: 16 hexadecimal digits, the rule of ``Protocol.hash``."""
    facts = {"id": id, "version": version, **settings}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def differences(a: Record, b: Record) -> list[str]:
    """Why two records can't be compared: one line a field of the comparability key that differs; empty if they can."""
    lines = []
    theirs = b.comparability()
    for name, mine in a.comparability().items():
        if mine == theirs[name]:
            continue
        if name == "protocol hash" and a.protocol.id == b.protocol.id:
            lines += _settings_differences(a.protocol, b.protocol)
        else:
            lines.append(f"{name}: {mine or 'none'} against {theirs[name] or 'none'}")
    return lines


def _settings_differences(a: ProtocolEntry, b: ProtocolEntry) -> list[str]:
    lines = [] if a.version == b.version else [f"protocol version: {a.version} against {b.version}"]
    for key in sorted({*a.settings, *b.settings} - {"seed"}):
        mine, theirs = a.settings.get(key), b.settings.get(key)
        if mine != theirs:
            lines.append(f"protocol setting '{key}': {mine!r} against {theirs!r}")
    return lines


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no blanks, floats as Python's shortest repr: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
