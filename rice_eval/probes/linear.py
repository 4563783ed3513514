"""Linear heads on frozen tokens, many side by side: one matrix product serves every head of a layer.

A head is a batch norm without learned scale, then a linear map to C logits. On frozen features the running statistics of
a batch norm converge to the mean and variance of the training set, so those are computed once and used throughout; a
learned scale would be absorbed by the linear map. The loss is convex in the weights: heads start at zero, and the seed
decides the order of batches alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["AdamW", "HeadGroup", "LinearMap", "ManyHeads", "Moments", "warmup_cosine"]


class Moments:
    """Sums for the mean and variance of each feature; two of them merge by addition.

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.square = torch.zeros(dim, dtype=torch.float64)

    def add(self, tokens: Tensor) -> None:
        """Take in ``(T, D)`` tokens."""
        if not tokens.shape[0]:
            return
        # Centred in float32, put together in float64: features with a large mean lose nothing.
        variance, mean = (part.double().cpu() for part in torch.var_mean(tokens.float(), dim=0, correction=0))
        self.count += tokens.shape[0]
        self.total += tokens.shape[0] * mean
        self.square += tokens.shape[0] * (variance + mean.square())

    def __add__(self, other: Moments) -> Moments:
        out = Moments(self.total.shape[0])
        out.count = self.count + other.count
        out.total = self.total + other.total
        out.square = self.square + other.square
        return out

    def standardisation(self, eps: float) -> tuple[Tensor, Tensor]:
        """``(D,)`` mean and ``(D,)`` 1 / sqrt(variance + eps), float32. The variance is the biased one, as a batch norm's."""
        mean = self.total / max(self.count, 1)
        variance = (self.square / max(self.count, 1) - mean.square()).clamp(min=0)
        return mean.float(), (variance + eps).rsqrt().float()


@dataclass(frozen=True)
class LinearMap:
    """``logits = tokens @ weight + bias``: a trained head with its standardisation folded in.

    Attributes:
        weight: ``(D, C)``.
        bias: ``(C,)``.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, tokens: Tensor) -> Tensor:
        """``(..., D)`` tokens -> ``(..., C)`` float32 logits."""
        return tokens.to(self.weight.device, torch.float32) @ self.weight + self.bias


class AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on one matrix whose columns have rates and decays of their own.

    Equal to ``torch.optim.AdamW`` on each column's parameters.

    Args:
        shape: ``(rows, columns)`` of the parameter.
        decay: ``(columns,)`` weight decay.
        betas, eps: as in torch.
    """

    def __init__(
        self, shape: tuple[int, int], decay: Tensor, betas: tuple[float, float], eps: float, device: torch.device
    ) -> None:
        self.first = torch.zeros(shape, device=device)
        self.second = torch.zeros(shape, device=device)
        self.decay, self.betas, self.eps, self.count = decay, betas, eps, 0

    def step(self, parameter: Tensor, gradient: Tensor, rate: Tensor) -> None:
        """Update ``parameter`` in place; ``rate`` is ``(columns,)``."""
        one, two = self.betas
        self.count += 1
        self.first.lerp_(gradient, 1 - one)
        self.second.mul_(two).addcmul_(gradient, gradient, value=1 - two)
        parameter.mul_(1 - rate * self.decay)
        scale = (self.second / (1 - two**self.count)).sqrt_().add_(self.eps)
        parameter.sub_(self.first / scale * (rate / (1 - one**self.count)))


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the rate at ``step`` (from 0): linear from 1/warmup to 1, then half a cosine to 0 at the end."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class ManyHeads:
    """H linear heads of one width that read the same layer, side by side in one matrix, each with its own rate and decay.

    Args:
        moments: of the layer's training tokens.
        width: W, outputs of a head.
        rates: H learning rates.
        decays: H weight decays (of the weights, not of the biases).
        betas: AdamW's.
        norm_eps: of the batch norm.
        device: where the heads live.
    """

    def __init__(
        self,
        moments: Moments,
        width: int,
        rates: tuple[float, ...],
        decays: tuple[float, ...],
        betas: tuple[float, float],
        norm_eps: float,
        device: torch.device,
    ) -> None:
        if len(rates) != len(decays):
            raise ValueError("one rate and one decay a head")
        mean, scale = moments.standardisation(norm_eps)
        self.mean, self.scale = mean.to(device), scale.to(device)
        self.heads, self.width, self.device = len(rates), width, device
        columns = self.heads * width
        self.weight = torch.zeros(mean.shape[0], columns, device=device)
        self.bias = torch.zeros(1, columns, device=device)
        self.rate = torch.tensor(rates, device=device).repeat_interleave(width)
        decay = torch.tensor(decays, device=device).repeat_interleave(width)
        self._weight_steps = AdamW((mean.shape[0], columns), decay, betas, 1e-8, device)
        self._bias_steps = AdamW((1, columns), torch.zeros_like(decay), betas, 1e-8, device)

    def standardised(self, tokens: Tensor) -> Tensor:
        """``(T, D)`` tokens with the training set's mean 0 and variance 1."""
        return (tokens.to(self.device, torch.float32) - self.mean) * self.scale

    def outputs(self, standardised: Tensor) -> Tensor:
        """``(T, D)`` -> ``(T, H * W)``, head by head."""
        return torch.addmm(self.bias, standardised, self.weight)

    def update(self, standardised: Tensor, gradient: Tensor, factor: float) -> None:
        """One step of AdamW from the gradient of ``outputs``, ``(T, H * W)``; ``factor`` is of the learning rates."""
        rate = self.rate * factor
        self._weight_steps.step(self.weight, standardised.T @ gradient, rate)
        self._bias_steps.step(self.bias, gradient.sum(dim=0, keepdim=True), rate)

    def export(self, head: int) -> LinearMap:
        """Head number ``head`` as a plain linear map of raw tokens to its W outputs."""
        columns = slice(head * self.width, (head + 1) * self.width)
        weight = self.weight[:, columns] * self.scale[:, None]
        return LinearMap(weight.clone(), (self.bias[0, columns] - self.mean @ weight).clone())


class HeadGroup(ManyHeads):
    """``ManyHeads`` of C classes, trained on the same batches by token cross-entropy.

    Args:
        moments, rates, decays, betas, norm_eps, device: see ``ManyHeads``.
        classes: C.
        cells: K, parts of a token (a K-th of its area each) that have logits of their own; a head's outputs are K times C.
    """

    def __init__(
        self,
        moments: Moments,
        classes: int,
        rates: tuple[float, ...],
        decays: tuple[float, ...],
        betas: tuple[float, float],
        norm_eps: float,
        device: torch.device,
        cells: int = 1,
    ) -> None:
        super().__init__(moments, cells * classes, rates, decays, betas, norm_eps, device)
        self.classes, self.cells = classes, cells

    def logits(self, tokens: Tensor) -> Tensor:
        """``(T, D)`` tokens -> ``(T * K, H, C)`` logits, the cells of a token side by side."""
        flat = self.outputs(self.standardised(tokens)).view(-1, self.heads, self.cells, self.classes)
        return flat.transpose(1, 2).reshape(-1, self.heads, self.classes)

    def step(self, tokens: Tensor, counts: Tensor, factor: float) -> Tensor:
        """One step of every head.

        The gradient is written out, (softmax * n - counts) / sum(n), so that no graph is kept.

        Args:
            tokens: ``(T, D)``.
            counts: ``(T * K, C)`` label histograms.
            factor: of the learning rates.

        Returns:
            ``(H,)`` losses before the step. A batch with no labelled pixel changes nothing and has a loss of 0.
        """
        counts = counts.to(self.device).view(-1, self.cells, self.classes)
        weight = counts.sum(dim=2)
        keep = weight.sum(dim=1) > 0
        if not bool(keep.all()):
            tokens, counts, weight = tokens[keep.to(tokens.device)], counts[keep], weight[keep]
        total = weight.sum()
        if not len(weight):
            return torch.zeros(self.heads, device=self.device)
        x = self.standardised(tokens)
        flat = self.outputs(x)
        log_p = torch.log_softmax(flat.view(-1, self.heads, self.cells, self.classes), dim=-1)
        loss = -torch.einsum("thx,tx->h", log_p.flatten(2), counts.flatten(1)) / total
        residual = log_p.exp_().mul_((weight / total)[:, None, :, None]).sub_((counts / total)[:, None])
        self.update(x, residual.view(flat.shape), factor)
        return loss
