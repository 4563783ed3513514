"""Intervals over test images, for every metric that can score a weighting of images.

The interval is a bootstrap of whole images (or of clusters of images) in three steps:

1. replicates of the metric under multinomial counts of the images, as matrix products;
2. the replicates are shifted by twice their mean's offset from the estimate, which takes out the estimate's bias (the mean IoU
   over few images leans down, as every rare class that was not met a second time does; AP leans up), and half of that bias is
   added to the standard error;
3. they are stretched to the delete-one jackknife's standard error where that is wider: replicates know nothing of the spread
   of a class seen in one image only, and percentile and BCa intervals of the mean IoU then cover far too seldom
   (``docs/statistics.md`` has the simulation).

Where several seeds are given, the variance between them is added, each source with Student's tails of its own (``Spread``).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from rice_eval.metrics.statistics import METRICS, Floats, Statistics
from rice_eval.results.student import Spread

__all__ = [
    "KIND",
    "Estimate",
    "Runs",
    "combine",
    "estimates",
    "in_range",
    "intervals",
    "jackknife",
    "replicates",
    "resample_weights",
    "same_images",
    "seed_spreads",
]

KIND = "bootstrap-shifted-jackknife-width"
"""Name of the method in a record's ``interval.kind``."""

Runs = Statistics | Sequence[Statistics]
"""One run, or several that differ in their seed only, over the same images."""

_ROWS = 1000
"""Resamples drawn at once: 16 MB of weights at 2,000 images."""

_JACKKNIFE_ROWS = 500
"""Above this many images (clusters) the jackknife leaves out blocks: its error is then that of 500 pseudo-values, under 4 %."""

_BIAS_DOUBT = 0.5
"""Share of the bias that counts as standard error of its own: it was estimated from the same images. From the simulation in
``benchmarks/statistics.py``, where the bias found is between two thirds of the true one and all of it."""

_NAN_LIMIT = 0.5
"""Share of replicates that may be undefined before there is no interval."""


@dataclass(frozen=True)
class Estimate:
    """A metric, its standard error and its interval.

    Attributes:
        value: over the whole set; the mean over seeds where there are several.
        low, high: interval; NaN where the metric is undefined on most resamples.
        se: standard error over images, and over seeds where there are several.
        se_seeds: the seeds' part of ``se``; 0 where there is one.
        spread: what ``se`` is made of.
    """

    value: float
    low: float
    high: float
    se: float
    se_seeds: float = 0.0
    spread: Spread = field(default_factory=lambda: Spread(()))


def intervals(
    statistics: Runs,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, tuple[float, float]]:
    """Interval of every metric.

    Args:
        statistics: of one run, or of several seeds.
        resamples: bootstrap resamples.
        seed: of the resampling; equal seeds draw equal images for every encoder.
        level: nominal coverage.
        groups: N labels; images with the same label (frames of a video, crops of a scan) are resampled as one.

    Returns:
        metric -> (low, high); NaN for both where the metric is undefined on most resamples.
    """
    return {name: (e.low, e.high) for name, e in estimates(statistics, resamples, seed, level, groups).items()}


def estimates(
    statistics: Runs,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Estimate]:
    """Estimate, standard error and interval of every metric; arguments as in ``intervals``."""
    runs = _runs(statistics)
    index = cluster_index(groups, len(runs[0]))
    points, reps, jacks = _all_runs(runs, resamples, seed, index)
    out = {}
    for name in points[0]:
        values = np.array([p[name] for p in points])
        estimate = combine(
            values,
            np.mean([r[name] for r in reps], axis=0),
            np.mean([j[name] for j in jacks], axis=0),
            level=level,
        )
        out[name] = _clipped(name, estimate)
    return out


def _runs(statistics: Runs) -> list[Statistics]:
    runs = [statistics] if isinstance(statistics, Statistics) else list(statistics)
    if not runs:
        raise ValueError("no statistics given")
    for other in runs[1:]:
        same_images(runs[0], other)
    return runs


def same_images(a: Statistics, b: Statistics) -> None:
    """ValueError unless both sets hold the same images in the same order."""
    if a.image_ids == b.image_ids:
        return
    missing = set(a.image_ids) ^ set(b.image_ids)
    what = f"'{sorted(missing)[0]}' is in one only" if missing else "their order differs"
    raise ValueError(f"the two sets don't hold the same images: {what}")


_Named = dict[str, Floats]


def _all_runs(
    runs: Sequence[Statistics], resamples: int, seed: int, index: NDArray[np.intp] | None
) -> tuple[list[dict[str, float]], list[_Named], list[_Named]]:
    points = [run.point() for run in runs]
    parts: list[list[_Named]] = [[] for _ in runs]
    for weights in resample_weights(len(runs[0]), resamples, seed, index):
        for run, found in zip(runs, parts):
            found.append(run.values(weights))
    reps = [{name: np.concatenate([c[name] for c in found]) for name in found[0]} for found in parts]
    leave_out = _jackknife_weights(len(runs[0]), seed, index)
    return points, reps, [run.values(leave_out) for run in runs]


def seed_spreads(values: Floats) -> list[tuple[float, float]]:
    """Squared standard error of the mean of ``(S,)`` seeds and its degrees of freedom; nothing where there is one seed."""
    count = len(values)
    return [(float(values.var(ddof=1)) / count, count - 1)] if count > 1 else []


def combine(
    values: Floats,
    replicates: Floats,
    leave_one_out: Floats,
    level: float = 0.95,
    spreads: Sequence[tuple[float, float]] | None = None,
) -> Estimate:
    """Steps 2 and 3 of the interval, and the seeds' part.

    Args:
        values: ``(S,)`` the metric of each seed over the whole set.
        replicates: ``(R,)`` mean over seeds under each resample.
        leave_one_out: ``(J,)`` mean over seeds with one image, cluster or block left out.
        level: nominal coverage.
        spreads: squared standard errors to add, each with its degrees of freedom; those of ``values`` by default.
    """
    value = float(values.mean())
    kept = replicates[np.isfinite(replicates)]
    left = leave_one_out[np.isfinite(leave_one_out)]
    if not math.isfinite(value) or len(kept) < (1 - _NAN_LIMIT) * len(replicates) or len(kept) < 2 or len(left) < 2:
        return Estimate(value, math.nan, math.nan, math.nan)
    spread = float(kept.std(ddof=1))
    bias = float(kept.mean()) - value
    se_images = math.hypot(max(spread, jackknife_se(left)), _BIAS_DOUBT * bias)
    seeds = seed_spreads(values) if spreads is None else list(spreads)
    sources = Spread(((se_images**2, len(left) - 1), *seeds))
    if sources.se <= 1e-12 * max(1.0, abs(value)):
        return Estimate(value, value, value, 0.0)
    centre = value - bias
    tail = (1 - level) / 2
    if spread > 1e-9 * sources.se:  # else nothing but the rounding of sums
        low, high = (float(q) for q in np.quantile(kept - kept.mean(), [tail, 1 - tail]) / spread)
    else:
        high = NormalDist().inv_cdf(1 - tail)
        low = -high
    # The replicates' shape, with tails as wide as Student's.
    width = sources.quantile(1 - tail) / NormalDist().inv_cdf(1 - tail)
    return Estimate(
        value=value,
        low=min(value, centre + low * width),
        high=max(value, centre + high * width),
        se=sources.se,
        se_seeds=math.sqrt(math.fsum(square for square, _ in seeds)),
        spread=sources,
    )


def in_range(name: str, low: float, high: float) -> tuple[float, float]:
    """An interval of a metric cut to what the metric can be."""
    info = METRICS.get(name)
    if info is None or info.unit != "%":
        return low, high
    top = 100.0 if info.higher_is_better else math.inf  # error rates can pass 100 %
    return float(np.clip(low, 0.0, top)), float(np.clip(high, 0.0, top))


def _clipped(name: str, estimate: Estimate) -> Estimate:
    low, high = in_range(name, estimate.low, estimate.high)
    return replace(estimate, low=low, high=high)


def cluster_index(groups: Sequence[Hashable] | None, images: int) -> NDArray[np.intp] | None:
    """``(N,)`` cluster number of each image, None where every image stands alone. ValueError for a wrong number of labels."""
    if groups is None:
        return None
    if len(groups) != images:
        raise ValueError(f"{len(groups)} group labels for {images} images")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(g, len(numbers)) for g in groups], dtype=np.intp)
    return None if len(numbers) == images else index


def resample_weights(
    images: int, resamples: int, seed: int = 0, index: NDArray[np.intp] | None = None
) -> Iterator[Floats]:
    """Multinomial counts of images, in blocks of at most 1,000 resamples.

    Args:
        images: N.
        resamples: R.
        seed: equal seeds give equal counts.
        index: ``(N,)`` cluster numbers, 0 to G - 1; G clusters are drawn instead of N images.

    Yields:
        ``(r, N)`` counts; every row is one resample.
    """
    units = images if index is None else int(index.max()) + 1
    rng = np.random.default_rng([seed, units])
    for start in range(0, resamples, _ROWS):
        rows = min(_ROWS, resamples - start)
        drawn = rng.integers(0, units, size=(rows, units), dtype=np.int64)
        drawn += np.arange(0, rows * units, units, dtype=np.int64)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units).astype(np.float64)
        yield counts if index is None else counts[:, index]


def replicates(
    statistics: Statistics, resamples: int = 2000, seed: int = 0, groups: Sequence[Hashable] | None = None
) -> dict[str, Floats]:
    """metric -> ``(R,)`` bootstrap replicates; the same seed draws the same images for every encoder."""
    index = cluster_index(groups, len(statistics))
    parts = [statistics.values(w) for w in resample_weights(len(statistics), resamples, seed, index)]
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def jackknife(statistics: Statistics, groups: Sequence[Hashable] | None = None, seed: int = 0) -> dict[str, Floats]:
    """metric -> ``(J,)`` values with one image, cluster, or block of them left out."""
    return statistics.values(_jackknife_weights(len(statistics), seed, cluster_index(groups, len(statistics))))


def jackknife_se(leave_one_out: Floats) -> float:
    """Standard error from ``(J,)`` leave-one-out values."""
    count = len(leave_one_out)
    return math.sqrt((count - 1) / count * float(((leave_one_out - leave_one_out.mean()) ** 2).sum()))


def _jackknife_weights(images: int, seed: int, index: NDArray[np.intp] | None) -> Floats:
    units = images if index is None else int(index.max()) + 1
    block = _blocks(units, seed)
    member = block if index is None else block[index]
    weights = np.ones((int(block.max()) + 1, images))
    weights[member, np.arange(images)] = 0.0
    return weights


@lru_cache(maxsize=8)
def _blocks(units: int, seed: int) -> NDArray[np.intp]:
    """``(units,)`` number of the block that each unit is left out with: itself up to 500 units, else one of 500 at random."""
    if units <= _JACKKNIFE_ROWS:
        return np.arange(units)
    shuffled = np.random.default_rng([seed, units, 1]).permutation(units)
    return (shuffled % _JACKKNIFE_ROWS).astype(np.intp)
