"""Student's t for any degrees of freedom from 1 up, whole or not, and for errors of several sources."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

__all__ = ["Spread", "student_cdf", "student_quantile"]

_NORMAL = NormalDist()
_MANY = 1e7
"""From this many degrees of freedom the normal distribution stands in: its tails at 2 differ by less than 1e-6."""


def student_cdf(t: float, freedom: float) -> float:
    """Probability that Student's t stays at or under ``t``; relative error of either tail under 1e-6 (under 1e-8 below a million).

    Args:
        t: any number.
        freedom: degrees of freedom, 1 or more; infinite for the normal distribution.
    """
    tail = _upper_tail(abs(t), freedom)
    return tail if t < 0 else 1.0 - tail


@lru_cache(maxsize=4096)
def student_quantile(probability: float, freedom: float) -> float:
    """The ``t`` that ``student_cdf`` gives this probability at.

    Args:
        probability: strictly between 0 and 1.
        freedom: degrees of freedom, 1 or more; infinite for the normal distribution.
    """
    if probability == 0.5:
        return 0.0
    tail = min(probability, 1.0 - probability)
    t = _first_guess(tail, freedom)
    for _ in range(200 if freedom < _MANY else 0):
        step = (_upper_tail(t, freedom) - tail) / _density(t, freedom)
        near = abs(step) < 0.1 * (1.0 + t)
        # Newton's step, and near the root Halley's, whose error is the third power of the last one.
        t += step / (1.0 - step * (freedom + 1) * t / (freedom + t * t) / 2) if near else step
        if abs(step) < 1e-4 * (1.0 + t):
            break
    return t if probability > 0.5 else -t


@dataclass(frozen=True)
class Spread:
    """How far an estimate lies from the truth, by independent sources: images, and the seeds of heads.

    A limit is the root of the sum of squares of each source's own limit (the method of variance estimates recovery, Zou and
    Donner 2008). Satterthwaite's degrees of freedom for the sum would do it more simply, but they are estimated too: where two
    seeds happen to agree they come out large, and up to 8 % of one-sided tests at 5 % are false (``docs/statistics.md``).

    Attributes:
        parts: squared standard error and degrees of freedom of each source; those that are 0 don't matter.
    """

    parts: tuple[tuple[float, float], ...]

    @property
    def se(self) -> float:
        """Standard error of all sources together."""
        return math.sqrt(math.fsum(square for square, _ in self.parts))

    def quantile(self, probability: float) -> float:
        """Distance from the truth that the estimate stays under with this probability; positive above 0.5."""
        size = math.sqrt(math.fsum(v * student_quantile(probability, n) ** 2 for v, n in self.parts if v > 0))
        return size if probability > 0.5 else -size

    def cdf(self, distance: float) -> float:
        """The probability that ``quantile`` gives this distance at."""
        parts = [(v, n) for v, n in self.parts if v > 0]
        if not parts:
            return 0.5 if distance == 0 else float(distance > 0)
        if len(parts) == 1:
            return student_cdf(distance / math.sqrt(parts[0][0]), parts[0][1])
        low, high = math.log(1e-16), math.log(0.5)  # of the tail
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if -self.quantile(math.exp(middle)) < abs(distance) else (middle, high)
        tail = math.exp(high)
        return tail if distance < 0 else 1.0 - tail


def _first_guess(tail: float, freedom: float) -> float:
    """Near the quantile, or left of it: there the tail is convex and falls, so that Newton's steps come closer and never pass."""
    z = -_NORMAL.inv_cdf(tail)
    if z * z > freedom:
        return z
    # Expansion around the normal quantile, Abramowitz and Stegun 26.7.5.
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _upper_tail(t: float, freedom: float) -> float:
    """P(T > t) for t >= 0, by the incomplete beta function (Abramowitz and Stegun 26.7.1)."""
    if freedom >= _MANY or math.isinf(t):
        return 0.5 * math.erfc(t / math.sqrt(2.0))
    square = t * t
    a, b, x = freedom / 2, 0.5, freedom / (freedom + square)
    if x < (a + 1) / (a + b + 2):
        return 0.5 * _beta_part(a, b, x, square / (freedom + square))
    return 0.5 * (1.0 - _beta_part(b, a, square / (freedom + square), x))


def _beta_part(a: float, b: float, x: float, rest: float) -> float:
    """I_x(a, b) by its continued fraction (Abramowitz and Stegun 26.5.8), evaluated from the front; ``rest`` is 1 - x."""
    if x <= 0.0:
        return 0.0
    tiny = 1e-300
    scale = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)) / a
    ratio, below = 1.0, 1.0 / _away_from(1.0 - (a + b) * x / (a + 1), tiny)
    value = below
    for m in range(1, 1000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            below = 1.0 / _away_from(1.0 + numerator * below, tiny)
            ratio = _away_from(1.0 + numerator / ratio, tiny)
            change = below * ratio
            value *= change
        if abs(change - 1.0) < 1e-14:
            break
    return scale * value


def _away_from(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny


def _density(t: float, freedom: float) -> float:
    return math.exp(
        math.lgamma((freedom + 1) / 2)
        - math.lgamma(freedom / 2)
        - 0.5 * math.log(freedom * math.pi)
        - (freedom + 1) / 2 * math.log1p(t * t / freedom)
    )
