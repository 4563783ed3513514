"""What a protocol is: a frozen dataclass whose every field changes the number, and a function from tokens to statistics."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from rice_eval.datasets.base import Annotation, Dataset
from rice_eval.errors import UsageError
from rice_eval.metrics.statistics import Statistics
from rice_eval.registry import did_you_mean

if TYPE_CHECKING:
    import torch

    from rice_eval.adapters.base import Encoder, EncoderFacts
    from rice_eval.bank.source import TokenSource

__all__ = ["Context", "Head", "Outcome", "Panel", "Protocol", "configure"]


@dataclass(frozen=True)
class Head:
    """A head of a sweep: its settings, and its score on the held-out part of train (None where nothing was held out)."""

    settings: dict[str, Any]
    score: float | None


@dataclass(frozen=True)
class Panel:
    """What the report draws of one test image; ``truth`` and ``prediction`` are of the protocol's kind (label maps, boxes…)."""

    image_id: str
    index: int
    truth: Any
    prediction: Any


@dataclass(frozen=True)
class Outcome:
    """What a protocol found.

    Attributes:
        statistics: per-image statistics of the test split.
        chosen: hyper-parameters picked on the held-out part of train, the layer among them.
        heads: every head of the sweep.
        layers: layers whose tokens the chosen head reads.
        seconds: wall clock by phase (``fit``, ``predict``, …); passes are timed by the run.
        panels: a few test images for the report.
        warnings: what a reader must know.
        predictions: raw predictions of every test image where ``Context.keep_predictions`` asks for them.
        forwards: images the protocol pushed through the encoder itself, outside the bank's passes.
        judge: fields of a record's ``JudgeEntry``; None where no model answers questions.
        losses: training loss, ``(last step, mean)`` a window of steps.
        files: kept beside the record: name -> bytes.
        analysis: plain JSON values that the report draws beside the pictures, of the protocol's kind.
    """

    statistics: Statistics
    chosen: dict[str, Any]
    layers: tuple[int, ...]
    heads: tuple[Head, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    panels: tuple[Panel, ...] = ()
    warnings: tuple[str, ...] = ()
    predictions: Mapping[str, Any] | None = None
    forwards: int = 0
    analysis: Mapping[str, Any] | None = None
    judge: Mapping[str, Any] | None = None
    losses: tuple[tuple[float, float], ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass
class Context:
    """All a protocol may look at.

    ``tokens(split, view)`` gives the lazy source of one split (``"train"`` or ``"test"``, or a part of one that ``views``
    names) at the protocol's layers: reading it fills the bank in one pass where it is not there yet. ``scratch`` is a folder that outlives a killed run, for what lets
    the next one go on (None: nothing is kept).
    """

    facts: EncoderFacts
    encoder: Callable[[], Encoder]
    train: Dataset
    test: Dataset
    tokens: Callable[[str, str], TokenSource]
    device: torch.device
    progress: Callable[[str, int], Callable[[int], None]]
    """``progress(label, total)`` opens a bar and returns its ``advance(n)``."""
    panels: int = 8
    keep_predictions: bool = False
    scratch: Path | None = None
    lmms_python: Path | None = None
    """Interpreter that has lmms-eval, where it is to judge a model's answers."""
    weights: Path | None = None
    """Checkpoint that replaced the source of the encoder's card."""


@dataclass(frozen=True)
class Protocol:
    """Base of every protocol.

    Subclasses are frozen dataclasses; **every field is part of the hash and is read by the code**.

    Attributes:
        id: what a result's key calls it.
        kind: the kind of task it scores.
        version: raised when the code's meaning changes while the fields stay.
        needs: annotations that the dataset must provide.
        abilities: what the encoder must be able to do besides ``encode`` (``text``, ``image``, ``regions``).
        metric: the headline metric.
        rereads: whether it reads tokens more often than on the pass, so that the bank must keep them.
        distributed: whether the processes that ``torchrun`` started share its work; one that does not runs in the first alone.
    """

    id: ClassVar[str]
    kind: ClassVar[str]
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Annotation]] = frozenset()
    abilities: ClassVar[frozenset[str]] = frozenset()
    metric: ClassVar[str]
    rereads: ClassVar[bool] = False
    distributed: ClassVar[bool] = False

    view: str
    norm: bool = True
    tokens: str = "fp16"
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """Every field, as plain JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @property
    def hash(self) -> str:
        """sha256 over id, version and every field; 16 hexadecimal digits."""
        facts = {"id": self.id, "version": self.version, **self.settings()}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def layers(self, facts: EncoderFacts) -> tuple[int, ...]:
        """The layers whose tokens this protocol reads of this encoder, counted from 1."""
        return (facts.layers,)

    def views(self) -> Mapping[str, Sequence[str]]:
        """Views it reads of each split; ``train/NAME`` or ``test/NAME`` is a part that ``part`` makes."""
        return {"train": (self.view,), "test": (self.view,)}

    def part(self, name: str, dataset: Dataset) -> Dataset:
        """The dataset that this protocol derives from a split under ``name`` (crops of its lines, of its boxes).

        It has a fingerprint of its own, so that the bank keys it and protocols that derive the same share its pass.
        """
        raise KeyError(f"protocol '{self.id}' derives nothing named '{name}'")

    def needs_bank(self, facts: EncoderFacts) -> bool:
        """Whether it can't run without the bank for this encoder."""
        return self.rereads

    @abstractmethod
    def run(self, context: Context) -> Outcome:
        """Fit on train, choose on the held-out part of train, read test once."""


_P = TypeVar("_P", bound=Protocol)


def configure(protocol: type[_P], settings: Mapping[str, Any]) -> _P:
    """A protocol with some fields set from text or plain values.

    Args:
        protocol: the class.
        settings: field -> value; text is converted to the type of the field's default (tuples from comma-separated text).

    Raises:
        UsageError: a field the protocol does not have, or a value that does not fit.
    """
    fields = {f.name: f for f in dataclasses.fields(protocol)}
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in fields:
            raise UsageError(f"protocol '{protocol.id}' has no field '{name}'", did_you_mean(name, fields))
        default = fields[name].default
        if default is dataclasses.MISSING:
            default = ""  # the one field without a default is the view
        try:
            values[name] = _convert(value, default)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"protocol '{protocol.id}', field '{name}': {error}", f"its default is {default!r}"
            ) from error
    try:
        made = protocol(**values)
        if not 0 <= made.seed < 1 << 63:
            raise ValueError(f"seed is 0 or more, not {made.seed}")
        return made
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"protocol '{protocol.id}': {error}", "check its fields with rice-eval show protocol"
        ) from error


def _convert(value: Any, default: Any) -> Any:
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        table = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(value).lower() not in table:
            raise ValueError(f"'{value}' is neither true nor false")
        return table[str(value).lower()]
    if isinstance(default, tuple):
        items = [v for v in value.split(",") if v] if isinstance(value, str) else list(value)
        sample = default[0] if default else ""
        return tuple(_convert(item, sample) for item in items)
    if isinstance(default, int):
        return int(value)
    if isinstance(default, float):
        return float(value)
    return str(value) if isinstance(default, str) else value
