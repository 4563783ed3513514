"""Image towers with a text tower beside them, CLIP's and SigLIP's kind: building and embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rice_eval.adapters.base import EncoderFacts, LoadRequest
from rice_eval.adapters.checkpoints import few
from rice_eval.adapters.dual_config import Found, Spec, class_of, settings_of, square_root
from rice_eval.adapters.layouts import load_tensors
from rice_eval.adapters.patch_text import clip_patches, siglip_patches
from rice_eval.adapters.preprocessing import mean_and_std
from rice_eval.adapters.text import Words
from rice_eval.adapters.tower import Tower, build, core, fill, quiet, shapes_of, transformers_module, unit
from rice_eval.errors import CheckpointError, PlanError

__all__ = ["CONTAINERS", "DualTower", "load"]

CONTAINERS = ("visual.", "vision_tower.")
TEXTS_AT_ONCE = 256


class DualTower(Tower):
    """A ``Tower`` that embeds whole images, and texts where the checkpoint has a text tower."""

    full: Any
    words: Words | None
    inputs: Callable[[Tensor], dict[str, Tensor]]
    embeds: bool

    def embed_image(self, images: Tensor) -> Tensor:
        """``(B, E)`` L2-normalised embeddings of ``(B, 3, H, W)`` images in [0, 1].

        Raises:
            CheckpointError: the checkpoint has no pooling head or projection.
            PlanError: sides that the patch does not divide.
        """
        if not self.embeds:
            raise CheckpointError(
                f"encoder '{self.name}' has no head that embeds images", "load the whole model's checkpoint"
            )
        self.check_size(int(images.shape[-2]), int(images.shape[-1]))
        with torch.inference_mode():
            inputs = self.inputs(self.normalise(images.to(self.device)))
            if hasattr(self.full, "get_image_features"):
                out = self.full.get_image_features(**inputs)
            else:
                out = self.full(**inputs)
            for name in ("image_embeds", "pooler_output"):
                found = getattr(out, name, None)
                if isinstance(found, Tensor):
                    return unit(found)
            return unit(out)

    def project_tokens(self, tokens: Tensor) -> Tensor:
        """See ``ProjectsTokens``: CLIP's visual projection. SigLIP pools by attention and has no such map."""
        projection = getattr(self.full, "visual_projection", None)
        if projection is None:
            raise PlanError(
                f"encoder '{self.name}' has no linear map from tokens to its text space",
                "give --set how=prompter for an encoder with a region head, or choose a CLIP",
            )
        with torch.inference_mode():
            out: Tensor = projection(tokens.to(self.device, projection.weight.dtype))
            return out

    def embed_patches(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """See ``EmbedsPatches`` and ``rice_eval.adapters.patch_text``.

        Raises:
            CheckpointError: the checkpoint has no pooling head or projection.
            PlanError: an encoder of one block, or sides that the patch does not divide.
        """
        last = self.facts.layers
        projection = getattr(self.full, "visual_projection", None)
        head = getattr(getattr(self.full, "vision_model", None), "head", None)
        if projection is None and head is None:
            raise CheckpointError(
                f"encoder '{self.name}' has no head that embeds images", "load the whole model's checkpoint"
            )
        with torch.inference_mode():
            if projection is None:
                found = self.encode(images, (last,), norm=True)
                return unit(siglip_patches(found.last, head)), found.grids[last]
            if last < 2:
                raise PlanError(f"encoder '{self.name}' has a single block", "choose a deeper CLIP")
            found = self.encode(images, (last - 1,), norm=False)
            return unit(clip_patches(found.last, self._blocks[-1], self._norm, projection)), found.grids[last - 1]

    def embed_text(self, texts: list[str]) -> Tensor:
        """``(len(texts), E)`` embeddings, L2-normalised.

        Raises:
            CheckpointError: no text tower, or no tokenizer.
        """
        if self.words is None:
            raise CheckpointError(f"encoder '{self.name}' has no text tower", "load the whole model's checkpoint")
        rows = []
        with torch.inference_mode():
            for start in range(0, len(texts), TEXTS_AT_ONCE):
                batch = self.words(texts[start : start + TEXTS_AT_ONCE])
                out = self.full.get_text_features(**{k: v.to(self.device) for k, v in batch.items()})
                rows.append(unit(getattr(out, "pooler_output", out)))
        return torch.cat(rows) if rows else torch.empty(0, 0, device=self.device)


def load(
    found: Found,
    spec: Spec,
    request: LoadRequest,
    *,
    inputs: Callable[[Tensor], dict[str, Tensor]] | None = None,
    positional: bool = False,
    has_head: bool = True,
    arch: str,
) -> DualTower:
    """Build the tower and fill it.

    Args:
        found: what the checkpoint holds.
        spec: the family.
        request: card and flags.
        inputs: normalised pixels to the model's inputs; pixels with interpolated positions by default.
        positional: whether the vision part takes those inputs in order rather than by name (names differ between versions).
        has_head: whether whole images can be embedded without a projection.
        arch: the architecture in words.

    Raises:
        CheckpointError: anything that does not match.
    """
    library = transformers_module(spec.label)
    where = f"{found.checkpoint.path} ({spec.label}, {found.layout.name})"
    if found.outside and not any(c in found.prefix for c in CONTAINERS):
        raise CheckpointError(
            f"{where}: {len(found.outside)} keys unexpected ({few(found.outside)})", "save the model's own state dict"
        )
    with quiet(library):
        config, notes = settings_of(found, spec, request, library)
    name = class_of(found, spec)
    model = build(getattr(library, name), config, where)
    holder = model if found.vision_at else core(model)
    fix = "the file is not whole or of another architecture; rice-eval encoders inspect shows what it holds"
    tensors = load_tensors(found.checkpoint, found.layout, found.prefix, shapes_of(holder), where, fix)
    fill(holder, tensors)
    vision = core(model) if name != spec.full else model.vision_model
    settings = config.vision_config if name == spec.full else config
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()})
    notes = [f"read as {found.layout.name}", *notes]
    if kinds != ["float32"]:
        notes.append(f"stored as {', '.join(kinds)}, run as float32")
    if found.checkpoint.stripped:
        notes.append(f"prefix '{found.checkpoint.stripped}' taken off every key")
    if found.outside:
        notes.append(f"{len(found.outside)} keys of the surrounding model left alone")
    mean, std, said = mean_and_std(found.checkpoint.folder, request.card, spec.stats)
    notes += said
    make = inputs or (lambda pixels: {"pixel_values": pixels, "interpolate_pos_encoding": True})  # type: ignore[dict-item]
    depth, width, patch = found.numbers["num_hidden_layers"], found.numbers["hidden_size"], found.numbers["patch_size"]
    words = None
    if name == spec.full:
        words = Words(
            found.checkpoint.folder,
            request,
            context=config.text_config.max_position_embeddings,
            pad_to_context=spec.pad_to_context,
            lowercase=bool(request.card.options.get("lowercase", False)),
        )
    embeds = has_head and (spec.projected is None or found.projection is not None)
    abilities = (("image",) if embeds else ()) + (("text",) if words is not None and words.available else ())
    source = request.card.source
    facts = EncoderFacts(
        name=request.card.name,
        family=request.family.family,
        arch=f"{name}, {depth} blocks, width {width}, {settings.num_attention_heads} heads, {arch}",
        params=0,
        patch=patch,
        resolution=found.numbers.get("image_size") or patch * square_root(settings.num_patches, where),
        layers=depth,
        widths=(width,) * depth,
        strides=(patch,) * depth,
        mean=mean,
        std=std,
        abilities=abilities,
        license=request.card.license or request.family.license,
        source=f"file {request.weights.name}"
        if request.weights
        else f"hub {source.hub}" + (f" at {source.revision}" if source.revision else ""),
        notes=tuple(notes),
    )
    numbers = {
        "family": spec.vision,
        "act": settings.hidden_act,
        "eps": settings.layer_norm_eps,
        "heads": settings.num_attention_heads,
    }
    tower = DualTower(
        facts,
        model=model,
        vision=vision,
        blocks=vision.encoder.layers,
        final_norm=vision.post_layernorm,
        leading=(spec.cls_tokens, 0),
        run=(lambda pixels: vision(*make(pixels).values())) if positional else (lambda pixels: vision(**make(pixels))),
        architecture={**numbers, **found.numbers},
    )
    tower.full, tower.words, tower.inputs, tower.embeds = model, words, make, embeds
    return tower
