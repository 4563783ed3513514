"""Any model of timm: Vision Transformers by their blocks' tokens, everything else by its stages' maps.

Both come from timm's own ``forward_intermediates``, so that no number is computed by code other than the library's.
Options of a card: ``img_size`` (the side of the learned position grid, in pixels) and ``positions`` (``dinov2``: interpolate
position embeddings as the DINOv2 repository does, where timm differs).
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rice_eval.adapters.base import Encoder, EncoderFacts, LoadRequest, Tokens
from rice_eval.adapters.blocks import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ModuleEncoder,
    WithoutDraws,
    describe,
    flatten_map,
    load_strict,
    read_state_dict,
    split_tokens,
)
from rice_eval.adapters.network import cache_only_when_unreachable, why_not
from rice_eval.errors import CardError, CheckpointError, MissingExtraError, NotFoundError, PlanError, UsageError
from rice_eval.registry import did_you_mean

__all__ = ["TimmMaps", "TimmTokens", "adapter", "gives_tokens", "prefix_of", "stored_grid"]

_OPTIONS = {"img_size", "positions"}


class _Sized(ModuleEncoder):
    """A timm model, which may take its native size only."""

    def __init__(self, module: nn.Module, facts: EncoderFacts, *, fixed: bool, channels_last: bool = False) -> None:
        super().__init__(module, facts, channels_last=channels_last)
        self._fixed = fixed

    def check_size(self, height: int, width: int) -> None:
        """As for every encoder; a model with fixed windows or relative positions takes its native size alone."""
        side = self.facts.resolution
        if self._fixed and (height, width) != (side, side):
            raise PlanError(
                f"encoder '{self.name}' takes {side} x {side} px only, not {height} x {width}",
                f"choose the view square={side}",
            )
        super().check_size(height, width)


class TimmTokens(_Sized):
    """A Vision Transformer: every block is a layer."""

    def _encode(self, images: Tensor, layers: tuple[int, ...], norm: bool) -> Tokens:
        model: Any = self.module
        n_prefix, n_cls = prefix_of(model)
        taken = model.forward_intermediates(
            self.normalise(images),
            indices=[layer - 1 for layer in layers],
            return_prefix_tokens=n_prefix > 0,
            norm=norm,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        grid = (images.shape[-2] // self.facts.patch, images.shape[-1] // self.facts.patch)
        grids = dict.fromkeys(layers, grid)
        if n_prefix == 0:
            return Tokens(dict(zip(layers, taken)), grids)
        _, cls, registers = split_tokens(taken[-1][1], n_cls, n_prefix - n_cls)
        return Tokens({layer: patches for layer, (patches, _) in zip(layers, taken)}, grids, cls, registers)


class TimmMaps(_Sized):
    """A model of stages (a CNN, Swin, Hiera), or of blocks that keep their tokens as a map (SAM): each is a layer."""

    def _encode(self, images: Tensor, layers: tuple[int, ...], norm: bool) -> Tokens:
        model: Any = self.module
        maps = model.forward_intermediates(
            self.normalise(images),
            indices=[layer - 1 for layer in layers],
            norm=norm and not _is_sam(model),
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        patches, grids = {}, {}
        for layer, x in zip(layers, maps):
            patches[layer], grids[layer] = flatten_map(x)
        return Tokens(patches, grids)


def _is_sam(model: Any) -> bool:
    """SAM's norm is a neck of convolutions that changes D; it is no final norm."""
    return type(model).__name__ == "VisionTransformerSAM"


def prefix_of(model: Any) -> tuple[int, int]:
    """How many tokens come before the patches, and how many of them (0 or 1) are the class token."""
    n_prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
    holder = getattr(model, "embeds", model)
    return n_prefix, int(n_prefix > 0 and getattr(holder, "cls_token", None) is not None)


def gives_tokens(model: Any) -> bool:
    """Whether the model is a Vision Transformer whose blocks give tokens, class and register tokens apart."""
    return "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters


def _create(timm: Any, name: str, pretrained: bool, options: Mapping[str, Any]) -> tuple[Any, bool]:
    """The model without classifier, and whether it takes other sizes than its own."""
    kwargs = {"num_classes": 0, **options}
    try:
        return timm.create_model(name, pretrained=pretrained, dynamic_img_size=True, **kwargs), True
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
    model = timm.create_model(name, pretrained=pretrained, **kwargs)
    if getattr(model, "embeds", None) is not None:  # NaFlexVit resizes its positions for any grid
        return model, True
    if not model.pretrained_cfg.get("fixed_input_size", False):
        return model, True
    strict = getattr(getattr(model, "patch_embed", None), "strict_img_size", True)
    return model, not strict


def stored_grid(tensors: Mapping[str, Tensor], n_prefix: int) -> int | None:
    """Side of the learned position grid in a checkpoint, or None where it has none or it is not square."""
    for name, value in tensors.items():
        if name.endswith(("pos_embed", "positional_embedding", "position_embedding.weight")) and value.ndim in (2, 3):
            for extra in (n_prefix, 1, 0):
                side = math.isqrt(max(0, value.shape[-2] - extra))
                if side and side * side + extra == value.shape[-2]:
                    return side
    return None


def _without_classifier(tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    heads = model.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{h}." for h in ((heads,) if isinstance(heads, str) else heads))
    wanted = set(model.state_dict())
    return {k: v for k, v in tensors.items() if k in wanted or not prefixes or not k.startswith(prefixes)}


def _load_local(model: Any, tensors: dict[str, Tensor], source: str) -> str:
    """Load a local checkpoint: timm's own names, else whatever timm's converter for the family makes of it.

    Returns:
        What was done, for the notes; empty where nothing was.
    """
    wanted = set(model.state_dict())
    own = _without_classifier(tensors, model)
    note = "classifier left out" if len(own) < len(tensors) else ""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if set(own) != wanted and convert is not None:
        try:
            converted = _without_classifier(dict(convert(dict(tensors), model)), model)
        except Exception:  # a converter fed with another family's names fails in any way it likes
            converted = {}
        if set(converted) == wanted:
            own, note = converted, "names converted by timm"
    load_strict(model, own, source)
    return note


def _dinov2_positions(model: Any) -> None:
    """Replace timm's interpolation of positions by the DINOv2 repository's: no antialias, scale factors with 0.1 added.

    Source: ``interpolate_pos_encoding`` in facebookresearch/dinov2 with its defaults for the models without registers
    (``interpolate_antialias=False, interpolate_offset=0.1``); timm antialiases and gives the output's size.
    """

    def pos_embed(x: Tensor) -> Tensor:
        b, h, w, d = x.shape
        side = int(model.patch_embed.grid_size[0])
        cls, square = model.pos_embed[:, :1], model.pos_embed[:, 1:]
        if (h, w) != (side, side):
            square = F.interpolate(
                square.reshape(1, side, side, d).permute(0, 3, 1, 2),
                scale_factor=((h + 0.1) / side, (w + 0.1) / side),
                mode="bicubic",
            )
            square = square.permute(0, 2, 3, 1).reshape(1, h * w, d)
        x = torch.cat([model.cls_token.expand(b, -1, -1), x.view(b, h * w, d)], dim=1)
        out: Tensor = model.pos_drop(x + torch.cat([cls, square], dim=1))
        return out

    model._pos_embed = pos_embed


def _name_of(request: LoadRequest, timm: Any) -> str:
    """The model's name in timm, checked."""
    name = request.card.source.timm
    if not name:
        raise CardError(f"encoder '{request.card.name}': its source needs 'timm: NAME'", "mend the card")
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        raise NotFoundError(
            f"timm {timm.__version__} has no model '{arch}'",
            did_you_mean(arch, timm.list_models()) + " (or update timm)",
        )
    tags = [n.partition(".")[2] for n in timm.list_models(arch + ".*", pretrained=True)]
    if tag and tag not in tags:
        raise NotFoundError(f"timm {timm.__version__} has no weights '{name}'", did_you_mean(tag, tags))
    if not tag and request.weights is None:
        raise UsageError(
            f"timm model '{arch}' needs weights",
            f"give --weights FILE, or a tag: {', '.join(tags[:6]) or 'it has none'}",
        )
    return name


def _options(request: LoadRequest) -> dict[str, Any]:
    options = request.card.options
    unknown = set(options) - _OPTIONS
    if unknown:
        raise CardError(
            f"encoder '{request.card.name}': timm has no option '{sorted(unknown)[0]}'",
            f"known: {', '.join(sorted(_OPTIONS))}",
        )
    if options.get("positions", "dinov2") != "dinov2" or not isinstance(options.get("img_size", 1), int):
        raise CardError(
            f"encoder '{request.card.name}': an option has a wrong value", "positions: dinov2, img_size: PIXELS"
        )
    return {"img_size": options["img_size"]} if "img_size" in options else {}


def _build(timm: Any, request: LoadRequest, name: str) -> tuple[Any, bool, str, list[str]]:
    """The loaded model, whether it takes any size, where its weights came from, and notes."""
    kwargs = _options(request)
    if request.weights is None:
        try:
            with cache_only_when_unreachable():
                model, flexible = _create(timm, name, True, kwargs)
        except Exception as error:  # the hub's client, its cache and the loader each raise their own kinds
            hub = timm.get_pretrained_cfg(name).hf_hub_id or name
            raise CheckpointError(
                f"weights of timm model '{name}' can't be loaded from '{hub}': {why_not(error)}",
                "go online once, accept the licence where the repository is gated, or give --weights FILE",
            ) from error
        return model, flexible, f"timm {name}", []
    notes = []
    with torch.device("meta"):
        shape, _ = _create(timm, name, False, kwargs)
    tensors = read_state_dict(request.weights)
    learned = getattr(shape, "pos_embed", None)
    if gives_tokens(shape) and learned is not None and learned.ndim == 3:
        side = stored_grid(tensors, prefix_of(shape)[0])
        if side is not None and side != shape.patch_embed.grid_size[0]:
            kwargs = {**kwargs, "img_size": side * int(shape.patch_embed.patch_size[0])}
            notes.append(f"position grid {side} x {side} as stored")
    with WithoutDraws():
        model, flexible = _create(timm, name, False, kwargs)
    note = _load_local(model, tensors, str(request.weights))
    return model, flexible, request.weights.name, [*notes, *([note] if note else [])]


def adapter(request: LoadRequest) -> Encoder:
    """Load a timm model: pretrained as its card says, or from ``--weights`` (timm's names, or the family's original ones).

    Raises:
        MissingExtraError: timm is not installed.
        NotFoundError: timm has no such model or tag.
        UsageError: a name without tag and no weights.
        CheckpointError: weights that can't be had or do not fit.
        CardError: unknown options, or a card whose patch is not the model's.
    """
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError.of("timm", "timm", f"the encoder '{request.card.name}'") from error
    name = _name_of(request, timm)
    model, flexible, source, notes = _build(timm, request, name)
    config = model.pretrained_cfg
    mean = request.card.mean or tuple(config.get("mean", IMAGENET_MEAN))
    std = request.card.std or tuple(config.get("std", IMAGENET_STD))
    tokens = gives_tokens(model)
    widths = tuple(int(stage["num_chs"]) for stage in model.feature_info)
    strides = tuple(int(stage["reduction"]) for stage in model.feature_info)
    resolution = int(config["input_size"][-1])
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if tokens and grid is not None:
        resolution = int(grid[0]) * strides[0]
    if request.card.options.get("positions"):
        if type(model).__name__ != "VisionTransformer" or prefix_of(model) != (1, 1) or model.no_embed_class:
            raise CardError(f"encoder '{request.card.name}': positions: dinov2 does not fit {name}", "leave it out")
        _dinov2_positions(model)
    if tokens and isinstance(model.norm, nn.Identity):
        notes.append("no final norm on tokens: norm changes nothing")
    if _is_sam(model):
        notes.append("neck left out: norm changes nothing")
    arch = name.partition(".")[0]
    facts = describe(
        request,
        model,
        arch=arch,
        architecture={
            "kind": "timm",
            "model": arch,
            "img_size": resolution,
            "positions": request.card.options.get("positions"),
        },
        patch=max(strides),
        resolution=resolution,
        widths=widths,
        strides=strides,
        mean=mean,
        std=std,
        source=source,
        license=config.get("license"),
        notes=notes,
    )
    kind = TimmTokens if tokens else TimmMaps
    return kind(model, facts, fixed=not flexible, channels_last=not tokens and not _is_sam(model))
