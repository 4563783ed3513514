"""L-BFGS on many problems at once: each has its own history, step and end, and one pass over the data serves all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Minimum", "minimise"]

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(points (A, P), problems (A,))`` -> values ``(A,)`` and gradients ``(A, P)``, float64."""


@dataclass(frozen=True)
class Minimum:
    """Where each problem ended.

    Attributes:
        points: ``(H, P)``.
        values: ``(H,)``.
        steps: ``(H,)`` accepted steps.
        converged: ``(H,)`` whether the gradient fell below the tolerance, or no step along it helped any more.
    """

    points: Tensor
    values: Tensor
    steps: Tensor
    converged: Tensor


def minimise(
    objective: Objective,
    start: Tensor,
    *,
    steps: int,
    tolerance: float,
    memory: int,
    trials: int,
    tell: Callable[[int], None],
) -> Minimum:
    """Minimise H smooth functions.

    Args:
        objective: value and gradient of some of the problems.
        start: ``(H, P)`` float64.
        steps: accepted steps at most.
        tolerance: a problem ends when no entry of its gradient is larger.
        memory: pairs kept of each problem.
        trials: halvings of a step at most (Armijo's rule with 1e-4); a problem that finds none ends.
        tell: called with 1 after each step.
    """
    points = start.clone()
    problems = torch.arange(len(start))
    values, gradients = objective(points, problems)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    taken = torch.zeros(len(start), dtype=torch.int64)
    converged = gradients.abs().amax(dim=1) <= tolerance
    for step in range(steps):
        if bool(converged.all()):
            break
        direction = -_times_inverse(gradients, pairs)
        slope = (direction * gradients).sum(dim=1)
        uphill = slope >= 0
        direction[uphill] = -gradients[uphill]
        slope = (direction * gradients).sum(dim=1)
        size = torch.ones(len(start), dtype=torch.float64)
        if step == 0:
            size = 1 / gradients.norm(dim=1).clamp(min=1.0)
        waiting = ~converged
        next_points, next_values, next_gradients = points.clone(), values.clone(), gradients.clone()
        for _ in range(trials):
            active = problems[waiting]
            if not len(active):
                break
            tried = points[active] + size[active, None] * direction[active]
            value, gradient = objective(tried, active)
            good = value <= values[active] + 1e-4 * size[active] * slope[active]
            accepted = active[good]
            next_points[accepted], next_values[accepted] = tried[good], value[good]
            next_gradients[accepted] = gradient[good]
            waiting[accepted] = False
            size[active[~good]] *= 0.5
        moved, change = next_points - points, next_gradients - gradients
        curvature = (moved * change).sum(dim=1)
        # A problem that did not move, or has ended, adds a pair of weight zero.
        inverse = torch.where(curvature > 1e-300, 1 / curvature.clamp(min=1e-300), 0.0)
        pairs = [*pairs, (moved, change, inverse)][-memory:]
        taken += (moved != 0).any(dim=1)
        points, values, gradients = next_points, next_values, next_gradients
        converged = converged | waiting | (gradients.abs().amax(dim=1) <= tolerance)
        tell(1)
    return Minimum(points, values, taken, converged)


def _times_inverse(gradients: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The two-loop recursion (Nocedal and Wright, algorithm 7.4), for every problem at once."""
    out = gradients.clone()
    alphas = []
    for moved, change, inverse in reversed(pairs):
        alpha = inverse * (moved * out).sum(dim=1)
        out -= alpha[:, None] * change
        alphas.append(alpha)
    scale = torch.ones(len(out), dtype=out.dtype)
    for moved, change, inverse in pairs:
        # The newest pair that a problem has sets its scale.
        squared = change.square().sum(dim=1)
        usable = (inverse > 0) & (squared > 0)
        scale = torch.where(usable, (moved * change).sum(dim=1) / squared.clamp(min=1e-300), scale)
    out *= scale[:, None]
    for (moved, change, inverse), alpha in zip(pairs, reversed(alphas)):
        beta = inverse * (change * out).sum(dim=1)
        out += (alpha - beta)[:, None] * moved
    return out
