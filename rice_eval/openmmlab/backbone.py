"""Any encoder of the registry as a frozen backbone of an mmengine model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS as ROOT
from mmengine.registry import Registry
from torch import Tensor
from torch.nn import functional as F

from rice_eval.adapters import load_encoder
from rice_eval.adapters.base import Encoder
from rice_eval.errors import UsageError

__all__ = ["MODELS", "EncoderBackbone"]

MODELS = Registry("model", parent=ROOT, scope="rice_eval")
"""mmengine reads ``rice_eval.Encoder`` as the name ``Encoder`` in the scope ``rice_eval``."""


@MODELS.register_module(name="Encoder")
class EncoderBackbone(BaseModule):  # type: ignore[misc]
    """A frozen encoder that gives feature maps.

    Images come from the model's data preprocessor, normalised: its ``mean`` and ``std`` are undone here, and the encoder applies its
    own. Sides are padded to the encoder's multiple, centred, with the encoder's mean (DINOv2's CenterPadding).

    Args:
        name: the encoder's name in the registry.
        weights: a checkpoint that replaces the card's.
        out_indices: layers, counted from 0 as in mmseg (-1 is the last); one map each.
        scales: a parameter-free pyramid: the last of those layers resized by each factor, in place of one map a layer. ``(4, 2, 1,
            0.5)`` gives a ViT of patch 16 the strides 4 to 32 that detectors and FPN heads expect.
        norm: whether the final norm is applied.
        mean, std: of the data preprocessor, 0 to 255, RGB.
        init_cfg: mmengine's; an encoder brings its weights itself, so it must stay None.
    """

    def __init__(
        self,
        name: str,
        weights: str | None = None,
        out_indices: Sequence[int] = (-1,),
        scales: Sequence[float] = (),
        norm: bool = True,
        mean: Sequence[float] = (123.675, 116.28, 103.53),
        std: Sequence[float] = (58.395, 57.12, 57.375),
        init_cfg: None = None,
    ) -> None:
        super().__init__(init_cfg=None)
        if init_cfg is not None:
            raise UsageError("rice_eval.Encoder takes no init_cfg", "give a checkpoint as weights=PATH")
        self._encoder: Encoder = load_encoder(name, weights=Path(weights) if weights else None)
        depth = self._encoder.facts.layers
        self._layers = self._encoder.resolve_layers([i if i < 0 else i + 1 for i in out_indices])
        self._scales, self._norm = tuple(scales), norm
        self.register_buffer("_mean", torch.tensor(mean).view(1, 3, 1, 1) / 255, persistent=False)
        self.register_buffer("_std", torch.tensor(std).view(1, 3, 1, 1) / 255, persistent=False)
        widths = self._encoder.facts.widths
        last = self._layers[-1]
        self.channels = [widths[last - 1]] * len(self._scales) if scales else [widths[n - 1] for n in self._layers]
        self.depth = depth
        self.forwards = 0
        """Images and windows seen."""
        self.tokens = 0
        """Tokens of the last layer of each of them, added up."""

    @property
    def encoder(self) -> Encoder:
        """The encoder it runs."""
        return self._encoder

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers it reads, counted from 1."""
        return tuple(self._layers)

    @property
    def norm(self) -> bool:
        """Whether the final norm is applied."""
        return self._norm

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """``(B, 3, H, W)`` normalised images to maps ``(B, D, h, w)``."""
        down, right = (-images.shape[2]) % self._encoder.multiple, (-images.shape[3]) % self._encoder.multiple
        maps = self._layer_maps(images, (right // 2, right - right // 2, down // 2, down - down // 2))
        if not self._scales:
            return tuple(maps)
        h, w = maps[-1].shape[-2:]
        sizes = [(max(1, round(h * s)), max(1, round(w * s))) for s in self._scales]
        return tuple(F.interpolate(maps[-1], size=s, mode="bilinear", align_corners=False) for s in sizes)

    def _layer_maps(self, images: Tensor, padding: tuple[int, int, int, int]) -> list[Tensor]:
        """Maps ``(B, D, h, w)`` of every layer, of normalised images padded on the left, on the right, above and below."""
        encoder = self._encoder
        if encoder.device != images.device:
            encoder.to(images.device)
        plain = images.float() * self._std + self._mean
        own = torch.tensor(encoder.facts.mean, device=images.device).view(1, 3, 1, 1)
        tokens = encoder.encode(F.pad(plain - own, padding) + own, self._layers, self._norm)
        maps = []
        for layer in self._layers:
            h, w = tokens.grids[layer]
            maps.append(tokens.patches[layer].float().clone().transpose(1, 2).reshape(len(images), -1, h, w))
        self.forwards += len(images)
        self.tokens += len(images) * h * w
        return maps
