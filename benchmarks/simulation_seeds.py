"""False alarms and power where heads were trained under several seeds: a part of ``simulation.py``.

Runs of one model differ by a shift of their seed and by noise in each image; a side's value is the mean over its seeds.
"""

from __future__ import annotations

import numpy as np

from rice_eval.metrics.statistics import RatioStatistics
from rice_eval.results.paired import Paired, paired

SIDES = ((2, 2), (3, 3), (5, 5), (3, 1), (1, 3), (2, 5))
"""Seeds of the baseline and of the candidate."""

NOISES = (0.02, 0.1)
"""Standard deviation of a run's noise in an image (a share); over 100 images 0.2 and 1 point of the mean, against 1 point a seed."""

IMAGES, SEED_SD = 100, 0.01


def _test(rng: np.random.Generator, seeds: tuple[int, int], noise: float, drop: float) -> Paired:
    images = rng.uniform(0.3, 0.7, IMAGES)
    names = tuple(map(str, range(IMAGES)))
    runs = []
    for k in range(sum(seeds)):
        shift = rng.normal(0, SEED_SD) - (drop / 100 if k >= seeds[0] else 0.0)
        score = images + shift + rng.normal(0, noise, IMAGES)
        runs.append(RatioStatistics(names, score[:, None], np.ones((IMAGES, 1)), ("accuracy",)))
    return paired(runs[: seeds[0]], runs[seeds[0] :], resamples=200)["accuracy"]


def seeds_promises(repeats: int) -> list[dict[str, object]]:
    """For each number of seeds and noise: false alarms, the smallest detectable drop stated (median), and the share caught of twice it."""
    found: list[dict[str, object]] = []
    for seeds in SIDES:
        for noise in NOISES:
            rng = np.random.default_rng([*seeds, int(1000 * noise)])
            tests = [_test(rng, seeds, noise, 0.0) for _ in range(repeats)]
            stated = float(np.median([t.detectable() for t in tests]))
            few = max(repeats // 4, 20)
            caught = sum(_test(rng, seeds, noise, 2 * stated).p_worse <= 0.05 for _ in range(few))
            found.append(
                {
                    "seeds": list(seeds),
                    "noise": noise,
                    "pairs": repeats,
                    "one_sided": sum(t.p_worse <= 0.05 for t in tests) / repeats,
                    "two_sided": sum(t.p <= 0.05 for t in tests) / repeats,
                    "covered": sum(t.low <= 0 <= t.high for t in tests) / repeats,
                    "smallest_detectable_drop": stated,
                    "caught_at_twice": caught / few,
                }
            )
    return found
