"""FCOS heads on frozen maps: linear ones, many side by side, and one with a pyramid and shared towers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rice_eval.probes.fcos import PRIOR, Level, level_ranges
from rice_eval.probes.linear import AdamW, LinearMap
from rice_eval.probes.pyramid import SimplePyramid, Standardise

__all__ = ["LinearFcos", "PyramidFcos", "pyramid_levels"]


class LinearFcos:
    """H linear heads on the tokens of one layer: ``C + 5`` outputs a token, from standardised features.

    Weights start at zero, the class bias at ``PRIOR``, distances at one cell.

    Args:
        mean, scale: ``(D,)`` of the standardisation.
        classes: C.
        rates, decays: one a head.
        betas: AdamW's.
        device: where the heads live.
    """

    def __init__(
        self,
        mean: Tensor,
        scale: Tensor,
        classes: int,
        rates: Sequence[float],
        decays: Sequence[float],
        betas: tuple[float, float],
        device: torch.device,
    ) -> None:
        self.mean, self.scale = mean.to(device), scale.to(device)
        self.heads, self.outputs, self.device = len(rates), classes + 5, device
        columns = self.heads * self.outputs
        self.weight = torch.zeros(len(mean), columns, device=device)
        start = torch.zeros(self.outputs, device=device)
        start[:classes] = -math.log((1 - PRIOR) / PRIOR)
        self.bias = start.repeat(self.heads)[None].clone()
        self.rate = torch.tensor(list(rates), device=device).repeat_interleave(self.outputs)
        decay = torch.tensor(list(decays), device=device).repeat_interleave(self.outputs)
        self._weight_steps = AdamW((len(mean), columns), decay, betas, 1e-8, device)
        self._bias_steps = AdamW((1, columns), torch.zeros_like(decay), betas, 1e-8, device)

    def _inputs(self, tokens: Tensor) -> Tensor:
        return (tokens.to(self.device, torch.float32) - self.mean) * self.scale

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``(T, D)`` tokens to the standardised ``(T, D)`` and the outputs ``(H, T, C + 5)``."""
        x = self._inputs(tokens)
        out = torch.addmm(self.bias, x, self.weight)
        return x, out.view(-1, self.heads, self.outputs).transpose(0, 1)

    def step(self, x: Tensor, gradient: Tensor, factor: float) -> None:
        """One step of every head from the loss's gradient ``(H, T, C + 5)`` at its outputs."""
        flat = gradient.transpose(0, 1).reshape(len(x), -1)
        rate = self.rate * factor
        self._weight_steps.step(self.weight, x.T @ flat, rate)
        self._bias_steps.step(self.bias, flat.sum(dim=0, keepdim=True), rate)

    def export(self, head: int) -> LinearMap:
        """Head number ``head`` as a plain linear map of raw tokens to ``C + 5`` outputs."""
        columns = slice(head * self.outputs, (head + 1) * self.outputs)
        weight = self.weight[:, columns] * self.scale[:, None]
        return LinearMap(weight.clone(), (self.bias[0, columns] - self.mean @ weight).clone())


def pyramid_levels(grid: tuple[int, int], size: tuple[int, int], scales: Sequence[float], cells: float) -> list[Level]:
    """Levels of a pyramid on a map of ``grid`` cells over a frame of ``size`` pixels; odd sides are rounded up."""
    base = (size[0] / grid[0], size[1] / grid[1])
    ranges = level_ranges([max(base) / s for s in scales], cells)
    levels = []
    for scale, (low, high) in zip(scales, ranges):
        shape = tuple(math.ceil(side * scale) for side in grid)
        levels.append(Level((shape[0], shape[1]), (base[0] / scale, base[1] / scale), low, high))
    return levels


class PyramidFcos(nn.Module):
    """FCOS on a simple feature pyramid: a tower of convolutions for classes and one for boxes, shared by all levels.

    Args:
        mean, scale: ``(D,)`` of the standardisation.
        classes: C.
        channels: of the pyramid and towers; a multiple of 8.
        convs: 3x3 convolutions a tower, each with a group norm and ReLU.
        scales: of the pyramid, finest first.
    """

    def __init__(
        self, mean: Tensor, scale: Tensor, classes: int, channels: int, convs: int, scales: Sequence[float]
    ) -> None:
        super().__init__()
        self.inputs = Standardise(mean, scale)
        self.pyramid = SimplePyramid(len(mean), channels, scales)
        self.class_tower, self.box_tower = _tower(channels, convs), _tower(channels, convs)
        self.classes = nn.Conv2d(channels, classes, 3, padding=1)
        self.boxes = nn.Conv2d(channels, 4, 3, padding=1)
        self.centres = nn.Conv2d(channels, 1, 3, padding=1)
        # FCOS gives each level a learned factor of its distances; in log distances it is a shift.
        self.shifts = nn.Parameter(torch.zeros(len(scales)))
        for conv in (self.boxes, self.centres):
            _start(conv)
        _start(self.classes, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, D, h, w)`` maps to ``(B, L, C + 5)`` outputs, level after level."""
        out = []
        for level, features in enumerate(self.pyramid(self.inputs(x))):
            box = self.box_tower(features)
            parts = (self.classes(self.class_tower(features)), self.boxes(box) + self.shifts[level], self.centres(box))
            out.append(torch.cat(parts, dim=1).flatten(2).transpose(1, 2))
        return torch.cat(out, dim=1)


def _tower(channels: int, convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convs):
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        _start(conv)
        layers += [conv, nn.GroupNorm(max(1, channels // 8), channels), nn.ReLU()]
    return nn.Sequential(*layers)


def _start(conv: nn.Conv2d, bias: float = 0.0) -> None:
    """FCOS's initialisation of its head: a deviation of 0.01."""
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.constant_(conv.bias, bias)
