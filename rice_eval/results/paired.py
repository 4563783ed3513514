"""Two records over the same images: difference, interval, tests, and what this set could have seen."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rice_eval.metrics.statistics import METRICS, Floats, Statistics
from rice_eval.results.bootstrap import (
    Estimate,
    Runs,
    _all_runs,
    _runs,
    cluster_index,
    combine,
    same_images,
    seed_spreads,
)
from rice_eval.results.student import Spread

__all__ = ["Paired", "detectable_drop", "holm", "paired"]

_MOST = 100_000
"""Swaps that a test goes up to by itself where its level asks for more than the caller did."""

_FEW = 10
"""So many swaps are to lie beyond the observed difference before its share of all swaps is taken for the p-value."""


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
        test: ``permutation``, or ``bootstrap``: Student's t with the bootstrap's standard error.
        images: N.
        higher_is_better: the metric's direction.
        spread: what ``se`` is made of.
        p_floor: the smallest ``p_worse`` that this test could have given, whatever the runs.
        notes: what was assumed.
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
    spread: Spread = field(default_factory=lambda: Spread(()))
    p_floor: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def drop(self) -> float:
        """How much worse B is, in the metric's unit; negative where it is better."""
        return -self.difference if self.higher_is_better else self.difference

    def detectable(self, margin: float = 0.0, alpha: float = 0.05, power: float = 0.8) -> float:
        """See ``detectable_drop``, with this pair's standard error; infinite where no p of this test can reach ``alpha``."""
        if self.p_floor > alpha:
            return math.inf
        return detectable_drop(self.spread, margin, alpha, power)


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
    finest: float = 0.0,
    directions: Mapping[str, bool] | None = None,
) -> dict[str, Paired]:
    """Compare two runs (or two sets of seeds) image by image.

    The permutation test swaps A and B within each image (cluster): all swaps where there are no more than the test may draw,
    else some at random. It is exact where the two are alike. With several seeds on a side, heads differ beyond images, so the
    test is Student's t on the bootstrap's standard error and the seeds' (``Spread``). A side with one seed against several
    borrows their variance.

    Args:
        a, b: statistics over the same images in the same order.
        resamples: bootstrap resamples, the same images for both.
        permutations: random swaps.
        seed: of both.
        level: nominal coverage of the interval.
        groups: N cluster labels.
        metrics: only these; all that both have by default.
        finest: level that p is held against, adjusted for the number of tests. Where fewer than ten of the random swaps lie beyond
            the observed difference, they are continued up to ``10 / finest`` (at most 100,000).
        directions: metric -> whether higher is better; what ``METRICS`` says where it is left out.

    Raises:
        ValueError: the sets don't hold the same images.
    """
    runs_a, runs_b = _runs(a), _runs(b)
    same_images(runs_a[0], runs_b[0])
    index = cluster_index(groups, len(runs_a[0]))
    points, reps, jacks = _all_runs([*runs_a, *runs_b], resamples, seed, index)
    split = len(runs_a)
    names = [n for n in points[0] if n in points[split] and (metrics is None or n in metrics)]
    swaps = None
    if len(runs_a) == len(runs_b) == 1:
        swaps = _Swaps.of(runs_a[0], runs_b[0], permutations, finest, seed, index, names)
    out = {}
    for name in names:
        va, vb = np.array([p[name] for p in points[:split]]), np.array([p[name] for p in points[split:]])
        difference = float(vb.mean() - va.mean())
        spreads, notes = _spreads(va, vb)
        estimate = combine(
            np.array([difference]),
            np.mean([r[name] for r in reps[split:]], axis=0) - np.mean([r[name] for r in reps[:split]], axis=0),
            np.mean([j[name] for j in jacks[split:]], axis=0) - np.mean([j[name] for j in jacks[:split]], axis=0),
            level=level,
            spreads=spreads,
        )
        info = METRICS.get(name)
        higher = (directions or {}).get(name, info is None or info.higher_is_better)
        sign = 1.0 if higher else -1.0
        found = None if swaps is None else swaps.p_values(name, sign * difference, sign)
        p, p_worse = found or _student_p(sign * difference, estimate)
        out[name] = Paired(
            metric=name,
            a=float(va.mean()),
            b=float(vb.mean()),
            difference=difference,
            low=estimate.low,
            high=estimate.high,
            se=estimate.se,
            p=p,
            p_worse=p_worse,
            test="bootstrap" if found is None else "permutation",
            images=len(runs_a[0]),
            higher_is_better=higher,
            spread=estimate.spread,
            p_floor=swaps.floor if swaps is not None and found is not None else 0.0,
            notes=notes,
        )
    return out


def _spreads(a: Floats, b: Floats) -> tuple[list[tuple[float, float]], tuple[str, ...]]:
    """What seeds add to the squared standard error of the difference, with degrees of freedom; and what that assumes."""
    if len(a) == 1 and len(b) == 1:
        return [], ()
    if len(a) > 1 and len(b) > 1:
        parts = [*seed_spreads(a), *seed_spreads(b)]
        total = math.fsum(v for v, _ in parts)
        if len(a) != len(b) or total == 0:
            return parts, ()
        # Welch's degrees of freedom hold their level where both sides have equally many seeds, and only there.
        return [(total, total**2 / math.fsum(v**2 / n for v, n in parts))], ()
    many, side, other = (a, "baseline", "candidate") if len(a) > 1 else (b, "candidate", "baseline")
    square = float(many.var(ddof=1)) * (1.0 / len(many) + 1.0)
    note = f"the {other} has one seed: the spread of the {side}'s {len(many)} seeds is taken for both"
    return [(square, len(many) - 1)], (note,)


@dataclass
class _Swaps:
    """Differences B - A after A and B were swapped in some of the images.

    Attributes:
        both: statistics of A's images, then of B's.
        index: ``(N,)`` cluster numbers, None where every image stands alone.
        names: metrics looked at.
        drawn: metric -> ``(P,)`` differences.
        every: whether these are all swaps there are.
        more: random swaps to draw yet where a p-value is that small.
        floor: the smallest one-sided p there can be.
    """

    both: Statistics
    index: NDArray[np.intp] | None
    names: Sequence[str]
    rng: np.random.Generator
    drawn: dict[str, Floats]
    every: bool
    more: int
    floor: float
    later: dict[str, Floats] | None = None

    @classmethod
    def of(
        cls,
        a: Statistics,
        b: Statistics,
        permutations: int,
        finest: float,
        seed: int,
        index: NDArray[np.intp] | None,
        names: Sequence[str],
    ) -> _Swaps | None:
        """The first swaps; None where the kind of statistics can't be joined."""
        try:
            both = a.concat(b)
        except NotImplementedError:
            return None
        units = len(a) if index is None else int(index.max()) + 1
        rng = np.random.default_rng([seed, units, 2])
        wanted = max(permutations, min(_MOST, math.ceil(_FEW / finest))) if finest > 0 else permutations
        if units < 60 and 2**units <= wanted:
            bits = (np.arange(2**units)[:, None] >> np.arange(units)) & 1
            made = cls(both, index, names, rng, {}, True, 0, 0.5**units)
            made.drawn = made._differences([bits[k : k + 1000] for k in range(0, len(bits), 1000)])
            return made
        floor = max(1.0 / (1 + wanted), 0.5**units)
        made = cls(both, index, names, rng, {}, False, wanted - permutations, floor)
        made.drawn = made._random(permutations, units)
        return made

    def _random(self, count: int, units: int) -> dict[str, Floats]:
        blocks = (
            self.rng.integers(0, 2, size=(min(1000, count - start), units), dtype=np.int8)
            for start in range(0, count, 1000)
        )
        return self._differences(blocks)

    def _differences(self, blocks: Iterable[NDArray[np.integer]]) -> dict[str, Floats]:
        parts: dict[str, list[Floats]] = {name: [] for name in self.names}
        for block in blocks:
            swap = block.astype(np.float64)
            if self.index is not None:
                swap = swap[:, self.index]
            first = self.both.values(np.concatenate([1.0 - swap, swap], axis=1))
            second = self.both.values(np.concatenate([swap, 1.0 - swap], axis=1))
            for name, found in parts.items():
                found.append(second[name] - first[name])
        return {name: np.concatenate(found) for name, found in parts.items()}

    def p_values(self, name: str, gain: float, sign: float) -> tuple[float, float] | None:
        """Two-sided and one-sided (worse) p; None where the metric is undefined on a swap.

        Args:
            name: the metric.
            gain: the observed difference, positive where B is better.
            sign: 1 where higher is better, else -1.
        """
        if not np.isfinite(self.drawn[name]).all():
            return None
        counts = _beyond(gain, sign * self.drawn[name])
        drawn = len(self.drawn[name])
        if self.every:
            return counts[0] / drawn, counts[1] / drawn
        # The observed labelling counts as one swap, so p is never 0.
        p, worse = ((1 + c) / (1 + drawn) for c in counts)
        if self.more and min(counts) < _FEW:
            if self.later is None:
                units = len(self.both) // 2 if self.index is None else int(self.index.max()) + 1
                self.later = self._random(self.more, units)
            if not np.isfinite(self.later[name]).all():
                return None
            # A tail goes on only if it was too thin: stopping on many, or at the end, keeps p valid (Besag and Clifford 1991).
            finer = [
                (1 + c + later) / (1 + drawn + self.more)
                for c, later in zip(counts, _beyond(gain, sign * self.later[name]))
            ]
            p, worse = (f if c < _FEW else old for f, c, old in zip(finer, counts, (p, worse)))
        return p, worse


def _beyond(gain: float, null: Floats) -> tuple[int, int]:
    """How many of the gains under swaps are as far from zero as the observed one, and how many are as bad."""
    slack = 1e-9 * (1.0 + abs(gain))  # equal values may differ in the last digit: sums in another order
    return int((np.abs(null) >= abs(gain) - slack).sum()), int((null <= gain + slack).sum())


def _student_p(gain: float, estimate: Estimate) -> tuple[float, float]:
    if not math.isfinite(estimate.se) or not math.isfinite(gain):
        return 1.0, 1.0
    if gain == 0.0:
        return 1.0, 1.0 if estimate.se == 0.0 else 0.5
    return 2 * estimate.spread.cdf(-abs(gain)), estimate.spread.cdf(gain)


def detectable_drop(spread: Spread, margin: float = 0.0, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest true drop that a gate sees with probability ``power``.

    The gate fails on a drop beyond ``margin`` whose one-sided p is at most ``alpha``: the observed drop has to exceed both
    ``margin`` and the spread's ``1 - alpha`` quantile.

    Args:
        spread: of the paired difference, in the metric's unit.
        margin: drop that is let through, in the metric's unit.
        alpha: level of the one-sided test.
        power: wanted probability.
    """
    return max(margin, spread.quantile(1 - alpha)) + spread.quantile(power)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for that many tests at once (Holm 1979): the family-wise error stays at the level."""
    order = sorted(range(len(p_values)), key=lambda k: p_values[k])
    adjusted = [1.0] * len(p_values)
    running = 0.0
    for rank, k in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = running
    return adjusted
