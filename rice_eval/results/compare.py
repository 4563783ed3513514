"""Two or more runs against each other, task by task: difference, interval, p, and what moved.

Runs are compared only inside one comparability key; where the keys differ, the fields that differ are named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rice_eval.errors import RecordError
from rice_eval.metrics.statistics import MetricInfo, Statistics
from rice_eval.results.bootstrap import same_images
from rice_eval.results.paired import Paired, holm, paired
from rice_eval.results.record import Record, differences
from rice_eval.results.runs import encoder_labels, metric_info, unique_runs
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
    "left_out",
    "match",
    "sides",
]


@dataclass(frozen=True)
class Side:
    """One encoder (one set of weights) on any number of tasks.

    Attributes:
        label: its name, with digits of the weights' sha256 where the name is not enough.
        records: every record of it.
    """

    label: str
    records: tuple[StoredRecord, ...]


@dataclass(frozen=True)
class Resampling:
    """How differences are tested.

    Attributes:
        resamples: bootstrap resamples of the interval.
        permutations: swaps of the permutation test, which draws more by itself where ``alpha`` asks for them.
        seed: of both.
        alpha: level that p-values are held against, over all tasks together.
    """

    resamples: int = 2000
    permutations: int = 5000
    seed: int = 0
    alpha: float = 0.05


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
        return metric_info(self.record)


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
    """Records grouped by encoder and weights, by label; a run that is there twice counts once.

    Raises:
        RecordError: two records of one run with different contents.
    """
    groups: dict[tuple[str, str], list[StoredRecord]] = {}
    for _, entry in unique_runs(stored):
        groups.setdefault((entry.record.encoder.name, entry.record.encoder.sha256), []).append(entry)
    labels = encoder_labels(groups)
    return [Side(labels[key], tuple(entries)) for key, entries in sorted(groups.items())]


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
            problems = (_nearest_problem(mine, b) if mine else _nearest_problem(theirs, a, first=False),)
        pairs.append(Pair(task, title, _by_seed(mine), _by_seed(theirs), problems))
    return sorted(pairs, key=lambda p: (p.name, p.record.comparability_key))


def _nearest_problem(held: Sequence[StoredRecord], missing: Side, first: bool = True) -> str:
    """Why ``missing`` has nothing for what the other side holds; ``first`` where that is side A."""
    wanted = held[0].record
    for entry in missing.records:
        if entry.record.task.name == wanted.task.name:
            both = (wanted, entry.record) if first else (entry.record, wanted)
            return f"{missing.label} has no record to compare with: " + "; ".join(differences(*both))
    return f"{missing.label} has no record of this task"


def _by_seed(entries: Sequence[StoredRecord]) -> tuple[StoredRecord, ...]:
    return tuple(sorted(entries, key=lambda e: (e.record.seeds, e.record.identity)))


def statistics_of(entries: Sequence[StoredRecord]) -> list[Statistics] | None:
    """Statistics of each seed; None where a record has none."""
    if any(e.record.statistics is None for e in entries):
        return None
    return [e.statistics() for e in entries]


def paired_of(
    pair: Pair, tests: Resampling, together: int = 1
) -> tuple[Paired | None, list[Statistics] | None, list[Statistics] | None]:
    """The headline metric's paired test, with the statistics that it read; None where a side has none.

    Args:
        pair: records of both sides.
        tests: how to test.
        together: tests that are made at once, which share ``tests.alpha``.

    Raises:
        RecordError: the two sides' statistics are not of the same images, or lack the headline metric.
    """
    a, b = statistics_of(pair.a), statistics_of(pair.b)
    if a is None or b is None:
        return None, None, None
    metric = pair.record.metric
    try:
        found = paired(
            a,
            b,
            resamples=tests.resamples,
            permutations=tests.permutations,
            seed=tests.seed,
            metrics=(metric,),
            finest=tests.alpha / max(1, together),
            directions={metric: pair.info.higher_is_better},
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
    kept = [p for p in pairs if not p.problems]
    if not kept:
        shared = {e.record.task.name for e in a.records} & {e.record.task.name for e in b.records}
        near = next((p for p in pairs if p.task in shared), None)
        if near is not None:
            raise RecordError(
                f"{a.label} and {b.label} can't be compared on {near.task}: {near.problems[0]}",
                "run both under the same protocol on the same data",
            )
        raise RecordError(f"{a.label} and {b.label} have no task in common", "run both on the same tasks")
    rows = []
    for pair in kept:
        test, ours, theirs = paired_of(pair, tests or Resampling(), len(kept))
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


def left_out(a: Side, b: Side) -> list[Pair]:
    """What one of two sides alone has, and why it was not compared (``problems``)."""
    return [p for p in match(a, b) if not (p.a and p.b)]


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
