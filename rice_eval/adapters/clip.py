"""CLIP: transformers' ``CLIPModel`` and its vision towers, from transformers' or OpenAI's names."""

from __future__ import annotations

from typing import Any

from rice_eval.adapters.base import LoadRequest
from rice_eval.adapters.checkpoints import Checkpoint, few, open_checkpoint, strip_wrappers
from rice_eval.adapters.dual import DualTower, load
from rice_eval.adapters.dual_config import Found, Spec, check_channels, square_root, text_numbers
from rice_eval.adapters.hub import locate
from rice_eval.adapters.layouts import Layout, Rule, block_rules, count_blocks, view
from rice_eval.errors import CheckpointError

__all__ = ["OPENAI", "OPENAI_VISION", "SPEC", "adapter", "find", "from_checkpoint"]

SPEC = Spec(
    label="CLIP",
    full="CLIPModel",
    projected="CLIPVisionModelWithProjection",
    vision="CLIPVisionModel",
    full_config="CLIPConfig",
    vision_config="CLIPVisionConfig",
    cls_tokens=1,
    stats="clip",
    pad_to_context=False,
)
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_IGNORE = (r".*\bposition_ids", r"input_resolution", r"context_length", r"vocab_size", r"(.*\.)?attn_mask")


def _vision(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}conv1.weight", f"{target}embeddings.patch_embedding.weight"),
        Rule(f"{source}class_embedding", f"{target}embeddings.class_embedding"),
        Rule(f"{source}positional_embedding", f"{target}embeddings.position_embedding.weight"),
        Rule(f"{source}ln_pre.{{p}}", f"{target}pre_layrnorm.{{p}}"),
        Rule(f"{source}ln_post.{{p}}", f"{target}post_layernorm.{{p}}"),
        *block_rules(
            f"{source}transformer.resblocks.{{n}}.", f"{target}encoder.layers.{{n}}.", _BLOCK, "attn.in_proj_{p}"
        ),
    )


#: openai/CLIP's model.py; also what open_clip writes for a ViT.
OPENAI = Layout(
    "OpenAI keys",
    (
        *_vision("visual.", "vision_model."),
        Rule("visual.proj", "visual_projection.weight", turned=True),
        Rule("text_projection", "text_projection.weight", turned=True),
        Rule("logit_scale", "logit_scale"),
        Rule("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        Rule("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        Rule("ln_final.{p}", "text_model.final_layer_norm.{p}"),
        *block_rules("transformer.resblocks.{n}.", "text_model.encoder.layers.{n}.", _BLOCK, "attn.in_proj_{p}"),
    ),
    _IGNORE,
)
#: The image tower alone, with or without its projection.
OPENAI_VISION = Layout(
    "OpenAI keys, image tower",
    (*_vision("", "vision_model."), Rule("proj", "visual_projection.weight", turned=True)),
    _IGNORE,
)
_OPENAI_BARE = Layout("OpenAI keys, image tower", _vision("", ""), _IGNORE)
HUB = Layout("transformers keys")


def find(checkpoint: Checkpoint) -> Found | None:
    """The CLIP tower a checkpoint holds; None where it holds none.

    Raises:
        CheckpointError: two towers, or shapes that contradict each other.
    """
    checkpoint = strip_wrappers(checkpoint)
    names = checkpoint.tensors
    if any(n.endswith("class_pos_emb") for n in names):
        return None
    if "visual.conv1.weight" in names and "visual.positional_embedding" in names:
        if "token_embedding.weight" in names:
            return _found(checkpoint, OPENAI, "", "vision_model.")
        only_vision = Layout(OPENAI_VISION.name, OPENAI_VISION.rules, OPENAI_VISION.ignore)
        layout = only_vision if "visual.proj" in names else _OPENAI_BARE
        return _found(checkpoint, layout, "visual.", "vision_model." if "visual.proj" in names else "")
    if "conv1.weight" in names and "positional_embedding" in names and "class_embedding" in names:
        with_projection = "proj" in names
        return _found(
            checkpoint,
            OPENAI_VISION if with_projection else _OPENAI_BARE,
            "",
            "vision_model." if with_projection else "",
        )
    anchors = [
        n.removesuffix("embeddings.class_embedding")
        for n in names
        if n.endswith("embeddings.class_embedding")
        and n.replace("class_embedding", "position_embedding.weight") in names
    ]
    if not anchors:
        return None
    if len(anchors) > 1:
        raise CheckpointError(f"{checkpoint.path}: holds {len(anchors)} CLIP towers ({few(anchors)})", "save one alone")
    prefix = anchors[0]
    if prefix == "vision_model." and any(not n.startswith(prefix) for n in names):
        return _found(checkpoint, HUB, "", "vision_model.")
    return _found(checkpoint, HUB, prefix, "")


def _found(checkpoint: Checkpoint, layout: Layout, prefix: str, vision_at: str) -> Found:
    seen = view(checkpoint, layout, prefix)
    numbers: dict[str, Any] = {}
    for key, dims in (
        ("embeddings.patch_embedding.weight", 4),
        ("embeddings.position_embedding.weight", 2),
        ("encoder.layers.0.mlp.fc1.weight", 2),
    ):
        info = seen.get(vision_at + key)
        if info is None or len(info.shape) != dims:
            raise CheckpointError(
                f"{checkpoint.path} (CLIP): key missing or of another rank ({prefix + layout.source(vision_at + key)[0]})",
                "the file is not whole: save or download it again",
            )
    patch = seen[vision_at + "embeddings.patch_embedding.weight"].shape
    positions = seen[vision_at + "embeddings.position_embedding.weight"].shape[0]
    check_channels(patch[1], f"{checkpoint.path} (CLIP)")
    fc1 = seen[vision_at + "encoder.layers.0.mlp.fc1.weight"].shape
    numbers = {
        "hidden_size": patch[0],
        "intermediate_size": fc1[0] if fc1[1] == patch[0] else fc1[1],
        "num_hidden_layers": count_blocks(seen, vision_at + "encoder.layers."),
        "num_channels": patch[1],
        "patch_size": patch[2],
        "image_size": patch[2] * square_root(positions - 1, f"{checkpoint.path} (CLIP)"),
    }
    projection = seen.get("visual_projection.weight")
    outside = tuple(n for n in checkpoint.tensors if not n.startswith(prefix))
    return Found(
        checkpoint,
        layout,
        prefix,
        vision_at,
        numbers,
        text_numbers(seen),
        projection.shape[0] if projection is not None and len(projection.shape) == 2 else None,
        outside,
    )


def adapter(request: LoadRequest) -> DualTower:
    """Load a CLIP model, or its image tower alone.

    Raises:
        CheckpointError: not CLIP, not whole, or its config.json disagrees.
    """
    return from_checkpoint(open_checkpoint(locate(request)), request)


def from_checkpoint(checkpoint: Checkpoint, request: LoadRequest) -> DualTower:
    """``adapter`` for a checkpoint that is open already (part of a larger model's, say)."""
    found = find(checkpoint)
    if found is None:
        rice = [n for n in checkpoint.tensors if n.endswith("class_pos_emb")]
        if rice:
            raise CheckpointError(
                f"{checkpoint.path}: a RICE or MLCD tower ({rice[0]}, rotary positions), not CLIP, which needs embeddings.position_embedding.weight",
                "open it with --encoder rice-vit-l-14-560: as CLIP it would run with random positions",
            )
        raise CheckpointError(
            f"{checkpoint.path}: not CLIP, no class_embedding beside a position embedding (first keys: {few(list(checkpoint.tensors))})",
            "rice-eval encoders inspect says what it is",
        )
    return load(found, SPEC, request, arch="learned positions, bicubic without antialias at other sizes")
