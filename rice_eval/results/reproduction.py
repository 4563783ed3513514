"""Printed numbers of public checkpoints against our own records: does a number land on the paper?

A record counts only where it measures what was printed: the checkpoint itself, the whole split, the recipe's settings. Where it
does not, it is still listed, with what differs, and gets no verdict about the number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rice_eval.cards import TaskCard
from rice_eval.results.published import Recipe, Reference
from rice_eval.results.record import Metric, Record
from rice_eval.results.store import StoredRecord

__all__ = ["Default", "Reproduction", "reproduce"]

Default = tuple[int, Mapping[str, Any]]
"""A protocol's version and the defaults of its fields as plain JSON values; fields without one are missing."""


@dataclass(frozen=True)
class Reproduction:
    """A printed number of a public checkpoint against our record.

    Attributes:
        reference: what was printed.
        stored: our record of the same encoder, task and metric under one of the reference's recipes; None where there is none.
        recipe: the recipe that it follows.
        differs: why the record does not measure what was printed; empty where it does.
    """

    reference: Reference
    stored: StoredRecord | None
    recipe: Recipe | None = None
    differs: tuple[str, ...] = ()

    @property
    def ours(self) -> Metric | None:
        """Our number."""
        return None if self.stored is None else self.stored.record.metrics[self.reference.metric_name]

    @property
    def difference(self) -> float | None:
        """Ours minus the printed one."""
        return None if self.ours is None else self.ours.value - self.reference.value

    @property
    def verdict(self) -> str:
        """``inside`` or ``outside`` our interval, ``no interval``, ``not comparable``, or ``not run``."""
        if self.ours is None:
            return "not run"
        if self.differs:
            return "not comparable"
        if self.ours.low is None or self.ours.high is None:
            return "no interval"
        return "inside" if self.ours.low <= self.reference.value <= self.ours.high else "outside"

    @property
    def why(self) -> str:
        """What differs, and what the recipe's note says."""
        note = self.recipe.note if self.recipe is not None else ""
        return "; ".join([*self.differs, *([note] if note and note not in self.differs else [])])


def reproduce(
    published: Iterable[Reference],
    stored: Iterable[StoredRecord],
    defaults: Callable[[str], Default | None] = lambda protocol: None,
    tasks: Mapping[str, TaskCard] | None = None,
) -> list[Reproduction]:
    """Each printed number of a checkpoint that the registry knows, with each record of ours of the same thing.

    Args:
        published: from ``load_published``.
        stored: our records.
        defaults: a protocol id's version and default settings, None for one that is not known; its settings then go unchecked.
        tasks: the task cards by name; splits and options of a task that is not there go unchecked.
    """
    ours: dict[tuple[str, str, str], list[StoredRecord]] = {}
    for entry in stored:
        r = entry.record
        ours.setdefault((r.encoder.name, r.task.name, r.protocol.id), []).append(entry)
    out = []
    for reference in published:
        if reference.checkpoint is None:
            continue
        found = [
            Reproduction(
                reference,
                entry,
                recipe,
                tuple(
                    _differences(reference, recipe, entry.record, defaults, (tasks or {}).get(entry.record.task.name))
                ),
            )
            for recipe in reference.recipes
            for entry in ours.get((reference.checkpoint, reference.task or "", recipe.protocol), [])
            if reference.metric_name in entry.record.metrics
        ]
        out += found or [Reproduction(reference, None)]
    return out


def _differences(
    reference: Reference,
    recipe: Recipe,
    record: Record,
    defaults: Callable[[str], Default | None],
    card: TaskCard | None,
) -> list[str]:
    task = record.task
    lines = []
    if not recipe.comparable:
        lines.append(recipe.note)
    if record.encoder.weights is not None:
        lines.append(f"weights are the file {record.encoder.weights}, not the card's checkpoint")
    for split, have, printed in (
        ("training", task.n_train, reference.train_images),
        ("test", task.n_test, reference.test_images),
    ):
        if printed is not None and have != printed:
            lines.append(f"{have} {split} images of {printed}")
    if record.skipped:
        lines.append(f"{len(record.skipped)} test images skipped")
    if card is not None:
        for what, mine, theirs in (
            ("training split", task.train_split, card.train),
            ("test split", task.test_split, card.test),
            ("options", task.options, card.options),
        ):
            if mine != theirs:
                lines.append(f"{what} {mine or 'none'}, the task has {theirs or 'none'}")
    default = defaults(recipe.protocol)
    if default is None:
        return lines
    version, fields = default
    if record.protocol.version != version:
        lines.append(f"version {record.protocol.version} of the protocol, now {version}")
    wanted = {**fields, **recipe.settings}
    for name in sorted({*wanted} - {"seed"}):
        value = record.protocol.settings.get(name)
        if value != wanted[name]:
            lines.append(f"setting '{name}' {value!r}, the recipe has {wanted[name]!r}")
    return lines
