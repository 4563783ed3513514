"""The floors of every leaderboard: colour statistics, and a Vision Transformer that has learnt nothing."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from rice_eval.adapters.base import Encoder, EncoderFacts, LoadRequest, Tokens, fingerprint_of
from rice_eval.adapters.blocks import IMAGENET_MEAN, IMAGENET_STD, ModuleEncoder, describe, split_tokens
from rice_eval.adapters.vit import PlainViT
from rice_eval.errors import CardError, UsageError

__all__ = ["PlainViTEncoder", "RgbMoments", "adapter"]


class RgbMoments(Encoder):
    """Mean and population standard deviation of R, G and B over each patch: one layer, D = 6."""

    def __init__(self, facts: EncoderFacts) -> None:
        self.facts = facts

    def _encode(self, images: Tensor, layers: tuple[int, ...], norm: bool) -> Tokens:
        b, c, height, width = images.shape
        p = self.facts.patch
        h, w = height // p, width // p
        patches = images.float().view(b, c, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, c, p * p)
        deviation, mean = torch.std_mean(patches, dim=-1, correction=0)
        return Tokens({1: torch.cat([mean, deviation], dim=-1)}, {1: (h, w)})

    def to(self, device: torch.device) -> RgbMoments:
        """Remember the device; there are no weights."""
        self.device = device
        return self


class PlainViTEncoder(ModuleEncoder):
    """A ``PlainViT`` as an encoder."""

    def _encode(self, images: Tensor, layers: tuple[int, ...], norm: bool) -> Tokens:
        vit = cast(PlainViT, self.module)
        taken, grid = vit(self.normalise(images), layers, norm)
        patches, cls = {}, None
        for layer in layers:
            patches[layer], cls, _ = split_tokens(taken[layer], 1, 0)
        return Tokens(patches, dict.fromkeys(layers, grid), cls=cls)


def _seed_weights(module: nn.Module, seed: int) -> None:
    """Fill every weight from one local generator, in the order of their names.

    Deviation 0.02 for matrices and embeddings as DINOv2 initialises them, PyTorch's own bound 1 / sqrt(fan-in) for the patch
    projection, zero biases, unit norms. The draws are uniform rather than normal: a uniform draw is exact in floating
    point, so the weights (and the fingerprint) are the same on every machine.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        if name.endswith("bias"):
            value = torch.zeros_like(parameter)
        elif "norm" in name:
            value = torch.ones_like(parameter)
        else:
            bound = 0.02 * math.sqrt(3)  # a uniform draw in +-a has the deviation a / sqrt(3)
            if name == "patch_embed.proj.weight":
                bound = 1 / math.sqrt(parameter[0].numel())
            value = (torch.rand(parameter.shape, generator=generator) - 0.5) * (2 * bound)
        with torch.no_grad():
            parameter.copy_(value)


def _random_vit(request: LoadRequest) -> Encoder:
    seed = request.card.options.get("seed", 0)
    if not isinstance(seed, int) or set(request.card.options) - {"seed"}:
        raise CardError(f"encoder '{request.card.name}': its options are one whole number 'seed'", "mend the card")
    shape = {"dim": 384, "depth": 12, "heads": 6, "patch": 14, "grid": 16}
    with torch.device("meta"):  # no draw from the global generator
        vit = PlainViT(**shape, layer_scale=False)
    vit = vit.to_empty(device="cpu")
    _seed_weights(vit, seed)
    facts = describe(
        request,
        vit,
        arch="ViT-S/14",
        architecture={"kind": "plain-vit", **shape, "seed": seed},
        patch=14,
        resolution=224,
        widths=(384,) * 12,
        strides=(14,) * 12,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        source=f"drawn from seed {seed}",
    )
    return PlainViTEncoder(vit, facts)


def _rgb_moments(request: LoadRequest) -> Encoder:
    card = request.card
    if card.options:
        raise CardError(f"encoder '{card.name}': it has no option '{next(iter(card.options))}'", "mend the card")
    return RgbMoments(
        EncoderFacts(
            name=card.name,
            family=request.family.family,
            arch=card.arch,
            params=0,
            patch=card.patch,
            resolution=card.resolution,
            layers=1,
            widths=(6,),
            strides=(card.patch,),
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            license=card.license or request.family.license,
            source="computed",
            sha256=fingerprint_of({}, {"kind": "rgb-moments", "patch": card.patch}),
        )
    )


_BUILDERS = {"rgb-moments": _rgb_moments, "random-vit-s-14": _random_vit}


def adapter(request: LoadRequest) -> Encoder:
    """Build a floor.

    Raises:
        UsageError: ``--weights`` was given: floors have none.
        CardError: a card whose name starts with no floor's name, or with options that the floor does not know.
    """
    if request.weights is not None:
        raise UsageError(f"encoder '{request.card.name}' has no weights to replace", "leave out --weights")
    for prefix, build in _BUILDERS.items():  # a card may add a suffix, such as another seed
        if request.card.name.startswith(prefix):
            return build(request)
    raise CardError(f"encoder '{request.card.name}' is no floor", f"start its name with {' or '.join(_BUILDERS)}")
