"""Any image-text model of open_clip: tokens of every block of its image tower, and both embeddings.

Native Vision Transformers, timm trunks and the modified ResNets all go through the library's own ``forward_intermediates``.
At sizes other than the native one, positions of a native Vision Transformer are resized as open_clip resizes them when a
model is built with ``force_image_size`` (bicubic with antialias); a timm trunk resizes its own.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from rice_eval.adapters.base import Encoder, EncoderFacts, LoadRequest, Tokens
from rice_eval.adapters.blocks import (
    ModuleEncoder,
    WithoutDraws,
    describe,
    flatten_map,
    load_strict,
    read_state_dict,
    split_tokens,
)
from rice_eval.adapters.network import cache_only_when_unreachable, why_not
from rice_eval.adapters.patch_text import map_patches, native_patches, trunk_patches
from rice_eval.adapters.timm import gives_tokens, prefix_of, stored_grid
from rice_eval.errors import CardError, CheckpointError, MissingExtraError, NotFoundError, PlanError, UsageError
from rice_eval.registry import did_you_mean

__all__ = ["OpenClipEncoder", "adapter"]

# Entries of OpenAI's files that describe the model and hold no weights.
_NUMBERS = {"input_resolution", "context_length", "vocab_size"}


class _Call(nn.Module):
    """Routes a call to one method of the tower, so that its position embedding can be replaced for the length of the call."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.tower, method)(*args, **kwargs)


class OpenClipEncoder(ModuleEncoder):
    """An open_clip model.

    Args:
        model: the whole model, on the CPU in fp32.
        facts: what a record says of it.
        name: the model's name in open_clip, which its tokenizer goes by.
        maps: whether the image tower gives maps a stage instead of tokens a block.
    """

    def __init__(self, model: Any, facts: EncoderFacts, name: str, *, maps: bool) -> None:
        super().__init__(model, facts, channels_last=maps)
        self._model_name, self._maps, self._tokenizer = name, maps, None
        self._visual: Any = model.visual
        self._call = _Call(self._visual)
        trunk = getattr(self._visual, "trunk", None)
        self._prefix = (1, 1) if trunk is None else prefix_of(trunk)
        self._native = trunk is None and not maps
        self._fixed = not self._native and not maps and not getattr(trunk, "dynamic_img_size", False)
        # CoCa pools before its norm, so that the norm has another width than the tokens.
        self.has_norm = not (self._native and self._visual.attn_pool is not None)

    def check_size(self, height: int, width: int) -> None:
        """As for every encoder; a trunk that can't resize its positions takes its native size alone."""
        side = self.facts.resolution
        if self._fixed and (height, width) != (side, side):
            raise PlanError(
                f"encoder '{self.name}' takes {side} x {side} px only, not {height} x {width}", f"use square={side}"
            )
        super().check_size(height, width)

    def _run(self, method: str, x: Tensor, **kwargs: Any) -> Any:
        """Call ``method`` of the image tower, with positions for the size of ``x``."""
        grid = (x.shape[-2] // self.facts.patch, x.shape[-1] // self.facts.patch)
        if not self._native or grid == tuple(self._visual.grid_size):
            return getattr(self._visual, method)(x, **kwargs)
        stored = self._visual.positional_embedding
        h, w = self._visual.grid_size
        square = stored[1:].reshape(1, h, w, -1).permute(0, 3, 1, 2)
        square = F.interpolate(square, size=grid, mode="bicubic", antialias=True, align_corners=False)
        resized = torch.cat([stored[:1], square.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1)])
        return functional_call(self._call, {"tower.positional_embedding": resized}, (method, x), kwargs)

    def _encode(self, images: Tensor, layers: tuple[int, ...], norm: bool) -> Tokens:
        out = self._run(
            "forward_intermediates",
            self.normalise(images),
            indices=[layer - 1 for layer in layers],
            stop_early=True,
            normalize_intermediates=norm and self.has_norm,
            intermediates_only=True,
            output_fmt="NCHW" if self._maps else "NLC",
            output_extra_tokens=not self._maps and self._prefix[0] > 0,
        )
        taken = out["image_intermediates"]
        if self._maps:
            flat = {layer: flatten_map(x) for layer, x in zip(layers, taken)}
            return Tokens({k: v for k, (v, _) in flat.items()}, {k: grid for k, (_, grid) in flat.items()})
        grid = (images.shape[-2] // self.facts.patch, images.shape[-1] // self.facts.patch)
        patches, grids = dict(zip(layers, taken)), dict.fromkeys(layers, grid)
        if self._prefix[0] == 0:
            return Tokens(patches, grids)
        n_prefix, n_cls = self._prefix
        _, cls, registers = split_tokens(out["image_intermediates_prefix"][-1], n_cls, n_prefix - n_cls)
        return Tokens(patches, grids, cls, registers)

    @torch.inference_mode()
    def embed_image(self, images: Tensor) -> Tensor:
        """``(B, E)`` L2-normalised embeddings of ``(B, 3, H, W)`` images in [0, 1].

        Raises:
            PlanError: a size that the patch does not divide; a ResNet's pooling takes its native size only.
        """
        height, width, side = int(images.shape[-2]), int(images.shape[-1]), self.facts.resolution
        self.check_size(height, width)
        if self._maps and not hasattr(self._visual, "trunk") and (height, width) != (side, side):
            raise PlanError(f"encoder '{self.name}' embeds images of {side} x {side} px only", f"use square={side}")
        pooled = self._run("forward", self.normalise(images.to(self.device)))
        return F.normalize(pooled[0] if isinstance(pooled, tuple) else pooled, dim=-1)

    @torch.inference_mode()
    def embed_patches(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """See ``EmbedsPatches`` and ``rice_eval.adapters.patch_text``.

        Raises:
            PlanError: a tower of one block, or one that mixes places after its last attention (a trunk without attention pooling).
        """
        last, visual = self.facts.layers, self._visual
        trunk = getattr(visual, "trunk", None)
        if self._native and last > 1:
            found = self.encode(images, (last - 1,), norm=False)
            return F.normalize(native_patches(found.last, visual), dim=-1), found.grids[last - 1]
        if trunk is not None and not self._maps and getattr(trunk, "attn_pool", None) is not None:
            found = self.encode(images, (last,), norm=True)
            return F.normalize(trunk_patches(found.last, visual), dim=-1), found.grids[last]
        if trunk is None and self._maps and hasattr(visual, "attnpool"):
            found = self.encode(images, (last,), norm=False)
            return F.normalize(map_patches(found.last, visual.attnpool), dim=-1), found.grids[last]
        raise PlanError(
            f"encoder '{self.name}' has no last attention that a patch could pass alone",
            "choose a CLIP or SigLIP model",
        )

    @torch.inference_mode()
    def embed_text(self, texts: list[str]) -> Tensor:
        """``(len(texts), E)`` L2-normalised embeddings, with open_clip's own tokenizer.

        Raises:
            CheckpointError: a tokenizer that has to be fetched and can't be.
        """
        if "text" not in self.facts.abilities:
            raise PlanError(
                f"encoder '{self.name}' was loaded without a text tower", "use a checkpoint that holds both"
            )
        import open_clip

        if self._tokenizer is None:
            try:
                with cache_only_when_unreachable():
                    self._tokenizer = open_clip.get_tokenizer(self._model_name)
            except Exception as error:  # the hub's client raises its own kinds
                raise CheckpointError(
                    f"tokenizer of open_clip model '{self._model_name}' can't be loaded: {why_not(error)}",
                    "go online once, or set HF_HOME to a cache that holds it",
                ) from error
        tokenizer: Any = self._tokenizer
        model: Any = self.module
        out: Tensor = model.encode_text(tokenizer(texts).to(self.device), normalize=True)
        return out


@contextmanager
def _quiet_and_resizable(open_clip: Any) -> Iterator[None]:
    """Build timm trunks so that they resize their positions, and keep open_clip's log lines to itself."""
    import timm

    module = open_clip.timm_model

    class Resizable:
        def create_model(self, name: str, **kwargs: Any) -> Any:
            try:
                return timm.create_model(name, dynamic_img_size=True, **kwargs)
            except TypeError as error:
                if "dynamic_img_size" not in str(error):
                    raise
                return timm.create_model(name, **kwargs)

    previous, level = module.timm, logging.root.manager.disable
    module.timm = Resizable()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        module.timm = previous
        logging.disable(level)


def _names_of(request: LoadRequest, open_clip: Any) -> tuple[str, str]:
    """Model and tag, checked against what open_clip has."""
    reference = request.card.source.open_clip
    if not reference:
        raise CardError(
            f"encoder '{request.card.name}': its source needs 'open_clip: MODEL/PRETRAINED'", "mend the card"
        )
    name, _, tag = reference.partition("/")
    if name not in open_clip.list_models():
        raise NotFoundError(
            f"open_clip {open_clip.__version__} has no model '{name}'", did_you_mean(name, open_clip.list_models())
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag and tag not in tags:
        raise NotFoundError(f"open_clip model '{name}' has no weights '{tag}'", did_you_mean(tag, tags))
    if not tag and request.weights is None:
        raise UsageError(
            f"open_clip model '{name}' needs weights", f"give --weights FILE, or {name}/TAG: {', '.join(tags)}"
        )
    if tag:
        trained = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
        built = bool(open_clip.get_model_config(name).get("quick_gelu", False))
        if trained != built:  # open_clip only warns, and gives other numbers than the checkpoint's
            other = f"{name}-quickgelu" if trained else name.removesuffix("-quickgelu")
            raise UsageError(
                f"weights '{tag}' were trained {'with' if trained else 'without'} QuickGELU, '{name}' computes the other",
                f"use open_clip:{other}/{tag}",
            )
    return name, tag


def _load_local(open_clip: Any, request: LoadRequest, name: str) -> tuple[Any, bool, list[str]]:
    """Model, whether it has a text tower, and notes, from ``--weights``: the whole model, or its ``visual.`` part."""
    assert request.weights is not None
    tensors = {k: v for k, v in read_state_dict(request.weights).items() if k not in _NUMBERS}
    notes: list[str] = []
    size = None
    vision = open_clip.get_model_config(name)["vision_cfg"]
    if "timm_model_name" not in vision and "visual.positional_embedding" in tensors:
        side = stored_grid({"positional_embedding": tensors["visual.positional_embedding"]}, 1)
        if side is not None and side * vision.get("patch_size", 16) != vision.get("image_size", 224):
            size = side * int(vision.get("patch_size", 16))
            notes.append(f"position grid {side} x {side} as stored")
    with WithoutDraws():
        model = open_clip.create_model(name, pretrained=None, force_image_size=size)
    if all(key.startswith("visual.") for key in tensors):
        load_strict(model.visual, {k.removeprefix("visual."): v for k, v in tensors.items()}, str(request.weights))
        notes.append("image tower only")
        return model, False, notes
    if set(tensors) != set(model.state_dict()):
        tensors = open_clip.convert.convert_state_dict(model, tensors)
        if "positional_embedding" in tensors and not hasattr(model, "positional_embedding"):
            tensors = open_clip.model.convert_to_custom_text_state_dict(tensors)
        notes.append("names converted by open_clip")
    load_strict(model, tensors, str(request.weights))
    return model, True, notes


def adapter(request: LoadRequest) -> Encoder:
    """Load an open_clip model: the pair its card names, or ``--weights`` into that architecture.

    Raises:
        MissingExtraError: open_clip is not installed.
        NotFoundError: open_clip has no such model or tag.
        UsageError: no tag and no weights, or a pair whose activation is not the one it was trained with.
        CheckpointError: weights that can't be had or do not fit.
        CardError: options, or a card whose patch is not the model's.
    """
    try:
        import open_clip
        import open_clip.timm_model
    except ImportError as error:
        raise MissingExtraError.of("open_clip_torch", "open-clip", f"the encoder '{request.card.name}'") from error
    if request.card.options:
        raise CardError(f"encoder '{request.card.name}': open_clip takes no options", "remove 'options' from the card")
    name, tag = _names_of(request, open_clip)
    has_text, source = True, f"open_clip {name}/{tag}"
    notes: list[str] = []
    with _quiet_and_resizable(open_clip):
        if request.weights is not None:
            model, has_text, notes = _load_local(open_clip, request, name)
            source = request.weights.name
        else:
            try:
                with cache_only_when_unreachable():
                    model = open_clip.create_model(name, pretrained=tag)
            except Exception as error:  # the hub's client, the loader and torch each raise their own kinds
                raise CheckpointError(
                    f"weights of open_clip '{name}/{tag}' can't be loaded: {why_not(error)}",
                    "go online once, accept the licence where the repository is gated, or give --weights FILE",
                ) from error
    visual = model.visual
    trunk = getattr(visual, "trunk", None)
    maps = not gives_tokens(trunk) if trunk is not None else not hasattr(visual, "transformer")
    if trunk is not None:
        widths = tuple(int(stage["num_chs"]) for stage in trunk.feature_info)
        strides = tuple(int(stage["reduction"]) for stage in trunk.feature_info)
        if isinstance(getattr(trunk, "norm", None), nn.Identity) and not maps:
            notes.append("no final norm on tokens: norm changes nothing")
    elif maps:
        base = int(
            visual.layer1[0].conv1.out_channels
        )  # the stem ends at stride 4 with this width; each bottleneck widens by 4
        widths = (int(visual.conv3.out_channels), base * 4, base * 8, base * 16, base * 32)
        strides = (4, 4, 8, 16, 32)
    else:
        depth = len(visual.transformer.resblocks)
        widths = (int(visual.conv1.out_channels),) * depth
        strides = (int(visual.patch_size[0]),) * depth
        if visual.attn_pool is not None:
            notes.append("the final norm follows attention pooling: norm changes nothing")
    preprocess = open_clip.get_model_preprocess_cfg(model)
    size = visual.image_size
    facts = describe(
        request,
        model if has_text else visual,
        arch=name,
        architecture={"kind": "open_clip", "config": open_clip.get_model_config(name), "image_size": size},
        patch=max(strides),
        resolution=int(size[0] if isinstance(size, (tuple, list)) else size),
        widths=widths,
        strides=strides,
        mean=request.card.mean or tuple(preprocess["mean"]),
        std=request.card.std or tuple(preprocess["std"]),
        source=source,
        abilities=("text", "image") if has_text else ("image",),
        params=sum(p.numel() for p in visual.parameters()),
        notes=notes,
    )
    return OpenClipEncoder(model, facts, name, maps=maps)
