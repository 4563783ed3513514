"""What the adapters share: modules as encoders, tokens taken apart, strict loading, facts checked against the card."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rice_eval.adapters.base import Encoder, EncoderFacts, LoadRequest, Tokens, fingerprint_of
from rice_eval.errors import CardError, CheckpointError

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MapEncoder",
    "ModuleEncoder",
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

    def normalise(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in [0, 1] to the network's input: minus the mean, over the deviation."""
        x = (images.to(self._mean.dtype) - self._mean) / self._std
        return x.contiguous(memory_format=torch.channels_last) if self._channels_last else x


class MapEncoder(ModuleEncoder):
    """An encoder whose module gives one map ``(B, D, h, w)`` a stage, in order; stages are the layers, and there is no norm."""

    def _encode(self, images: Tensor, layers: tuple[int, ...], norm: bool) -> Tokens:
        maps = self.module(self.normalise(images))
        flat = {layer: flatten_map(maps[layer - 1]) for layer in layers}
        return Tokens({k: tokens for k, (tokens, _) in flat.items()}, {k: grid for k, (_, grid) in flat.items()})


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


def read_state_dict(path: Path, encoder: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a PyTorch pickle, which is read with ``weights_only=True``.

    Raises:
        CheckpointError: a file that is missing, truncated, or holds anything but tensors by name.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file for encoder '{encoder}'", "check the path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds objects other than tensors, which are never run", "save it as .safetensors"
        ) from error
    except Exception as error:  # torch and safetensors raise many kinds on a damaged file
        raise CheckpointError(f"{path}: can't be read ({error})", "copy the checkpoint again") from error
    for key in ("state_dict", "model"):
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
    if not isinstance(data, dict) or not data or not all(isinstance(v, Tensor) for v in data.values()):
        raise CheckpointError(f"{path}: is no mapping of names to tensors", "save the model's state_dict()")
    return {str(name): value for name, value in data.items()}


def _few(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load ``tensors`` into ``module``; every name and every shape must agree.

    Raises:
        CheckpointError: names that are missing, not expected, or of another shape; the message shows the first few.
    """
    wanted = module.state_dict()
    problems = []
    if missing := set(wanted) - set(tensors):
        problems.append(f"{len(missing)} missing ({_few(missing)})")
    if unexpected := set(tensors) - set(wanted):
        problems.append(f"{len(unexpected)} unexpected ({_few(unexpected)})")
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in sorted(set(wanted) & set(tensors))
        if wanted[name].shape != tensors[name].shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} of another shape ({'; '.join(shapes[:3])})")
    if problems:
        raise CheckpointError(
            f"{source}: keys do not fit the architecture: {', '.join(problems)}",
            "choose the encoder that these weights belong to",
        )
    module.load_state_dict(dict(tensors), strict=True, assign=False)


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
        resolution=card.resolution if carded else resolution,
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
