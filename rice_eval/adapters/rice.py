"""RICE and MLCD: transformers' ``MLCDVisionModel``, from any of the files its weights travel in.

Names and traps: docs/encoders.md. Rows come before columns in the rotary angles, as in transformers and in the training
code; a class token stands first and has a learned angle vector of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rice_eval.adapters.base import EncoderFacts, LoadRequest
from rice_eval.adapters.checkpoints import Checkpoint, TensorInfo, few, open_checkpoint, strip_wrappers
from rice_eval.adapters.hub import locate
from rice_eval.adapters.layouts import Layout, count_blocks, load_tensors, view
from rice_eval.adapters.preprocessing import mean_and_std
from rice_eval.adapters.rice_names import DEEPGLINT, DEEPGLINT_MHA, HUB, LLAVA_ONEVISION
from rice_eval.adapters.tower import Tower, build, core, fill, shapes_of, transformers_module
from rice_eval.errors import CheckpointError

__all__ = [
    "Found",
    "adapter",
    "config_for",
    "empty",
    "find",
    "from_blocks",
    "from_checkpoint",
    "strangers_of",
    "tensors_for",
]

ANCHOR = "class_pos_emb"
POST_NORM = ("post_layernorm.weight", "post_layernorm.bias")
#: Written into a converted file's metadata where the source had no final norm, so that its absence is known, not guessed.
ABSENT = "rice_eval.absent"

# What a tower is called inside a larger model; names outside it belong to that model and are left alone.
_CONTAINERS = ("visual.", "vision_tower.")


@dataclass(frozen=True)
class Found:
    """A RICE tower inside a checkpoint.

    Attributes:
        checkpoint: the file, wrapper prefixes taken off.
        layout: how it names its tensors.
        prefix: what stands before every name of the tower.
        numbers: transformers' configuration fields, read from shapes.
        outside: names of the larger model around the tower, which are left alone.
        has_norm: whether the file holds the final norm.
    """

    checkpoint: Checkpoint
    layout: Layout
    prefix: str
    numbers: dict[str, int]
    outside: int
    has_norm: bool

    @property
    def label(self) -> str:
        """Layout and prefix in words."""
        if self.layout is HUB:
            if self.prefix.endswith("vision_tower.vision_model."):
                return f"tower of LLaVA-NeXT (prefix '{self.prefix}')"
            return "hub, transformers 4.x keys" if self.prefix else "hub, transformers 5.x keys"
        return self.layout.name + (f" (prefix '{self.prefix}')" if self.prefix else "")


def find(checkpoint: Checkpoint) -> Found | None:
    """The RICE tower a checkpoint holds; None where it holds none.

    Raises:
        CheckpointError: two towers, or a tower whose shapes contradict each other.
    """
    checkpoint = strip_wrappers(checkpoint)
    names = checkpoint.tensors
    anchors = [n for n in names if n == ANCHOR or n.endswith("." + ANCHOR)]
    if not anchors:
        return None
    if len(anchors) > 1:
        raise CheckpointError(
            f"{checkpoint.path}: holds {len(anchors)} RICE towers ({few(anchors)})", "save the one to evaluate alone"
        )
    prefix = anchors[0][: -len(ANCHOR)]
    inner = {n[len(prefix) :] for n in names if n.startswith(prefix)}
    if any(n.startswith(("conv1.", "transformer.resblocks.")) for n in inner):
        layout = DEEPGLINT_MHA if any(n.endswith("attn.in_proj_weight") for n in inner) else DEEPGLINT
    elif any(n.startswith(("patch_embed.", "blocks.")) for n in inner):
        layout = LLAVA_ONEVISION
    else:
        layout = HUB
    seen = view(checkpoint, layout, prefix)
    return Found(
        checkpoint,
        layout,
        prefix,
        _numbers(seen, checkpoint, layout, prefix),
        sum(not n.startswith(prefix) for n in names),
        POST_NORM[0] in seen,
    )


def _numbers(seen: Mapping[str, TensorInfo], checkpoint: Checkpoint, layout: Layout, prefix: str) -> dict[str, int]:
    patch, angles = seen.get("embeddings.patch_embedding.weight"), seen[ANCHOR]
    fc1 = seen.get("encoder.layers.0.mlp.fc1.weight")
    if patch is None or len(patch.shape) != 4 or fc1 is None or len(fc1.shape) != 2 or len(angles.shape) != 2:
        key = (
            "embeddings.patch_embedding.weight"
            if patch is None or len(patch.shape) != 4
            else "encoder.layers.0.mlp.fc1.weight"
        )
        raise CheckpointError(
            f"{checkpoint.path}: a RICE tower without a usable {prefix}{layout.source(key)[0]}",
            "the file is not whole: save or download it again",
        )
    if patch.shape[1] != 3:
        raise CheckpointError(
            f"{checkpoint.path}: {prefix}{layout.source('embeddings.patch_embedding.weight')[0]} takes {patch.shape[1]} channels",
            "only towers of RGB images can be run",
        )
    width, head = patch.shape[0], 2 * angles.shape[1]
    if head == 0 or width % head:
        raise CheckpointError(
            f"{checkpoint.path}: {prefix}{ANCHOR} has {angles.shape[1]} angles, but width {width} is no multiple of heads of {head}",
            "the file is not a RICE tower as published: angles are half of a head's width",
        )
    return {
        "hidden_size": width,
        "intermediate_size": fc1.shape[0] if fc1.shape[1] == width else fc1.shape[1],
        "num_hidden_layers": count_blocks(seen),
        "num_attention_heads": width // head,
        "num_channels": patch.shape[1],
        "patch_size": patch.shape[2],
    }


# config.json's names of the same numbers, in transformers and in LLaVA-OneVision-1.5's vision_config.
_ALIASES = {
    "num_hidden_layers": ("num_hidden_layers", "depth"),
    "num_attention_heads": ("num_attention_heads", "num_heads"),
    "intermediate_size": ("intermediate_size",),
    "patch_size": ("patch_size",),
    "num_channels": ("num_channels", "in_channels", "in_chans"),
}


def config_for(found: Found, request: LoadRequest | None = None) -> dict[str, Any]:
    """transformers' configuration of the tower: shapes first, then ``config.json``, which must agree, then the card.

    Raises:
        CheckpointError: ``config.json`` or the card names other numbers than the tensors.
    """
    numbers, path = found.numbers, found.checkpoint.path
    config = found.checkpoint.config() or {}
    inside = config.get("vision_config")
    told = inside if isinstance(inside, dict) else config
    names = dict(_ALIASES)
    if inside is None and "mlcd" in str(config.get("model_type", "")):
        names["hidden_size"] = ("hidden_size",)  # inside a larger model the name may mean the language model's width
    if inside is None and config.get("model_type") not in (None, "mlcd", "mlcd_vision_model"):
        told = {}  # the language model's own numbers
    for key, aliases in names.items():
        for alias in aliases:
            if alias in told and told[alias] != numbers[key]:
                lost = ""
                if key == "num_hidden_layers" and isinstance(told[alias], int) and told[alias] > numbers[key]:
                    stem = found.layout.source(f"encoder.layers.{numbers[key]}.layer_norm1.weight")[0]
                    lost = f": {found.prefix}{stem} and the rest of its block are missing"
                raise CheckpointError(
                    f"{path}: config.json says {alias} = {told[alias]}, the tensors say {numbers[key]}{lost}",
                    "one of the two belongs to another checkpoint",
                )
    kind = str(config.get("model_type", ""))
    if kind in ("clip", "clip_vision_model"):
        raise CheckpointError(
            f"{path}: config.json says model_type = {kind}, the tensors are RICE's ({found.prefix}{ANCHOR})",
            "set model_type to 'mlcd': as CLIP this checkpoint would run with random positions",
        )
    if request is not None and not told:
        _check_card(found, request)
    out: dict[str, Any] = dict(numbers)
    native = told.get("image_size") or (request.card.resolution if request is not None else None)
    out["image_size"] = (
        native
        if isinstance(native, int) and native % numbers["patch_size"] == 0
        else 40 * numbers["patch_size"]  # RICE's native grid is 40 x 40
    )
    out["hidden_act"] = str(told.get("hidden_act", "gelu"))
    rope = told.get("rope_parameters")
    eps = told.get("layer_norm_eps", 1e-5)
    theta = (rope if isinstance(rope, dict) else told).get("rope_theta", 10000.0)
    if not isinstance(eps, int | float) or isinstance(eps, bool) or not 0 <= eps < 1:
        raise CheckpointError(f"{path}: config.json says layer_norm_eps = {eps!r}", "RICE's is 1e-5")
    out["layer_norm_eps"] = float(eps)
    if theta != 10000.0:
        raise CheckpointError(f"{path}: config.json says rope_theta = {theta!r}", "only RICE's 10000 is known")
    return out


def _check_card(found: Found, request: LoadRequest) -> None:
    """Without a config.json the card tells how many blocks a tower of its width has; a last block cut off shows nowhere else."""
    expected, numbers = request.card.options, found.numbers
    if numbers["hidden_size"] != expected.get("width") or numbers["intermediate_size"] != expected.get("mlp"):
        return  # a tower of another size: the tensors are all there is to go by
    if numbers["num_hidden_layers"] != expected["depth"]:
        first = found.layout.source(f"encoder.layers.{numbers['num_hidden_layers']}.layer_norm1.weight")[0]
        raise CheckpointError(
            f"{found.checkpoint.path}: holds {numbers['num_hidden_layers']} blocks where {request.card.arch} has "
            f"{expected['depth']} (first missing key {found.prefix}{first})",
            "put a config.json beside it if the depth is meant",
        )


def tensors_for(found: Found, config: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """The empty transformers model and the tensors that fill it, in transformers' names without a prefix.

    Raises:
        CheckpointError: names or shapes that do not match, in the file's own names.
    """
    where = f"{found.checkpoint.path} (RICE, {found.label})"
    if (
        found.prefix
        and not found.prefix.startswith("vision_model.")
        and not any(c in found.prefix for c in _CONTAINERS)
    ):
        raise CheckpointError(f"{where}: unknown prefix '{found.prefix}'", "save the tower's own state dict")
    strangers = strangers_of(found)
    if strangers:
        raise CheckpointError(
            f"{where}: {len(strangers)} keys unexpected ({few(strangers)})", "save the tower's own state dict"
        )
    model, want = empty(found, config)
    fix = "the file is not a whole RICE tower of this size; rice-eval encoders inspect shows what it holds"
    return model, load_tensors(found.checkpoint, found.layout, found.prefix, want, where, fix)


def strangers_of(found: Found) -> list[str]:
    """Names outside the tower that no surrounding model explains."""
    if any(c in found.prefix for c in _CONTAINERS):
        return []
    return [n for n in found.checkpoint.tensors if not n.startswith(found.prefix)]


def empty(found: Found, config: Mapping[str, Any]) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """A model without storage, and the names and shapes the file must bring."""
    library = transformers_module("RICE")
    model = build(library.MLCDVisionModel, library.MLCDVisionConfig(**config), str(found.checkpoint.path))
    want = shapes_of(core(model))
    absent = found.layout is LLAVA_ONEVISION or found.checkpoint.metadata.get(ABSENT) == "post_layernorm"
    if not found.has_norm and absent:
        want = {n: s for n, s in want.items() if n not in POST_NORM}
    return model, want


def from_blocks(tokens: Tensor, grid: tuple[int, int], merge: int = 2) -> Tensor:
    """Put tokens of LLaVA-OneVision-1.5's tower, which come in ``merge`` x ``merge`` blocks, into raster order.

    Args:
        tokens: ``(B, N, D)`` patch tokens in block order.
        grid: ``(h, w)``, both multiples of ``merge``, with ``N = h * w``.
        merge: side of a block.

    Returns:
        ``(B, N, D)`` in raster order.
    """
    (h, w), (b, _, d) = grid, tokens.shape
    blocks = tokens.reshape(b, h // merge, w // merge, merge, merge, d)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(b, h * w, d)


def adapter(request: LoadRequest) -> Tower:
    """Load a RICE or MLCD tower.

    Raises:
        CheckpointError: not RICE, not whole, or its config.json disagrees.
    """
    return from_checkpoint(open_checkpoint(locate(request)), request)


def from_checkpoint(checkpoint: Checkpoint, request: LoadRequest) -> Tower:
    """``adapter`` for a checkpoint that is open already (part of a larger model's, say)."""
    found = find(checkpoint)
    if found is None:
        absolute = [n for n in checkpoint.tensors if n.endswith(("position_embedding.weight", "positional_embedding"))]
        if absolute:
            raise CheckpointError(
                f"{checkpoint.path}: not RICE, it has absolute positions ({few(absolute, 1)}) and no {ANCHOR}",
                "open it as clip or siglip, or as mlcd-vit-l-14-336 if it is one of the MLCD checkpoints that are CLIP models",
            )
        raise CheckpointError(
            f"{checkpoint.path}: not RICE, no key ends in {ANCHOR} (first keys: {few(list(checkpoint.tensors))})",
            "rice-eval encoders inspect says what it is",
        )
    config = config_for(found, request)
    model, tensors = tensors_for(found, config)
    body = core(model)
    notes = [f"read as {found.label}"]
    if found.checkpoint.stripped:
        notes.append(f"prefix '{found.checkpoint.stripped}' taken off every key")
    if found.outside:
        notes.append(f"{found.outside} keys of the surrounding model left alone")
    dropped = [
        n
        for n in found.checkpoint.tensors
        if n.startswith(found.prefix) and found.layout.ignores(n[len(found.prefix) :])
    ]
    if dropped:
        notes.append(f"dropped on purpose: {few(dropped)}")
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    if kinds != ["float32"]:
        notes.append(f"stored as {', '.join(kinds)}, run as float32")
    lacks = POST_NORM[0] not in tensors
    if lacks:
        import torch

        notes.append("no post_layernorm in the file: only norm=False can be run")
        full = {
            **tensors,
            POST_NORM[0]: torch.ones(config["hidden_size"]),
            POST_NORM[1]: torch.zeros(config["hidden_size"]),
        }
    else:
        full = tensors
    fill(body, full)
    mean, std, said = mean_and_std(found.checkpoint.folder, request.card, "clip")
    notes += said
    depth, width = config["num_hidden_layers"], config["hidden_size"]
    facts = EncoderFacts(
        name=request.card.name,
        family=request.family.family,
        arch=f"MLCDVisionModel, {depth} blocks, width {width}, {config['num_attention_heads']} heads, 2D RoPE",
        params=0,
        patch=config["patch_size"],
        resolution=config["image_size"],
        layers=depth,
        widths=(width,) * depth,
        strides=(config["patch_size"],) * depth,
        mean=mean,
        std=std,
        license=request.card.license or request.family.license,
        source=_source(request),
        notes=tuple(notes),
    )
    return Tower(
        facts,
        model=body,
        vision=body,
        blocks=body.encoder.layers,
        final_norm=None if lacks else body.post_layernorm,
        leading=(1, 0),
        run=lambda pixels: model(pixel_values=pixels),
        architecture={"family": "mlcd", **{k: v for k, v in config.items() if k != "image_size"}},
        norm_missing="has no final norm: its file, the tower inside a LLaVA checkpoint, holds none" if lacks else None,
        fingerprint_skips=POST_NORM if lacks else (),
    )


def _source(request: LoadRequest) -> str:
    if request.weights is not None:
        return f"file {request.weights.name}"
    revision = f" at {request.card.source.revision}" if request.card.source.revision else ""
    return f"hub {request.card.source.hub}{revision}"
