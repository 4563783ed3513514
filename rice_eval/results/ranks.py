"""Ranks and what is known of them: intervals by bootstrap, mean win rate, Borda points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rice_eval.metrics.statistics import Floats

__all__ = ["borda", "competition_ranks", "mean_win_rate", "rank_intervals"]

_DIGITS = 9
"""Scores are ranked at this many decimals: sums taken in another order (another BLAS) must not break a tie."""


def competition_ranks(scores: Floats) -> NDArray[np.int64]:
    """Ranks of ``(..., E)`` scores, the largest first; equal scores share the better rank (1, 2, 2, 4)."""
    rounded = np.round(scores, _DIGITS)
    order = np.argsort(-rounded, axis=-1)  # the order among equals does not matter: they share a rank
    ordered = np.take_along_axis(rounded, order, axis=-1)
    places = np.broadcast_to(np.arange(1, scores.shape[-1] + 1), scores.shape).copy()
    same = ordered[..., 1:] == ordered[..., :-1]
    places[..., 1:][same] = 0
    places = np.maximum.accumulate(places, axis=-1)
    ranks = np.empty(scores.shape, dtype=np.int64)
    np.put_along_axis(ranks, order, places, axis=-1)
    return ranks


def rank_intervals(replicates: Floats, level: float = 0.95) -> list[tuple[int, int]]:
    """Interval of each encoder's rank.

    Args:
        replicates: ``(R, E)`` scores of E encoders under R resamples, larger is better.
        level: nominal coverage.

    Returns:
        E pairs (best, worst).
    """
    tail = (1 - level) / 2
    last = len(replicates) - 1
    first, final = int(np.floor(tail * last)), int(np.ceil((1 - tail) * last))
    ranks = np.partition(competition_ranks(replicates), (first, final), axis=0)
    low, high = ranks[first], ranks[final]
    return [(int(a), int(b)) for a, b in zip(low, high)]


def mean_win_rate(boards: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Share of the other encoders that each one beats, mean over the boards it is on, in percent; ties count half.

    Args:
        boards: encoder -> score, larger is better. Boards with one encoder say nothing and are left out.
    """
    rates: dict[str, list[float]] = {}
    for board in boards:
        if len(board) < 2:
            continue
        better, tied = _beaten(board)
        for name in board:
            rates.setdefault(name, []).append(100.0 * (better[name] + tied[name] / 2) / (len(board) - 1))
    return {name: float(np.mean(r)) for name, r in rates.items()}


def borda(boards: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Borda points: on each board one point for every encoder beaten and half a point for a tie, summed over boards.

    An encoder that is missing from a board gets none there, so points compare only encoders that ran the same tasks.
    """
    points: dict[str, float] = {}
    for board in boards:
        better, tied = _beaten(board)
        for name in board:
            points[name] = points.get(name, 0.0) + better[name] + tied[name] / 2
    return points


def _beaten(board: Mapping[str, float]) -> tuple[dict[str, int], dict[str, int]]:
    """How many other encoders each one beats, and how many it ties with."""
    scores = np.round(np.array(list(board.values())), _DIGITS)
    ordered = np.sort(scores)
    left = np.searchsorted(ordered, scores, side="left")
    right = np.searchsorted(ordered, scores, side="right")
    return (
        {name: int(n) for name, n in zip(board, left)},
        {name: int(n) - 1 for name, n in zip(board, right - left)},
    )
