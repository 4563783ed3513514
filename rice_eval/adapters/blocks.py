"""What the adapters share: modules as encoders, tokens taken apart, strict loading, facts checked against the card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rice_eval.adapters.base import Encoder, EncoderFacts, LoadRequest, Tokens, fingerprint_of
from rice_eval.adapters.checkpoints import TensorInfo, compare, open_checkpoint, refuse_nan, strip_wrappers
from rice_eval.errors import CardError

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MapEncoder",
    "ModuleEncoder",
    "WithoutDraws",
    "describe",
    "flatten_map",
    "load_strict",
    "read_state_dict",
    "split_tokens",
]

# The means and deviations of ImageNet's RGB values in [0, 1], as torchvision states them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ModuleEncoder(Encoder):
    """An encoder around one ``nn.Module``: keeps it frozen, moves it, and normalises images.

    Args:
        module: the image tower.
        facts: what a record says of it.
        channels_last: lay weights and images out channels-last, which convolutions run faster on.
    """

    def __init__(self, module: nn.Module, facts: EncoderFacts, *, channels_last: bool = False) -> None:
        self.facts = facts
        self.module = module.eval().requires_grad_(False)
        self._channels_last = channels_last
        if channels_last:
            self.module.to(memory_format=torch.channels_last)
        self._mean = torch.tensor(facts.mean).view(1, 3, 1, 1)
        self._std = torch.tensor(facts.std).view(1, 3, 1, 1)

    def to(self, device: torch.device) -> ModuleEncoder:
        """Move the weights; returns self."""
        self.module.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        self.device = device
        return self

    def tunable(self) -> nn.Module:
        """The image tower."""
        return self.module

    def normalise(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in [0, 1] to the network's input: minus the mean, over the deviation."""
        x = (images.to(self._mean.dtype) - self._mean) / self._std
        return x.contiguous(memory_format=torch.channels_last) if self._channels_last else x

    def _compilable(self) -> Sequence[nn.Module]:
        return list(_blocks_of(self.module))


class MapEncoder(ModuleEncoder):
    """An encoder whose module gives one map ``(B, D, h, w)`` a stage, in order; stages are the layers, and there is no norm."""

    def _encode(self, images: Tensor, layers: tuple[int, ...], norm: bool) -> Tokens:
        maps = self.module(self.normalise(images))
        flat = {layer: flatten_map(maps[layer - 1]) for layer in layers}
        return Tokens({k: tokens for k, (tokens, _) in flat.items()}, {k: grid for k, (_, grid) in flat.items()})


def _blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost lists of equal modules: a ViT's blocks, a CNN's stages or the blocks of its stages."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) > 1 and len({type(m) for m in child}) == 1:
            yield from child
        else:
            yield from _blocks_of(child)


_DRAWS = {torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_, nn.init.trunc_normal_}


class WithoutDraws(TorchFunctionMode):
    """Within it no random number is drawn: for models whose every weight is about to be replaced.

    Drawing initial weights takes most of the time of building a large model, and moves the global generator.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if func in _DRAWS else func(*args, **(kwargs or {}))


def split_tokens(x: Tensor, n_cls: int, n_registers: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(B, n_cls + n_registers + N, D)`` to patches ``(B, N, D)``, class token ``(B, D)`` and registers ``(B, R, D)``.

    The class token comes first and the registers next; of several class tokens (a distillation token) the first is the
    class token and the others count as registers.
    """
    prefix = n_cls + n_registers
    cls = x[:, 0] if n_cls else None
    first = 1 if n_cls else 0
    registers = x[:, first:prefix] if prefix > first else None
    return x[:, prefix:], cls, registers


def flatten_map(x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """A map ``(B, D, h, w)`` to tokens ``(B, h * w, D)`` in raster order, and its grid ``(h, w)``."""
    return x.flatten(2).transpose(1, 2), (int(x.shape[2]), int(x.shape[3]))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint (file, folder or glob), with wrappers' prefixes such as ``module.`` taken off every name.

    Raises:
        CheckpointError: a file that is missing, truncated, or holds code.
    """
    checkpoint = strip_wrappers(open_checkpoint(path))
    return checkpoint.read(checkpoint.tensors)


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy ``tensors`` into ``module``; every name and every shape must agree.

    Raises:
        CheckpointError: names that are missing, not expected, or of another shape; the message shows the first few.
    """
    compare(
        {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in tensors.items()},
        {name: tuple(value.shape) for name, value in module.state_dict().items()},
        source,
    )
    refuse_nan(tensors, source)
    module.load_state_dict(dict(tensors), strict=True)


def describe(
    request: LoadRequest,
    module: nn.Module,
    *,
    arch: str,
    architecture: Mapping[str, Any],
    patch: int,
    resolution: int,
    widths: Sequence[int],
    strides: Sequence[int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    source: str,
    abilities: tuple[str, ...] = (),
    params: int | None = None,
    license: str | None = None,
    notes: Sequence[str] = (),
) -> EncoderFacts:
    """Facts of what was loaded; a card that states another patch is refused, so that a card can't lie.

    Args:
        resolution: native side in pixels of what was loaded.
        architecture: every number besides the weights that changes the output; it enters the fingerprint.
        params: parameters of the image tower where ``module`` holds more than that.

    Raises:
        CardError: the card's patch is not the model's.
    """
    card, carded = request.card, request.card.patch > 1
    if carded and card.patch != patch:
        raise CardError(
            f"encoder '{card.name}': the card says patch {card.patch}, the model has {patch}", "mend the card's 'patch'"
        )
    numbers = {**architecture, "mean": mean, "std": std, "patch": patch}
    return EncoderFacts(
        name=card.name,
        family=request.family.family,
        arch=card.arch if carded else arch,
        params=sum(p.numel() for p in module.parameters()) if params is None else params,
        patch=patch,
        resolution=resolution,
        layers=len(widths),
        widths=tuple(widths),
        strides=tuple(strides),
        mean=mean,
        std=std,
        abilities=abilities,
        license=card.license or request.family.license or license,
        source=source,
        sha256=fingerprint_of(module.state_dict(), numbers),
        notes=(*((card.note,) if card.note else ()), *notes),
    )
