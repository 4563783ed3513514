"""Two or more runs against each other, task by task: difference, interval, p, and what moved.

Runs are compared only inside one comparability key; where the keys differ, the fields that differ are named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rice_eval.errors import RecordError
from rice_eval.metrics.statistics import METRICS, MetricInfo, Statistics
from rice_eval.results.bootstrap import same_images
from rice_eval.results.paired import Paired, holm, paired
from rice_eval.results.record import Record, differences
from rice_eval.results.store import StoredRecord

__all__ = [
    "Comparison",
    "Mover",
    "Pair",
    "Resampling",
    "Side",
    "class_movers",
    "compare",
    "image_movers",
    "match",
    "sides",
]


@dataclass(frozen=True)
class Side:
    """One encoder (one set of weights) on any number of tasks.

    Attributes:
        label: its name, with eight digits of the weights' sha256 where the name is not enough.
        records: every record of it.
    """

    label: str
    records: tuple[StoredRecord, ...]


@dataclass(frozen=True)
class Resampling:
    """How differences are tested.

    Attributes:
        resamples: bootstrap resamples of the interval.
        permutations: swaps of the permutation test.
        seed: of both.
    """

    resamples: int = 2000
    permutations: int = 5000
    seed: int = 0


@dataclass(frozen=True)
class Mover:
    """A class or an image, and its score on both sides."""

    name: str
    a: float
    b: float

    @property
    def difference(self) -> float:
        """b - a."""
        return self.b - self.a


@dataclass(frozen=True)
class Pair:
    """What two sides have on one task.

    Attributes:
        task: the task's name.
        name: task, protocol and metric in one line.
        a, b: records of the two sides, one a seed; empty where a side has none.
        problems: why the two can't be compared; empty where they can.
    """

    task: str
    name: str
    a: tuple[StoredRecord, ...]
    b: tuple[StoredRecord, ...]
    problems: tuple[str, ...] = ()

    @property
    def record(self) -> Record:
        """The first record there is."""
        return (self.a or self.b)[0].record

    @property
    def info(self) -> MetricInfo:
        """How to read the headline metric."""
        return METRICS.get(
            self.record.metric,
            MetricInfo(self.record.metric, higher_is_better=self.record.headline.higher_is_better),
        )


@dataclass(frozen=True)
class Comparison:
    """B against A on one task.

    Attributes:
        pair: the records.
        test: difference, interval and p; None where there are no statistics on both sides.
        p_adjusted: two-sided p, adjusted for the number of tasks (Holm); None where there is no test.
        difference: b - a, mean over seeds.
        classes: classes by how much they moved, most first.
        images: images by how much they moved, most first.
    """

    pair: Pair
    test: Paired | None
    p_adjusted: float | None
    difference: float
    classes: tuple[Mover, ...] = ()
    images: tuple[Mover, ...] = ()

    def outcome(self, alpha: float = 0.05) -> str:
        """``win``, ``loss`` or ``tie`` of B: a difference counts where its adjusted p is at most ``alpha``."""
        if self.p_adjusted is None or self.p_adjusted > alpha or self.difference == 0.0:
            return "tie"
        return "win" if (self.difference > 0) == self.pair.info.higher_is_better else "loss"


def sides(stored: Iterable[StoredRecord]) -> list[Side]:
    """Records grouped by encoder and weights, by label."""
    groups: dict[tuple[str, str], list[StoredRecord]] = {}
    for entry in stored:
        groups.setdefault((entry.record.encoder.name, entry.record.encoder.sha256), []).append(entry)
    names = [name for name, _ in groups]
    return [
        Side(name if names.count(name) == 1 else f"{name}@{sha[:8]}", tuple(entries))
        for (name, sha), entries in sorted(groups.items(), key=lambda item: item[0])
    ]


def _title(record: Record) -> str:
    return f"{record.task.name} {record.protocol.id} {record.metric}"


def match(a: Side, b: Side) -> list[Pair]:
    """Every task of either side, by name.

    Records with equal comparability keys make a pair. What is left of a task on both sides is a pair with problems; what only
    one side has is a pair with an empty side.
    """
    by_key: dict[str, tuple[list[StoredRecord], list[StoredRecord]]] = {}
    for k, side in enumerate((a, b)):
        for entry in side.records:
            by_key.setdefault(entry.record.comparability_key, ([], []))[k].append(entry)
    pairs = []
    left: dict[str, tuple[list[StoredRecord], list[StoredRecord]]] = {}
    for mine, theirs in by_key.values():
        record = (mine or theirs)[0].record
        if mine and theirs:
            pairs.append(Pair(record.task.name, _title(record), _by_seed(mine), _by_seed(theirs)))
            continue
        rest = left.setdefault(_title(record), ([], []))
        rest[0].extend(mine)
        rest[1].extend(theirs)
    for title, (mine, theirs) in left.items():
        task = (mine or theirs)[0].record.task.name
        if mine and theirs:
            problems = tuple(differences(mine[0].record, theirs[0].record))
        else:
            missing = b if mine else a
            problems = (_nearest_problem(missing, (mine or theirs)[0].record),)
        pairs.append(Pair(task, title, _by_seed(mine), _by_seed(theirs), problems))
    return sorted(pairs, key=lambda p: (p.name, p.record.comparability_key))


def _nearest_problem(side: Side, wanted: Record) -> str:
    for entry in side.records:
        if entry.record.task.name == wanted.task.name:
            return f"{side.label} has no record to compare with: " + "; ".join(differences(wanted, entry.record))
    return f"{side.label} has no record of this task"


def _by_seed(entries: Sequence[StoredRecord]) -> tuple[StoredRecord, ...]:
    return tuple(sorted(entries, key=lambda e: (e.record.seeds, e.record.identity)))


def statistics_of(entries: Sequence[StoredRecord]) -> list[Statistics] | None:
    """Statistics of each seed; None where a record has none."""
    if any(e.record.statistics is None for e in entries):
        return None
    return [e.statistics() for e in entries]


def paired_of(pair: Pair, tests: Resampling) -> tuple[Paired | None, list[Statistics] | None, list[Statistics] | None]:
    """The headline metric's paired test, with the statistics that it read; None where a side has none.

    Raises:
        RecordError: the two sides' statistics are not of the same images, or lack the headline metric.
    """
    a, b = statistics_of(pair.a), statistics_of(pair.b)
    if a is None or b is None:
        return None, None, None
    metric = pair.record.metric
    try:
        found = paired(
            a, b, resamples=tests.resamples, permutations=tests.permutations, seed=tests.seed, metrics=(metric,)
        )
    except ValueError as error:
        raise RecordError(f"{pair.a[0].path} and {pair.b[0].path}: {error}", "run both on the same images") from error
    if metric not in found:
        raise RecordError(f"{pair.a[0].path}: its statistics don't give '{metric}'", "run the evaluation again")
    return found[metric], a, b


def compare(a: Side, b: Side, tests: Resampling | None = None, movers: int = 10) -> list[Comparison]:
    """B against A on every task that both have.

    Args:
        a, b: the two sides.
        tests: how to test.
        movers: classes and images kept a task.

    Raises:
        RecordError: a task's records have different comparability keys (the fields are named), or there is no task in common.
    """
    pairs = match(a, b)
    for pair in pairs:
        if pair.problems and pair.a and pair.b:
            raise RecordError(
                f"{a.label} and {b.label} can't be compared on {pair.task}: " + "; ".join(pair.problems),
                "run both under the same protocol on the same data",
            )
    pairs = [p for p in pairs if not p.problems]
    if not pairs:
        raise RecordError(f"{a.label} and {b.label} have no task in common", "run both on the same tasks")
    rows = []
    for pair in pairs:
        test, ours, theirs = paired_of(pair, tests or Resampling())
        images = (
            () if ours is None or theirs is None else tuple(image_movers(ours, theirs, pair.record.metric)[:movers])
        )
        rows.append((pair, test, images))
    adjusted = iter(holm([t.p for _, t, _ in rows if t is not None]))
    return [
        Comparison(
            pair,
            test,
            None if test is None else next(adjusted),
            _mean(pair.b) - _mean(pair.a),
            tuple(class_movers(pair)[:movers]),
            images,
        )
        for pair, test, images in rows
    ]


def _mean(entries: Sequence[StoredRecord]) -> float:
    return math.fsum(e.record.headline.value for e in entries) / len(entries)


def class_movers(pair: Pair) -> list[Mover]:
    """Classes by the size of their difference, most first; of the first table a class that both sides share."""
    tables = [name for name in pair.a[0].record.per_class if name in pair.b[0].record.per_class]
    if not tables:
        return []
    # The headline's own table where there is one: iou under miou, ap under ap.
    table = next((t for t in tables if pair.record.metric.endswith(t)), tables[0])
    out = []
    for name in pair.a[0].record.per_class[table]:
        va = [e.record.per_class.get(table, {}).get(name) for e in pair.a]
        vb = [e.record.per_class.get(table, {}).get(name) for e in pair.b]
        known_a, known_b = [v for v in va if v is not None], [v for v in vb if v is not None]
        if known_a and known_b:
            out.append(Mover(name, math.fsum(known_a) / len(known_a), math.fsum(known_b) / len(known_b)))
    return sorted(out, key=lambda m: (-abs(m.difference), m.name))


def image_movers(a: Sequence[Statistics], b: Sequence[Statistics], metric: str) -> list[Mover]:
    """Images by how far the metric, taken of that image alone, moved; most first. Images that it is not defined on are left out.

    Raises:
        ValueError: the two sets don't hold the same images.
    """
    same_images(a[0], b[0])
    first, second = _alone(a, metric), _alone(b, metric)
    out = [
        Mover(n, float(x), float(y))
        for n, x, y in zip(a[0].image_ids, first, second)
        if np.isfinite(x) and np.isfinite(y)
    ]
    return sorted(out, key=lambda m: (-abs(m.difference), m.name))


def _alone(runs: Sequence[Statistics], metric: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """``(N,)`` the metric of each image alone, mean over seeds."""
    count = len(runs[0])
    parts = []
    for start in range(0, count, 500):
        rows = min(500, count - start)
        weights = np.zeros((rows, count))
        weights[np.arange(rows), start + np.arange(rows)] = 1.0
        parts.append(np.mean([run.values(weights)[metric] for run in runs], axis=0))
    return np.concatenate(parts)
