"""Do the intervals cover, does the gate keep its promises, and is it all fast?

    python benchmarks/statistics.py --repeats 1000 --output docs/statistics

writes ``docs/statistics.json`` and ``docs/statistics.svg``. Five parts:

* coverage: test sets of 200 images are drawn from a large population whose metric is known; how often does the nominal 95 %
  interval hold it, for this package's interval and for the percentile, basic and BCa ones of the same replicates;
* false alarms: the gate on pairs of runs of one model that differ in noise alone;
* power: the gate on pairs whose true drop is a multiple of the smallest detectable drop that it states itself;
* seeds: both of these where sides have several seeds (``simulation_seeds.py``);
* speed: 10,000 resamples of the mean IoU over 2,000 images and 150 classes.

The truth of a test set is the population's metric over the classes that the set holds: a class that no image shows can't be
asked of it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from simulation_plot import plot
from simulation_record import held_record
from simulation_seeds import seeds_promises

from rice_eval.metrics.coco import AREAS, IOU_THRESHOLDS, ApStatistics
from rice_eval.metrics.iou import IoUStatistics
from rice_eval.metrics.statistics import Statistics
from rice_eval.results.bootstrap import KIND, combine, intervals, jackknife, replicates
from rice_eval.results.gate import run_gate
from rice_eval.results.policy import Policy

Floats = NDArray[np.float64]
NORMAL = NormalDist()
IMAGES = 200


# --- populations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenes:
    """A population of labelled images, and how well a model does on each image and class.

    What it misses of a class goes, half and half, to the class's two look-alikes.
    """

    label: Floats  # (P, C) pixels
    quality: Floats  # (P, C) share of the label that the model finds
    alike: NDArray[np.intp]  # (2, C)

    @classmethod
    def make(cls, rng: np.random.Generator, size: int, classes: int, tail: float) -> Scenes:
        """``tail`` is the exponent of the class frequencies: 1 is a long tail, as in ADE20K."""
        frequency = np.clip(2.0 / np.arange(1, classes + 1) ** tail, None, 0.9)
        present = rng.random((size, classes)) < frequency
        label = np.round(present * rng.gamma(1.0, 2000, (size, classes)))
        base = rng.beta(6, 2, classes) + rng.normal(0, 0.15, (size, 1)) + rng.normal(0, 0.15, (size, classes))
        order = rng.permutation(classes)
        alike = np.empty((2, classes), dtype=np.intp)
        alike[0, order], alike[1, order] = np.roll(order, 1), np.roll(order, 2)
        return cls(label, np.clip(base, 0.02, 0.98), alike)

    def run(
        self, rng: np.random.Generator, pick: NDArray[np.intp], damage: float = 0.0, noise: float = 0.05
    ) -> IoUStatistics:
        """One run over the picked images; every run has noise of its own, and a damaged model finds less."""
        label, quality = self.label[pick], self.quality[pick] * (1 - damage)
        hit = np.round(label * np.clip(quality + rng.normal(0, noise, quality.shape), 0.0, 1.0))
        missed = label - hit
        first = np.round(missed / 2)
        predicted, matrix = hit.copy(), np.diag(hit.sum(axis=0))
        columns = np.arange(label.shape[1])
        for part, alike in ((first, self.alike[0]), (missed - first, self.alike[1])):
            np.add.at(predicted, (slice(None), alike), part)
            np.add.at(matrix, (columns, alike), part.sum(axis=0))
        areas = np.stack([hit, predicted, label], axis=1).astype(np.int64)
        names = [str(c) for c in columns]
        return IoUStatistics([str(k) for k in range(len(pick))], areas, names, matrix.astype(np.int64))


def iou_subset(whole: IoUStatistics, pick: NDArray[np.intp]) -> IoUStatistics:
    """Statistics of some images. No one reads the matrix here: any one with the right margins does, the class pairs' are kept."""
    areas = whole.areas[pick]
    hit, predicted, label = areas.sum(axis=0)
    return IoUStatistics([str(k) for k in range(len(pick))], areas, whole.classes, _margins(hit, predicted, label))


def _margins(hit: NDArray[np.int64], predicted: NDArray[np.int64], label: NDArray[np.int64]) -> NDArray[np.int64]:
    """A matrix with this diagonal and these column and row sums; entries off the diagonal may have any sign."""
    count = len(hit)
    matrix = np.diag(hit)
    # Give each row's misses to the next column, then move the running difference along: rows stay, columns come out right.
    short = 0
    for k in range(count):
        nxt = (k + 1) % count
        matrix[k, nxt] += label[k] - hit[k]
    surplus = predicted - matrix.sum(axis=0)
    for k in range(count - 1):
        short += surplus[k]
        row = (k + 2) % count
        matrix[row, k] += short
        matrix[row, (k + 1) % count] -= short
    return matrix


@dataclass(frozen=True)
class Detections:
    """A population of images with targets and a detector's answers, as the arrays of ``ApStatistics``."""

    whole: ApStatistics

    @classmethod
    def make(cls, rng: np.random.Generator, size: int, classes: int, tail: float) -> Detections:
        frequency = np.clip(2.0 / np.arange(1, classes + 1) ** tail, None, 1.5)
        counts = rng.poisson(frequency, (size, classes))
        image, label = (np.repeat(a.ravel(), counts.ravel()) for a in np.indices(counts.shape))
        skill = rng.uniform(0.4, 0.9, classes)
        ease = rng.normal(0, 0.12, size)
        found = rng.random(len(image)) < np.clip(skill[label] + ease[image], 0.05, 0.98)
        overlap = np.clip(rng.beta(6, 2, found.sum()) + ease[image[found]], 0.0, 1.0)
        false_counts = rng.poisson(0.6 * frequency + 0.02, (size, classes))
        fi, fl = (np.repeat(a.ravel(), false_counts.ravel()) for a in np.indices(counts.shape))
        scores = np.concatenate(
            [np.clip(rng.normal(0.6, 0.2, found.sum()) + 0.3 * (overlap - 0.7), 0, 1), rng.beta(2, 4, len(fi))]
        )
        hits = np.zeros((len(scores), len(AREAS), len(IOU_THRESHOLDS)), dtype=bool)
        hits[: found.sum()] = (overlap[:, None] >= IOU_THRESHOLDS)[:, None]
        where = np.argwhere(counts > 0)
        targets = np.concatenate([where, np.zeros((len(where), 1), int), counts[counts > 0][:, None]], axis=1)
        return cls(
            ApStatistics(
                tuple(map(str, range(size))), tuple(map(str, range(classes))), "coco",
                np.concatenate([image[found], fi]), np.concatenate([label[found], fl]), scores,
                np.zeros(len(scores), dtype=np.int64), hits, np.zeros_like(hits), targets.astype(np.int64),
            )
        )  # fmt: skip

    def subset(self, pick: NDArray[np.intp]) -> ApStatistics:
        """Statistics of the picked images, in that order; an image may be picked twice."""
        w = self.whole
        by_detection, by_target = _rows_of(w.detection_image, pick), _rows_of(w.targets[:, 0], pick)
        targets = w.targets[by_target[0]].copy()
        targets[:, 0] = by_target[1]
        d = by_detection[0]
        return ApStatistics(
            tuple(map(str, range(len(pick)))), w.classes, w.rule, by_detection[1], w.detection_class[d], w.detection_score[d],
            w.detection_rank[d], w.matched[d], w.ignored[d], targets,
        )  # fmt: skip


def _rows_of(image: NDArray[np.int64], pick: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows that belong to the picked images, and the picked place of each."""
    order = np.argsort(image, kind="stable")
    start = np.searchsorted(image[order], pick)
    stop = np.searchsorted(image[order], pick, side="right")
    rows = [order[a:b] for a, b in zip(start, stop)]
    place = np.repeat(np.arange(len(pick)), stop - start)
    return np.concatenate(rows), place


# --- coverage ---------------------------------------------------------------------------------------------------------


def other_intervals(value: float, reps: Floats, jack: Floats, level: float = 0.95) -> dict[str, tuple[float, float]]:
    """The textbook intervals from the same replicates (Efron and Tibshirani 1993, chapters 13 and 14)."""
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    low, high = np.quantile(reps, tails)
    share = min(max(float((reps < value).mean()), 1 / len(reps)), 1 - 1 / len(reps))
    z0 = NORMAL.inv_cdf(share)
    gap = jack.mean() - jack
    scale = 6 * float((gap**2).sum()) ** 1.5
    accel = float((gap**3).sum()) / scale if scale else 0.0
    levels = []
    for tail in tails:
        z = z0 + NORMAL.inv_cdf(float(tail))
        levels.append(NORMAL.cdf(z0 + z / (1 - accel * z)))
    bca = np.quantile(reps, levels)
    return {"percentile": (low, high), "basic": (2 * value - high, 2 * value - low), "bca": (bca[0], bca[1])}


def coverage(
    draw: Callable[[np.random.Generator], tuple[Statistics, float]],
    metric: str,
    repeats: int,
    resamples: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    """method -> share of intervals that hold the truth, and their mean width. ``draw`` gives a test set and its truth."""
    rng = np.random.default_rng(seed)
    inside: dict[str, list[bool]] = {}
    widths: dict[str, list[float]] = {}
    for repeat in range(repeats):
        statistics, truth = draw(rng)
        value = statistics.point()[metric]
        reps, jack = replicates(statistics, resamples, seed=repeat)[metric], jackknife(statistics)[metric]
        ours = combine(np.array([value]), reps, jack)
        kept = reps[np.isfinite(reps)]
        for name, (low, high) in {KIND: (ours.low, ours.high), **other_intervals(value, kept, jack)}.items():
            inside.setdefault(name, []).append(bool(low <= truth <= high))
            widths.setdefault(name, []).append(float(high - low))
    return {n: {"coverage": float(np.mean(inside[n])), "width": float(np.mean(widths[n]))} for n in inside}


def iou_draw(
    classes: int, tail: float, images: int = IMAGES
) -> Callable[[np.random.Generator], tuple[Statistics, float]]:
    """Test sets from a population of 20,000 labelled images."""
    rng = np.random.default_rng([classes, 7])
    size = 20_000
    whole = Scenes.make(rng, size, classes, tail).run(rng, np.arange(size))
    hit, predicted, label = whole.areas.sum(axis=0)
    iou = 100.0 * hit / np.maximum(predicted + label - hit, 1)

    def draw(rng: np.random.Generator) -> tuple[Statistics, float]:
        sample = iou_subset(whole, rng.integers(0, size, images))
        seen = (sample.areas[:, 1] + sample.areas[:, 2]).sum(axis=0) > 0
        return sample, float(iou[seen].mean())

    return draw


def ap_draw(
    classes: int, tail: float, images: int = IMAGES
) -> Callable[[np.random.Generator], tuple[Statistics, float]]:
    """Test sets from a population of 10,000 images with boxes."""
    rng = np.random.default_rng([classes, 8])
    size = 10_000
    population = Detections.make(rng, size, classes, tail)
    by_class = np.array(list(population.whole.per_class()["ap"].values()))

    def draw(rng: np.random.Generator) -> tuple[Statistics, float]:
        sample = population.subset(rng.integers(0, size, images))
        seen = np.unique(sample.targets[:, 1])
        return sample, float(by_class[seen].mean())

    return draw


# --- the gate ---------------------------------------------------------------------------------------------------------


def gate_pairs(
    scenes: Scenes, damage: float, repeats: int, tasks: int, policy: Policy, seed: int, images: int = IMAGES
) -> tuple[int, list[float]]:
    """How many of the pairs fail the gate, and the smallest detectable drops it states. Only the first task is damaged."""
    rng = np.random.default_rng(seed)
    failed, stated = 0, []
    for _ in range(repeats):
        baseline, candidate = [], []
        for task in range(tasks):
            pick = rng.integers(0, len(scenes.label), images)
            name = f"segmentation/t{task}"
            baseline.append(held_record("a" * 64, name, scenes.run(rng, pick)))
            candidate.append(held_record("b" * 64, name, scenes.run(rng, pick, damage if task == 0 else 0.0)))
        report = run_gate(baseline, candidate, policy)
        failed += report.exit_code == 1
        stated.append(report.verdicts[0].detectable or float("nan"))
    return failed, stated


def true_drop(scenes: Scenes, damage: float) -> float:
    """Drop of the mean IoU over the whole population."""
    everything = np.arange(len(scenes.label))
    rng = np.random.default_rng(0)
    before = scenes.run(rng, everything, 0.0).point()["miou"]
    return before - scenes.run(np.random.default_rng(0), everything, damage).point()["miou"]


def damage_for(scenes: Scenes, drop: float) -> float:
    """The damage whose true drop is ``drop``, by bisection."""
    low, high = 0.0, 0.5
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if true_drop(scenes, middle) < drop else (low, middle)
    return (low + high) / 2


def gate_promises(repeats: int, tasks: int, margin: float) -> dict[str, object]:
    """False alarms, the stated smallest detectable drop, and the share caught at multiples of it."""
    scenes = Scenes.make(np.random.default_rng(3), 4000, 20, 0.8)
    policy = Policy(margin=margin, resamples=1000, permutations=1000)
    alarms, stated = gate_pairs(scenes, 0.0, repeats, tasks, policy, seed=1)
    smallest = float(np.median(stated))
    caught = {"0": alarms / repeats}
    for multiple in (0.5, 1.0, 1.5, 2.0):
        fails, _ = gate_pairs(
            scenes, damage_for(scenes, multiple * smallest), max(repeats // 4, 20), tasks, policy, seed=2
        )
        caught[f"{multiple:g}"] = fails / max(repeats // 4, 20)
    return {"tasks": tasks, "margin": margin, "pairs": repeats, "smallest_detectable_drop": smallest, "failed": caught}


def speed() -> dict[str, float]:
    """Seconds of 10,000 resamples over 2,000 images and 150 classes, every metric of ``IoUStatistics``."""
    rng = np.random.default_rng(0)
    statistics = Scenes.make(rng, 2000, 150, 0.8).run(rng, np.arange(2000))
    start = time.perf_counter()
    intervals(statistics, resamples=10_000)
    return {"resamples": 10_000, "images": 2000, "classes": 150, "seconds": time.perf_counter() - start}


def _load(path: Path | None) -> dict[str, Any]:
    return json.loads(path.read_text()) if path is not None and path.exists() else {"coverage": {}}


def main() -> None:
    """Run the parts asked for and write the figures, keeping those of the other parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--parts", default="iou,ap,gate,seeds,speed", help="some of iou, ap, gate, seeds, speed")
    parser.add_argument("--output", type=Path, default=None, help="path without suffix; .json and .svg are written")
    options = parser.parse_args()
    parts = options.parts.split(",")
    found: dict[str, Any] = {}
    # AP is scored class by class and threshold by threshold: half the resamples, so that this ends within the hour.
    for part, name, make, classes, tail, metric, resamples in (
        ("iou", "mIoU, 20 classes", iou_draw, 20, 0.8, "miou", options.resamples),
        ("iou", "mIoU, 150 classes", iou_draw, 150, 0.8, "miou", options.resamples),
        ("iou", "mIoU, 150, long tail", iou_draw, 150, 1.0, "miou", options.resamples),
        ("ap", "AP, 10 classes", ap_draw, 10, 0.5, "ap", options.resamples // 2),
    ):
        if part not in parts:
            continue
        start = time.perf_counter()
        cover = coverage(make(classes, tail), metric, options.repeats, resamples, seed=11)
        found.setdefault("coverage", {})[name] = {"repeats": options.repeats, "resamples": resamples, "methods": cover}
        line = ", ".join(f"{m} {v['coverage']:.3f}" for m, v in cover.items())
        print(f"{name}: {line} ({time.perf_counter() - start:.0f} s)", flush=True)
    if "gate" in parts:
        found["gate"] = [
            gate_promises(options.repeats, 1, 0.0),
            gate_promises(options.repeats, 1, 0.5),
            gate_promises(max(options.repeats // 2, 20), 5, 0.0),
        ]
        for gate in found["gate"]:
            print(gate, flush=True)
    if "seeds" in parts:
        found["seeds"] = seeds_promises(options.repeats)
        for row in found["seeds"]:
            print(row, flush=True)
    if "speed" in parts:
        found["speed"] = speed()
        print(found["speed"])
    if options.output is not None:
        path = options.output.with_suffix(".json")
        merged = _load(path)
        merged["coverage"] |= found.pop("coverage", {})
        merged |= found
        path.write_text(json.dumps(merged, indent=1) + "\n")
        if merged["coverage"] and "gate" in merged:
            options.output.with_suffix(".svg").write_text(plot(merged))


if __name__ == "__main__":
    main()
