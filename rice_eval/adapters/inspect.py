"""What a checkpoint is, from names and shapes: family, layout, numbers, and the keys that would not fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from rice_eval.adapters import clip, dual, dual_config, rice, siglip
from rice_eval.adapters.checkpoints import (
    Checkpoint,
    TensorInfo,
    differences,
    few,
    open_checkpoint,
    strip_wrappers,
    unusable,
)
from rice_eval.adapters.conversion import request_with
from rice_eval.adapters.layouts import count_blocks, wanted
from rice_eval.adapters.tower import build, core, quiet, shapes_of, transformers_module
from rice_eval.errors import CheckpointError

__all__ = ["Inspection", "inspect"]


@dataclass(frozen=True)
class Inspection:
    """What ``inspect`` found.

    Attributes:
        path: the file or folder.
        family: rice, clip, siglip, cloc, timm, a transformers model type, or unknown.
        layout: whose names the file uses.
        prefix: what stands before the tower's names; wrapper prefixes that would be taken off included.
        depth, width, heads, mlp, patch, resolution: of the image tower; None where names, shapes and config.json do not tell.
        position: kind of position embedding.
        text: whether a text tower is in the file.
        params: numbers of the image tower's tensors, added up.
        tensors: number of tensors in the file.
        dtypes: dtypes in the file.
        missing, unexpected, shapes: keys, in the file's names, that a strict load would complain of; None where not compared.
        problems: other reasons why it would not load, one line each.
        encoder: a registry name or ``hf:`` reference that opens it.
    """

    path: str
    family: str
    layout: str
    prefix: str = ""
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    mlp: int | None = None
    patch: int | None = None
    resolution: int | None = None
    position: str | None = None
    text: bool = False
    params: int | None = None
    tensors: int = 0
    dtypes: tuple[str, ...] = ()
    missing: tuple[str, ...] | None = None
    unexpected: tuple[str, ...] | None = None
    shapes: tuple[str, ...] | None = None
    problems: tuple[str, ...] = ()
    encoder: str | None = None

    @property
    def loads(self) -> bool:
        """Whether a strict load would go through, as far as names, shapes and config.json tell."""
        return self.missing == () and self.unexpected == () and self.shapes == () and not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "loads": self.loads}


def inspect(path: str | Path) -> Inspection:
    """Say what a checkpoint is; safetensors are not read beyond their headers and no tensor is loaded.

    Raises:
        CheckpointError: the file itself can't be opened (missing, partial, truncated, code in a pickle).
        MissingExtraError: transformers is needed to compare keys and is not installed.
    """
    checkpoint = open_checkpoint(path)
    bare = strip_wrappers(checkpoint)
    common: dict[str, Any] = {
        "path": str(checkpoint.path),
        "tensors": len(checkpoint.tensors),
        "dtypes": tuple(sorted({str(i.dtype).removeprefix("torch.") for i in checkpoint.tensors.values()})),
    }
    for look in (_rice, _cloc, _clip, _siglip, _other):
        found = look(checkpoint, bare, common)
        if found is not None:
            return found
    first = few(list(checkpoint.tensors), 6)
    return Inspection(family="unknown", layout="unknown", problems=(f"no known family: first keys {first}",), **common)


def _count(names: Mapping[str, TensorInfo], prefix: str, drop: Collection[str] = ()) -> int:
    return sum(prod(i.shape) for n, i in names.items() if n.startswith(prefix) and n not in drop)


def _types(have: Mapping[str, TensorInfo], want: Collection[str]) -> list[str]:
    odd = unusable(have, want)
    return [f"{len(odd)} tensors are not bf16, fp16 or fp32 ({few(odd)})"] if odd else []


def _rice(checkpoint: Checkpoint, bare: Checkpoint, common: Mapping[str, Any]) -> Inspection | None:
    found = rice.find(bare)
    if found is None:
        return None
    problems: list[str] = []
    try:
        config = rice.config_for(found)
    except CheckpointError as error:
        problems.append(error.what)
        config = {**found.numbers, "image_size": 40 * found.numbers["patch_size"]}
    have = {n: i for n, i in bare.tensors.items() if n.startswith(found.prefix)}
    ignore = {n for n in have if found.layout.ignores(n[len(found.prefix) :])}
    _, want = rice.empty(found, config)
    needed = wanted(found.layout, found.prefix, want)
    missing, unexpected, shapes = differences(have, needed, ignore)
    problems += _types(have, needed)
    return Inspection(
        family="rice",
        layout=found.label,
        prefix=found.checkpoint.stripped + found.prefix,
        depth=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        mlp=config["intermediate_size"],
        patch=config["patch_size"],
        resolution=config["image_size"],
        position="2D RoPE, learned angles for the class token"
        + ("" if found.has_norm else "; no final norm in the file"),
        params=_count(have, found.prefix, ignore),
        missing=tuple(missing),
        unexpected=(*unexpected, *rice.strangers_of(found)),
        shapes=tuple(shapes),
        problems=tuple(problems),
        encoder="rice-vit-l-14-560",
        **common,
    )


def _cloc(checkpoint: Checkpoint, bare: Checkpoint, common: Mapping[str, Any]) -> Inspection | None:
    if not any(n.startswith("prompter.") for n in bare.tensors):
        return None
    from rice_eval.adapters import cloc
    from rice_eval.adapters.cloc_model import ClocModel
    from rice_eval.adapters.tower import parameters_on_meta

    try:
        config = cloc.config_of(bare)
    except CheckpointError as error:
        return Inspection(
            family="cloc",
            layout="CLOC",
            prefix=bare.stripped,
            text=True,
            problems=(error.what,),
            encoder="cloc-vit-b-16-224",
            **common,
        )
    with parameters_on_meta():
        want = shapes_of(ClocModel(config))
    missing, unexpected, shapes = differences(bare.tensors, want)
    problems = _types(bare.tensors, want)
    return Inspection(
        family="cloc",
        layout="CLOC, format 1",
        prefix=bare.stripped,
        depth=config.depth,
        width=config.width,
        heads=config.heads,
        mlp=config.mlp,
        patch=config.patch_size,
        resolution=config.image_size,
        position="learned",
        text=True,
        params=_count(bare.tensors, "image."),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        shapes=tuple(shapes),
        problems=tuple(problems),
        encoder="cloc-vit-b-16-224",
        **common,
    )


def _clip(checkpoint: Checkpoint, bare: Checkpoint, common: Mapping[str, Any]) -> Inspection | None:
    found = clip.find(bare)
    if found is None:
        return None
    return _dual(found, clip.SPEC, "clip", "learned, with a class token", "clip-vit-b-16-openai", common)


def _siglip(checkpoint: Checkpoint, bare: Checkpoint, common: Mapping[str, Any]) -> Inspection | None:
    result = siglip.find(bare)
    if result is None:
        return None
    found, spec, _ = result
    if spec is siglip.NAFLEX:
        return _dual(
            found, spec, "siglip2", "learned, resized for every image (NaFlex)", "siglip2-vit-b-16-naflex", common
        )
    return _dual(found, spec, "siglip", "learned", "siglip-vit-b-16-224", common)


def _dual(
    found: dual_config.Found,
    spec: dual_config.Spec,
    family: str,
    position: str,
    encoder: str,
    common: Mapping[str, Any],
) -> Inspection:
    library = transformers_module(spec.label)
    told = found.checkpoint.config()
    problems: list[str] = []
    heads: object = None
    projection = {} if found.projection is None else {"projection_dim": found.projection}
    vision = {**found.numbers, "num_attention_heads": 1}  # the number of heads changes no name and no shape
    with quiet(library):
        if told is not None and not found.outside:
            inner = told.get("vision_config")
            heads = (inner if isinstance(inner, dict) else told).get("num_attention_heads")
            try:
                dual_config.settings_of(found, spec, request_with({}), library)
            except CheckpointError as error:
                problems.append(error.what)
        if found.text is not None:
            text = {**found.text, "num_attention_heads": 1}
            config = getattr(library, spec.full_config)(vision_config=vision, text_config=text, **projection)
        else:
            config = getattr(library, spec.vision_config)(**vision, **projection)
    model = build(getattr(library, dual_config.class_of(found, spec)), config, str(found.checkpoint.path))
    want = wanted(found.layout, found.prefix, shapes_of(model if found.vision_at else core(model)))
    have = {n: i for n, i in found.checkpoint.tensors.items() if n.startswith(found.prefix)}
    ignore = {n for n in have if found.layout.ignores(n[len(found.prefix) :])}
    missing, unexpected, shapes = differences(have, want, ignore)
    problems += _types(have, want)
    if not found.outside or any(c in found.prefix for c in dual.CONTAINERS):
        strangers: tuple[str, ...] = ()
    else:
        strangers = found.outside
    tower = {n for n in have if found.layout.targets(n[len(found.prefix) :])} - ignore
    text_or_head = ("text_model.", "visual_projection.", "text_projection.", "logit_")
    params = sum(
        prod(found.checkpoint.tensors[n].shape)
        for n in tower
        if not any(t.startswith(text_or_head) for t, _ in found.layout.targets(n[len(found.prefix) :]))
    )
    return Inspection(
        family=family,
        layout=found.layout.name,
        prefix=found.checkpoint.stripped + found.prefix,
        depth=found.numbers["num_hidden_layers"],
        width=found.numbers["hidden_size"],
        heads=heads if isinstance(heads, int) else None,
        mlp=found.numbers["intermediate_size"],
        patch=found.numbers["patch_size"],
        resolution=found.numbers.get("image_size"),
        position=position,
        text=found.text is not None,
        params=params,
        missing=tuple(missing),
        unexpected=(*unexpected, *strangers),
        shapes=tuple(shapes),
        problems=tuple(problems),
        encoder=encoder,
        **common,
    )


def _other(checkpoint: Checkpoint, bare: Checkpoint, common: Mapping[str, Any]) -> Inspection | None:
    """Families whose keys only their own library can compare."""
    told = checkpoint.config() or {}
    kind = told.get("model_type")
    if isinstance(kind, str):
        ints = {k: told[k] for k in told if isinstance(told[k], int)}
        return Inspection(
            family=kind,
            layout="transformers",
            prefix=bare.stripped,
            depth=ints.get("num_hidden_layers"),
            width=ints.get("hidden_size"),
            heads=ints.get("num_attention_heads"),
            mlp=ints.get("intermediate_size"),
            patch=ints.get("patch_size"),
            resolution=ints.get("image_size"),
            params=_count(bare.tensors, ""),
            encoder=f"hf:{checkpoint.folder}",
            **common,
        )
    patch, qkv = bare.tensors.get("patch_embed.proj.weight"), bare.tensors.get("blocks.0.attn.qkv.weight")
    if patch is None or qkv is None or len(patch.shape) != 4:
        return None
    position = "learned" if "pos_embed" in bare.tensors else "none stored (RoPE or sin-cos)"
    fc1 = bare.tensors.get("blocks.0.mlp.fc1.weight")
    return Inspection(
        family="timm",
        layout="timm ViT",
        prefix=bare.stripped,
        depth=count_blocks(bare.tensors, "blocks."),
        width=patch.shape[0],
        mlp=fc1.shape[0] if fc1 else None,
        patch=patch.shape[2],
        position=position,
        params=_count(bare.tensors, ""),
        encoder="timm:NAME, with the timm model's name",
        **common,
    )
