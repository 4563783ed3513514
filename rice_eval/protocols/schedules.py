"""Learning-rate schedules of the published recipes: pure functions from a step to a factor of the peak rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

__all__ = ["SCHEDULES", "Schedule", "ScheduleName", "schedule"]

ScheduleName = Literal["poly", "poly-after-warmup", "one-cycle", "cosine"]
SCHEDULES: tuple[ScheduleName, ...] = ("poly", "poly-after-warmup", "one-cycle", "cosine")
Schedule = Callable[[int], float]


def schedule(name: ScheduleName, steps: int, warmup: int, ratio: float, power: float) -> Schedule:
    """The factor of the peak rate at each step from 0 to ``steps - 1``.

    ====================  ===============================================================================================
    ``poly``              mmcv 1's ``poly`` with linear warm-up: (1 - t/T)^power, during warm-up times 1 - (1 - t/W)(1 - ratio)
    ``poly-after-warmup`` mmengine's ``LinearLR`` over the first W steps, then ``PolyLR`` over the rest
    ``one-cycle``         DINOv3's ``WarmupOneCycleLR``: mmcv's warm-up of a falling line, then half a cosine over all steps; its
                          loop does not advance the schedule after the first step
    ``cosine``            (t + 1)/W during warm-up, then half a cosine
    ====================  ===============================================================================================

    Args:
        name: one of the above.
        steps: T.
        warmup: W.
        ratio: where warm-up starts; ``cosine`` starts at 1/W and does not read it.
        power: of the polynomial; the cosines do not read it.
    """
    if name == "poly":
        return lambda t: (1 - t / steps) ** power * _mmcv_warmup(t, warmup, ratio)
    if name == "poly-after-warmup":
        return lambda t: _mmengine(t, steps, warmup, ratio, power)
    if name == "one-cycle":
        return lambda t: _one_cycle(max(0, t - 1), steps, warmup, ratio)
    return lambda t: (t + 1) / warmup if t < warmup else _half_cosine((t - warmup) / max(1, steps - warmup))


def _half_cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def _mmcv_warmup(t: int, warmup: int, ratio: float) -> float:
    return 1 - (1 - t / warmup) * (1 - ratio) if t < warmup else 1.0


def _mmengine(t: int, steps: int, warmup: int, ratio: float, power: float) -> float:
    if t < warmup:
        return ratio + (1 - ratio) * t / (warmup - 1) if warmup > 1 else 1.0
    length = steps - warmup - 1
    return (1 - (t - warmup) / length) ** power if length > 0 else 1.0


def _one_cycle(t: int, steps: int, warmup: int, ratio: float) -> float:
    if t < warmup:
        return _mmcv_warmup(t, warmup, ratio) * (1 - t / steps)
    return _half_cosine((t + 1) / steps)
