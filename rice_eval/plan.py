"""The plan of a matrix: which encoder meets which task through which protocol, refused before any work where it can't be."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

from rice_eval.cards import Catalogue, TaskCard, catalogue
from rice_eval.datasets import load_dataset
from rice_eval.datasets.base import Dataset
from rice_eval.datasets.subset import Subset
from rice_eval.errors import DataError, PlanError, UsageError
from rice_eval.protocols.base import Protocol, configure
from rice_eval.registry import protocols
from rice_eval.views import View

__all__ = ["EncoderRef", "Job", "Plan", "TaskRef", "make_plan", "parse_encoder", "task_for_dataset"]

DEFAULT_PROTOCOL = {
    "segmentation": "linear",
    "detection": "fcos-linear",
    "regions": "region-linear",
    "ocr": "text-mask",
}
DEFAULT_VIEW = "square=448"


@dataclass(frozen=True)
class EncoderRef:
    """An encoder as the user names it: ``name`` of the registry, or ``label`` when ``weights`` replaces the card's source."""

    name: str
    weights: Path | None = None

    def __str__(self) -> str:
        return self.name if self.weights is None else f"{self.name}@{self.weights.name}"


@dataclass(frozen=True)
class TaskRef:
    """A task and where its data lie."""

    card: TaskCard
    data: Path | None = None
    limit_train: int | None = None
    limit_test: int | None = None


@dataclass(frozen=True)
class Job:
    """One cell of the matrix for one protocol."""

    encoder: EncoderRef
    task: TaskRef
    protocol: Protocol


@dataclass(frozen=True)
class Plan:
    """Jobs in the order they run (by encoder, so that each is loaded once), and the datasets they read."""

    jobs: tuple[Job, ...]
    datasets: Mapping[tuple[str, str], Dataset]
    include: tuple[Path, ...] = ()

    def dataset(self, task: TaskRef, split: str) -> Dataset:
        """``split`` is ``"train"`` or ``"test"``."""
        return self.datasets[(task.card.name, split)]

    def part(self, job: Job, split: str) -> Dataset:
        """What a split of ``Protocol.views`` stands for: the task's dataset, or what the protocol derives from it."""
        base, _, name = split.partition("/")
        dataset = self.dataset(job.task, base)
        return job.protocol.part(name, dataset) if name else dataset


def parse_encoder(text: str, weights: Path | None = None) -> EncoderRef:
    """``NAME`` or ``NAME@WEIGHTS``."""
    if weights is None and "@" in text and not text.startswith("file:"):
        name, _, path = text.partition("@")
        return EncoderRef(name, Path(path))
    return EncoderRef(text, weights)


def task_for_dataset(cards: Catalogue, kind: str, dataset: str, options: Mapping[str, Any]) -> TaskCard:
    """The task card of ``kind`` on ``dataset`` with these reader options.

    A shipped card whose options agree is taken as it is. Otherwise its nearest relative is changed, and named after what was
    changed, so that two different sets of options never share a task's name.
    """
    same = [c for c in cards.tasks.values() if c.kind == kind and c.dataset == dataset]
    fitting = [c for c in same if {**c.options, **options} == c.options]
    if fitting:
        # Without options the plainest card stands for the dataset.
        return min(fitting, key=lambda c: (c.name != f"{kind}/{dataset}", len(c.name), c.name))
    suffix = "".join(f"-{k}-{v}" for k, v in sorted(options.items()))
    slug = "".join(ch if ch.isalnum() or ch in ".-" else "-" for ch in f"{dataset}{suffix}".lower()).strip("-")
    if len(slug) > 80:
        slug = f"{slug[:60]}-{hashlib.sha256(slug.encode()).hexdigest()[:8]}"
    if same:
        base = min(same, key=lambda c: (c.name != f"{kind}/{dataset}", len(c.name), c.name))
        return base.model_copy(update={"name": f"{kind}/{slug}", "options": {**base.options, **options}})
    if kind not in DEFAULT_PROTOCOL:
        raise PlanError(f"no {kind} task card reads the dataset '{dataset}'", "see rice-eval list tasks")
    protocol = cast("type[Protocol]", protocols.get(DEFAULT_PROTOCOL[kind]))
    return TaskCard.model_validate(
        {
            "name": f"{kind}/{slug}",
            "title": dataset,
            "kind": kind,
            "dataset": dataset,
            "options": dict(options),
            "view": DEFAULT_VIEW,
            "protocol": protocol.id,
            "metric": protocol.metric,
        }
    )


def make_plan(
    encoders: Sequence[EncoderRef],
    tasks: Sequence[TaskRef],
    *,
    protocol_ids: Sequence[str] = (),
    view: str | None = None,
    settings: Mapping[str, Any] | None = None,
    include: Sequence[Path] = (),
) -> Plan:
    """Every encoder with every task and protocol.

    Args:
        encoders: at least one.
        tasks: at least one.
        protocol_ids: protocols to run on every task; the card's own where empty.
        view: replaces the card's view; part of the protocol's hash.
        settings: fields of the protocols, by name.
        include: folders with more cards.

    Raises:
        PlanError: a pair that can't work, with the first reason found.
        NotFoundError, UsageError, DataError: a name, a value or a dataset that is wrong.
    """
    if not encoders or not tasks:
        raise UsageError(
            "a run needs at least one --encoder and one task", "see rice-eval list encoders and list tasks"
        )
    cards = catalogue(tuple(include))
    if len(set(encoders)) != len(encoders) or len({t.card.name for t in tasks}) != len(tasks):
        raise UsageError("an encoder or a task is given twice", "give each once")
    opened: dict[tuple[str, str], Dataset] = {}
    jobs = []
    for encoder in encoders:
        if encoder.name in cards.encoders or ":" not in encoder.name:
            cards.encoder(encoder.name)
        if encoder.weights is not None and not _there(encoder.weights):
            raise UsageError(f"--weights {encoder.weights}: no such file or folder", "check the path")
    for task in tasks:
        chosen = [_protocol(task.card, pid, view, settings or {}) for pid in (protocol_ids or (task.card.protocol,))]
        for encoder in encoders:
            for protocol in chosen:
                _check_pair(cards, encoder, task.card, protocol)
        for split in ("train", "test"):
            opened[(task.card.name, split)] = _open(task, split, chosen)
        _check_things(opened[(task.card.name, "train")], opened[(task.card.name, "test")], chosen)
        jobs += [Job(encoder, task, protocol) for encoder in encoders for protocol in chosen]
    jobs.sort(key=lambda job: list(encoders).index(job.encoder))
    return Plan(tuple(jobs), opened, tuple(include))


def _there(weights: Path) -> bool:
    """Whether a checkpoint exists: a file, a folder, or a pattern that fits the parts of one."""
    return weights.exists() or bool(weights.name and any(weights.parent.glob(weights.name)))


def _protocol(card: TaskCard, protocol_id: str, view: str | None, settings: Mapping[str, Any]) -> Protocol:
    kind = cast("type[Protocol]", protocols.get(protocol_id))
    for name in card.settings:
        protocols.get(name)  # a misspelt one would change nothing, in silence
    if kind.kind != card.kind:
        raise PlanError(
            f"protocol '{protocol_id}' scores {kind.kind}, and task '{card.name}' is {card.kind}",
            "choose a protocol of that kind (rice-eval list protocols)",
        )
    own_view = any(f.name == "view" and f.default is not dataclasses.MISSING for f in dataclasses.fields(kind))
    # A published recipe has a view of its own, which only --view replaces; the card's is for protocols that have none.
    chosen = {"view": view} if view else {} if own_view else {"view": card.view}
    protocol = configure(kind, {**chosen, **card.settings.get(protocol_id, {}), **settings})
    for views in protocol.views().values():
        for text in views:
            View.parse(text)
    return protocol


def _check_pair(cards: Catalogue, encoder: EncoderRef, task: TaskCard, protocol: Protocol) -> None:
    """Refuse what the cards alone can refuse: sides that the patch does not divide, an ability that is missing."""
    if encoder.name not in cards.encoders:
        return  # without a card nothing is known before loading; the encoder itself refuses then
    card = cards.encoders[encoder.name][1]
    if "text" in protocol.abilities and not card.text:
        raise PlanError(
            f"protocol '{protocol.id}' on task '{task.name}' needs a text tower, and encoder '{card.name}' has none",
            "choose an encoder with one (rice-eval list encoders --text)",
        )
    if not card.public and encoder.weights is None:
        raise PlanError(f"the weights of '{card.name}' are not public", "give your own with --weights PATH")
    for views in protocol.views().values():
        for text in views:
            _check_view(View.parse(text), card.patch, card.name)


def _check_view(view: View, patch: int, name: str) -> None:
    """Refuse a view whose frames have sides that ``patch`` does not divide, where the view alone can tell."""
    if (view.pad or patch) % patch == 0:
        return
    resolved = view.resolve(patch)
    side = resolved.crop or (resolved.side if view.base in ("square", "letterbox") else 0)
    if side and side % patch == 0:
        return
    nearest = max(1, round((side or resolved.side or 448) / patch)) * patch
    fix = f"--view {view.base}={nearest}" if view.base in ("square", "letterbox") else f"--view {view},pad=patch"
    raise PlanError(
        f"view '{view}' gives sides that are no multiple of the patch of '{name}' ({patch} px)", f"use {fix}"
    )


def _check_things(train: Dataset, test: Dataset, chosen: Sequence[Protocol]) -> None:
    """Refuse splits that number other things where a protocol learns the numbers of one and is scored by those of the other."""
    learnt = [
        p for p in chosen if "instances" in p.needs and any(key.partition("/")[0] == "train" for key in p.views())
    ]
    if not learnt or train.things == test.things:
        return
    pairs = enumerate(zip_longest(train.things, test.things))
    place, (first, second) = next((k, pair) for k, pair in pairs if pair[0] != pair[1])
    raise DataError(
        f"dataset '{train.name}': splits '{train.split}' and '{test.split}' have different classes "
        f"({len(train.things)} and {len(test.things)}; class {place} is {first!r} in the one and {second!r} in the other)",
        "list the same categories, with the same ids, in both annotation files",
    )


def _open(task: TaskRef, split: str, chosen: Sequence[Protocol]) -> Dataset:
    card = task.card
    limit = task.limit_train if split == "train" else task.limit_test
    dataset = load_dataset(card.dataset, card.train if split == "train" else card.test, task.data, card.options)
    if limit is not None:
        dataset = Subset(dataset, limit)
    if len(dataset) == 0:
        raise PlanError(f"split '{dataset.split}' of dataset '{card.dataset}' has no images", "check --data")
    for protocol in chosen:
        lacking = protocol.needs - dataset.provides
        if lacking:
            raise PlanError(
                f"protocol '{protocol.id}' needs {', '.join(sorted(lacking))} annotations, and dataset "
                f"'{card.dataset}' ({dataset.split}) has {', '.join(sorted(dataset.provides)) or 'none'}",
                "choose another task",
            )
    return dataset
