"""Two records over the same images: difference, interval, tests, and what this set could have seen."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from rice_eval.metrics.statistics import METRICS, Floats, Statistics
from rice_eval.results.bootstrap import Runs, _all_runs, _runs, cluster_index, combine, same_images

__all__ = ["Paired", "detectable_drop", "holm", "paired"]


@dataclass(frozen=True)
class Paired:
    """B against A on one metric.

    Attributes:
        a, b: the metric of each, mean over seeds.
        difference: b - a.
        low, high: its interval.
        se: its standard error.
        p: two-sided: permutation of A and B image by image where the statistics allow it, else from the bootstrap.
        p_worse: one-sided: how often a difference this much worse (by the metric's direction) comes up when A and B are alike.
        test: ``permutation`` or ``bootstrap``.
        images: N.
        higher_is_better: the metric's direction.
    """

    metric: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    se: float
    p: float
    p_worse: float
    test: str
    images: int
    higher_is_better: bool

    @property
    def drop(self) -> float:
        """How much worse B is, in the metric's unit; negative where it is better."""
        return -self.difference if self.higher_is_better else self.difference

    def detectable(self, margin: float = 0.0, alpha: float = 0.05, power: float = 0.8) -> float:
        """See ``detectable_drop``, with this pair's standard error."""
        return detectable_drop(self.se, margin, alpha, power)


def paired(
    a: Runs,
    b: Runs,
    *,
    resamples: int = 2000,
    permutations: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    groups: Sequence[Hashable] | None = None,
    metrics: Sequence[str] | None = None,
) -> dict[str, Paired]:
    """Compare two runs (or two sets of seeds) image by image.

    The permutation test swaps A and B within each image (cluster) at random; it is exact where the two are alike. With several
    seeds on a side, heads differ beyond images, so the test is the bootstrap's with the seeds' variance in it.

    Args:
        a, b: statistics over the same images in the same order.
        resamples: bootstrap resamples, the same images for both.
        permutations: random swaps.
        seed: of both.
        level: nominal coverage of the interval.
        groups: N cluster labels.
        metrics: only these; all that both have by default.

    Raises:
        ValueError: the sets don't hold the same images.
    """
    runs_a, runs_b = _runs(a), _runs(b)
    same_images(runs_a[0], runs_b[0])
    index = cluster_index(groups, len(runs_a[0]))
    points, reps, jacks = _all_runs([*runs_a, *runs_b], resamples, seed, index)
    swapped = None
    if len(runs_a) == len(runs_b) == 1:
        swapped = _permuted(runs_a[0], runs_b[0], permutations, seed, index)
    split = len(runs_a)
    names = [n for n in points[0] if n in points[split] and (metrics is None or n in metrics)]
    out = {}
    for name in names:
        va, vb = np.array([p[name] for p in points[:split]]), np.array([p[name] for p in points[split:]])
        estimate = combine(
            np.array([vb.mean() - va.mean()]),
            np.mean([r[name] for r in reps[split:]], axis=0) - np.mean([r[name] for r in reps[:split]], axis=0),
            np.mean([j[name] for j in jacks[split:]], axis=0) - np.mean([j[name] for j in jacks[:split]], axis=0),
            level=level,
        )
        se_seeds = math.sqrt(sum(v.var(ddof=1) / len(v) for v in (va, vb) if len(v) > 1))
        se = math.hypot(estimate.se, se_seeds)
        stretch = se / estimate.se if estimate.se > 0 else 1.0
        info = METRICS.get(name)
        sign = -1.0 if info is not None and not info.higher_is_better else 1.0
        difference = float(vb.mean() - va.mean())
        if swapped is not None and np.isfinite(swapped[name]).all():
            p, p_worse = _permutation_p(sign * difference, sign * swapped[name])
        else:
            p, p_worse = _normal_p(sign * difference, se)
        out[name] = Paired(
            metric=name,
            a=float(va.mean()),
            b=float(vb.mean()),
            difference=difference,
            low=difference + (estimate.low - difference) * stretch,
            high=difference + (estimate.high - difference) * stretch,
            se=se,
            p=p,
            p_worse=p_worse,
            test="bootstrap" if swapped is None else "permutation",
            images=len(runs_a[0]),
            higher_is_better=sign > 0,
        )
    return out


def _permuted(
    a: Statistics, b: Statistics, permutations: int, seed: int, index: NDArray[np.intp] | None
) -> dict[str, Floats] | None:
    """metric -> ``(P,)`` differences after random swaps; None where the kind of statistics can't be joined."""
    try:
        both = a.concat(b)
    except NotImplementedError:
        return None
    units = len(a) if index is None else int(index.max()) + 1
    rng = np.random.default_rng([seed, units, 2])
    parts = []
    for start in range(0, permutations, 1000):
        swap = rng.integers(0, 2, size=(min(1000, permutations - start), units), dtype=np.int8).astype(np.float64)
        if index is not None:
            swap = swap[:, index]
        first = both.values(np.concatenate([1.0 - swap, swap], axis=1))
        second = both.values(np.concatenate([swap, 1.0 - swap], axis=1))
        parts.append({name: second[name] - first[name] for name in first})
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def _permutation_p(gain: float, null: Floats) -> tuple[float, float]:
    """Two-sided and one-sided (worse) p; the observed labelling counts as one permutation, so p is never 0."""
    slack = 1e-9 * (1.0 + abs(gain))  # equal values may differ in the last digit: sums in another order
    extreme = int((np.abs(null) >= abs(gain) - slack).sum())
    worse = int((null <= gain + slack).sum())
    return (1 + extreme) / (1 + len(null)), (1 + worse) / (1 + len(null))


def _normal_p(gain: float, se: float) -> tuple[float, float]:
    if not math.isfinite(se) or not math.isfinite(gain):
        return 1.0, 1.0
    if se == 0.0:
        return (1.0, 1.0) if gain == 0.0 else (0.0, 0.0 if gain < 0 else 1.0)
    worse = NormalDist().cdf(gain / se)
    return min(1.0, 2 * min(worse, 1 - worse)), worse


def detectable_drop(se: float, margin: float = 0.0, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest true drop that a gate sees with probability ``power``.

    The gate fails on a drop beyond ``margin`` whose one-sided p is at most ``alpha``. The observed drop is normal around the
    true one with standard error ``se``, so it has to exceed both ``margin`` and ``z(1 - alpha) * se``.

    Args:
        se: standard error of the paired difference, in the metric's unit.
        margin: drop that is let through, in the metric's unit.
        alpha: level of the one-sided test.
        power: wanted probability.
    """
    normal = NormalDist()
    return max(margin, normal.inv_cdf(1 - alpha) * se) + normal.inv_cdf(power) * se


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for that many tests at once (Holm 1979): the family-wise error stays at the level."""
    order = sorted(range(len(p_values)), key=lambda k: p_values[k])
    adjusted = [1.0] * len(p_values)
    running = 0.0
    for rank, k in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = running
    return adjusted
