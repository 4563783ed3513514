"""Feature pyramids on one frozen map: ViTDet's learned one, and one without parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LayerNorm2d", "PlainPyramid", "SimplePyramid", "Standardise", "check_scales"]


def check_scales(scales: Sequence[float]) -> None:
    """ValueError unless the scales are powers of two from 1/8 to 8, falling."""
    known = [8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125]
    if not scales or list(scales) != [s for s in known if s in scales]:
        raise ValueError(f"scales {', '.join(map(str, scales))} are not falling powers of two from 8 to 0.125")


class Standardise(nn.Module):
    """Channels to zero mean and unit variance by fixed numbers: what a batch norm's running statistics converge to.

    Args:
        mean, scale: ``(D,)``, from ``rice_eval.probes.linear.Moments``.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.view(1, -1, 1, 1).clone())
        self.register_buffer("scale", scale.view(1, -1, 1, 1).clone())

    def forward(self, x: Tensor) -> Tensor:
        """``(B, D, h, w)`` to the same shape, float32."""
        return (x.float() - self.mean) * self.scale


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of ``(B, D, h, w)``, as ViTDet uses it."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )


class SimplePyramid(nn.Module):
    """ViTDet's simple feature pyramid (Li et al., arXiv 2203.16527, section 3): every level from the last map alone.

    A scale above 1 is made by transposed convolutions of stride 2 that halve the channels each (norm and GELU between two),
    one below 1 by max-pooling; then a 1x1 and a 3x3 convolution to ``out`` channels, a layer norm after each.

    Args:
        dim: channels of the map.
        out: channels of every level.
        scales: of the levels against the map, finest first.
    """

    def __init__(self, dim: int, out: int, scales: Sequence[float]) -> None:
        super().__init__()
        check_scales(scales)
        self.stages = nn.ModuleList()
        for scale in scales:
            layers: list[nn.Module] = []
            width = dim
            while scale > 1:
                if layers:
                    layers += [LayerNorm2d(width), nn.GELU()]
                layers.append(_doubled(width, max(width // 2, 1)))
                width, scale = max(width // 2, 1), scale / 2
            if scale < 1:
                layers.append(_Pool(round(1 / scale)))
            layers += [nn.Conv2d(width, out, 1, bias=False), LayerNorm2d(out)]
            layers += [nn.Conv2d(out, out, 3, padding=1, bias=False), LayerNorm2d(out)]
            self.stages.append(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        """``(B, D, h, w)`` to one ``(B, out, h_l, w_l)`` a level."""
        return [stage(x) for stage in self.stages]


class PlainPyramid(nn.Module):
    """A pyramid without parameters (RICE, arXiv 2507.20025, detection probe): max-pooling below 1, repeated cells above.

    Args:
        scales: of the levels against the map, finest first.
    """

    def __init__(self, scales: Sequence[float]) -> None:
        super().__init__()
        check_scales(scales)
        self.scales = tuple(scales)

    def forward(self, x: Tensor) -> list[Tensor]:
        """``(B, D, h, w)`` to one ``(B, D, h_l, w_l)`` a level."""
        out = []
        for scale in self.scales:
            if scale > 1:
                out.append(F.interpolate(x, scale_factor=scale, mode="nearest"))
            else:
                out.append(x if scale == 1 else _pooled(x, round(1 / scale)))
        return out


def _doubled(width: int, out: int) -> nn.ConvTranspose2d:
    """A transposed convolution of stride 2 whose four places start alike, as nearest upsampling after one linear map (ICNR, arXiv 1707.02937).

    Started at random, each place is a projection of its own, and what a RoI averages over them cancels: at four times the map a
    region's features began with half their spread, and classes were learnt several times more slowly.
    """
    conv = nn.ConvTranspose2d(width, out, 2, stride=2)
    with torch.no_grad():
        conv.weight.copy_(conv.weight[:, :, :1, :1].expand_as(conv.weight).clone())
    return conv


class _Pool(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return _pooled(x, self.size)


def _pooled(x: Tensor, size: int) -> Tensor:
    """Max-pooling; odd sides are rounded up, so that no border is lost."""
    return F.max_pool2d(x, size, stride=size, ceil_mode=True)
