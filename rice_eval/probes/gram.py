"""Closed-form probes from sums: linear discriminant analysis (LDA) and ridge regression at every strength at once.

One pass adds up the class weights n_c, the class sums of features and X'X; both probes, their cross-validation (a fold's sums
are subtracted from the whole) and merging across machines (sums are added) need nothing else, and no feature is stored.
A token counts in each class by the share of its labelled pixels. No step size, no seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rice_eval.probes.linear import LinearMap

__all__ = ["NEVER", "GramSums", "lda", "ridge"]

NEVER = -1e30
"""Logit of a class that training never saw: finite, so that interpolating it makes no NaN."""


@dataclass(frozen=True)
class GramSums:
    """Weighted sums over tokens, all float64; ``a + b`` merges two parts, ``a - b`` leaves a part out.

    Attributes:
        n: ``(C,)`` weight of each class.
        sums: ``(C, D)`` weighted sum of the features of each class.
        xx: ``(D, D)`` weighted sum of outer products.
    """

    n: Tensor
    sums: Tensor
    xx: Tensor

    @classmethod
    def zeros(cls, classes: int, dim: int, device: torch.device | None = None) -> GramSums:
        """Sums of nothing."""
        return cls(
            *(torch.zeros(s, dtype=torch.float64, device=device) for s in ((classes,), (classes, dim), (dim, dim)))
        )

    def add(self, tokens: Tensor, weights: Tensor) -> None:
        """Take in tokens, in place.

        Products are made of centred float32 features and the means put back in float64, so that features with a large mean
        lose nothing.

        Args:
            tokens: ``(T, D)``.
            weights: ``(T, C)`` weight of each token in each class; tokens with none are left out.
        """
        device = self.xx.device
        weights = weights.to(device)
        mass = weights.sum(dim=1)
        keep = mass > 0
        if not bool(keep.any()):
            return
        x, weights, mass = tokens.to(device)[keep].double(), weights[keep].double(), mass[keep].double()
        total, sums = mass.sum(), weights.T @ x
        mean = sums.sum(dim=0) / total
        centred = (x - mean).float() * mass.sqrt().float()[:, None]
        self.n.add_(weights.sum(dim=0))
        self.sums.add_(sums)
        self.xx.add_((centred.T @ centred).double()).add_(total * torch.outer(mean, mean))

    def __add__(self, other: GramSums) -> GramSums:
        return GramSums(self.n + other.n, self.sums + other.sums, self.xx + other.xx)

    def __sub__(self, other: GramSums) -> GramSums:
        # Rounding may leave a class that only the other part has with a weight of some 1e-13: it is gone.
        n = self.n - other.n
        gone = n <= 1e-9 * self.n
        return GramSums(
            torch.where(gone, 0.0, n),
            torch.where(gone[:, None], 0.0, self.sums - other.sums),
            self.xx - other.xx,
        )


def _decompose(covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, eigenvalues and eigenvectors of the correlation matrix: ``(D,)``, ``(D,)``, ``(D, D)``.

    Working on the correlation makes shrinkage blind to the features' units. A feature that never varies gets scale 0, which
    takes it out of the head.
    """
    variance = covariance.diagonal()
    alive = variance > 1e-12 * variance.max().clamp(min=1e-300)
    scale = torch.where(alive, variance.clamp(min=1e-300).rsqrt(), 0.0)
    values, vectors = torch.linalg.eigh(scale[:, None] * covariance * scale[None, :])
    return scale, values.clamp(min=0), vectors


def lda(sums: GramSums, shrinkages: Sequence[float], prior: bool) -> list[LinearMap]:
    """Linear discriminant analysis at each shrinkage, from one eigendecomposition.

    With S the pooled within-class correlation, the shrunk one is ``(1 - s) S + s I`` (Friedman 1989; the trace of a correlation
    over D is 1). Logits are ``x' S^-1 m_c - m_c' S^-1 m_c / 2``, plus ``log n_c / n`` with a prior.

    Args:
        sums: of the training tokens.
        shrinkages: s, each in (0, 1].
        prior: whether frequent classes are favoured.

    Returns:
        One head a shrinkage. A class with no weight gets the logit ``NEVER``.

    Raises:
        ValueError: a shrinkage outside (0, 1], or no weight at all.
    """
    if any(not 0 < s <= 1 for s in shrinkages):
        raise ValueError("shrinkages are in (0, 1]")
    total = sums.n.sum()
    if not total > 0:
        raise ValueError("no labelled token")
    present = sums.n > 0
    means = sums.sums / sums.n.clamp(min=1e-300)[:, None]
    means = torch.where(present[:, None], means, 0.0)
    centre = sums.sums.sum(dim=0) / total
    within = (sums.xx - (means * sums.n[:, None]).T @ means) / total
    scale, values, vectors = _decompose(within)
    # Means relative to the centre: the shift cancels between classes and keeps the numbers small.
    turned = ((means - centre) * scale) @ vectors
    heads = []
    for s in shrinkages:
        solved = turned / ((1 - s) * values + s)
        weight = (solved @ vectors.T) * scale
        bias = -0.5 * (solved * turned).sum(dim=1) - weight @ centre
        if prior:
            bias = bias + torch.log(sums.n.clamp(min=1e-300) / total)
        bias = torch.where(present, bias, NEVER)
        heads.append(LinearMap(weight.T.float().contiguous(), bias.float()))
    return heads


def ridge(sums: GramSums, strengths: Sequence[float]) -> list[LinearMap]:
    """Ridge regression of the class shares, with an intercept, at each strength, from one eigendecomposition.

    Minimises the mean over tokens of ``|W' z + b - y|^2`` plus ``strength * |W|^2``, z being the features over their standard
    deviations.

    Args:
        sums: of the training tokens.
        strengths: each positive.

    Returns:
        One head a strength; a class with no weight gets the logit ``NEVER``.

    Raises:
        ValueError: a strength that is not positive, or no weight at all.
    """
    if any(not s > 0 for s in strengths):
        raise ValueError("strengths are positive")
    total = sums.n.sum()
    if not total > 0:
        raise ValueError("no labelled token")
    centre, share = sums.sums.sum(dim=0) / total, sums.n / total
    scale, values, vectors = _decompose(sums.xx / total - torch.outer(centre, centre))
    cross = sums.sums / total - torch.outer(share, centre)
    turned = (cross * scale) @ vectors
    heads = []
    for strength in strengths:
        weight = ((turned / (values + strength)) @ vectors.T) * scale
        bias = torch.where(sums.n > 0, share - weight @ centre, NEVER)
        heads.append(LinearMap(weight.T.float().contiguous(), bias.float()))
    return heads
