"""SigLIP and SigLIP2: transformers' ``SiglipModel`` (fixed resolution, both generations) and ``Siglip2Model`` (NaFlex)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rice_eval.adapters.base import LoadRequest
from rice_eval.adapters.checkpoints import Checkpoint, few, open_checkpoint, strip_wrappers
from rice_eval.adapters.dual import DualTower, load
from rice_eval.adapters.dual_config import Found, Spec, check_channels, square_root, text_numbers
from rice_eval.adapters.hub import locate
from rice_eval.adapters.layouts import Layout, count_blocks, view
from rice_eval.errors import CheckpointError

__all__ = ["FIXED", "NAFLEX", "adapter", "find", "from_checkpoint", "patches_of"]

FIXED = Spec(
    label="SigLIP",
    full="SiglipModel",
    projected=None,
    vision="SiglipVisionModel",
    full_config="SiglipConfig",
    vision_config="SiglipVisionConfig",
    cls_tokens=0,
    stats="half",
    pad_to_context=True,
)
NAFLEX = Spec(
    label="SigLIP2 NaFlex",
    full="Siglip2Model",
    projected=None,
    vision="Siglip2VisionModel",
    full_config="Siglip2Config",
    vision_config="Siglip2VisionConfig",
    cls_tokens=0,
    stats="half",
    pad_to_context=True,
)
HUB = Layout("transformers keys")


def patches_of(pixels: Tensor, patch: int) -> dict[str, Tensor]:
    """NaFlex inputs: each patch flattened row by row with its channels last, the mask of real patches, and the grid.

    Args:
        pixels: ``(B, 3, H, W)``, both sides multiples of ``patch``.

    Returns:
        ``pixel_values (B, N, 3 * patch**2)``, ``pixel_attention_mask (B, N)`` of ones, ``spatial_shapes (B, 2)``.
    """
    b, c, height, width = pixels.shape
    h, w = height // patch, width // patch
    cut = pixels.reshape(b, c, h, patch, w, patch).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": cut.reshape(b, h * w, patch * patch * c),
        "pixel_attention_mask": torch.ones(b, h * w, dtype=torch.int32, device=pixels.device),
        "spatial_shapes": torch.tensor([[h, w]] * b, device=pixels.device),
    }


def find(checkpoint: Checkpoint) -> tuple[Found, Spec, bool] | None:
    """The SigLIP tower a checkpoint holds, its kind, and whether it has a pooling head; None where it holds none.

    Raises:
        CheckpointError: two towers, or shapes that contradict each other.
    """
    checkpoint = strip_wrappers(checkpoint)
    names = checkpoint.tensors
    stem = "embeddings.patch_embedding.bias"
    anchors = [
        n.removesuffix(stem)
        for n in names
        if n.endswith(stem) and n.removesuffix(stem) + "embeddings.position_embedding.weight" in names
    ]
    if not anchors:
        return None
    if len(anchors) > 1:
        raise CheckpointError(
            f"{checkpoint.path}: holds {len(anchors)} SigLIP towers ({few(anchors)})", "save one alone"
        )
    prefix, vision_at = anchors[0], ""
    if prefix == "vision_model." and any(not n.startswith(prefix) for n in names):
        prefix, vision_at = "", "vision_model."
    seen = view(checkpoint, HUB, prefix)
    weight = seen.get(vision_at + "embeddings.patch_embedding.weight")
    fc1 = seen.get(vision_at + "encoder.layers.0.mlp.fc1.weight")
    if weight is None or fc1 is None or len(fc1.shape) != 2 or len(weight.shape) not in (2, 4):
        key = (
            "encoder.layers.0.mlp.fc1.weight"
            if weight is not None and len(weight.shape) in (2, 4)
            else "embeddings.patch_embedding.weight"
        )
        raise CheckpointError(
            f"{checkpoint.path} (SigLIP): key missing or of another rank ({prefix + vision_at + key})",
            "the file is not whole: save or download it again",
        )
    positions = seen[vision_at + "embeddings.position_embedding.weight"].shape[0]
    width = weight.shape[0]
    numbers: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": fc1.shape[0] if fc1.shape[1] == width else fc1.shape[1],
        "num_hidden_layers": count_blocks(seen, vision_at + "encoder.layers."),
    }
    where = f"{checkpoint.path} (SigLIP)"
    if len(weight.shape) == 4:
        spec = FIXED
        check_channels(weight.shape[1], where)
        numbers |= {"num_channels": weight.shape[1], "patch_size": weight.shape[2]}
        numbers["image_size"] = weight.shape[2] * square_root(positions, where)
    else:
        spec = NAFLEX
        numbers |= {"patch_size": square_root(weight.shape[1] // 3, where), "num_patches": positions}
        square_root(positions, where)
    head = vision_at + "head.probe" in seen
    numbers["vision_use_head"] = head
    outside = tuple(n for n in names if not n.startswith(prefix))
    return Found(checkpoint, HUB, prefix, vision_at, numbers, text_numbers(seen), None, outside), spec, head


def adapter(request: LoadRequest) -> DualTower:
    """Load a SigLIP or SigLIP2 model, or its image tower alone.

    Raises:
        CheckpointError: not SigLIP, not whole, or its config.json disagrees.
    """
    return from_checkpoint(open_checkpoint(locate(request)), request)


def from_checkpoint(checkpoint: Checkpoint, request: LoadRequest) -> DualTower:
    """``adapter`` for a checkpoint that is open already (part of a larger model's, say)."""
    result = find(checkpoint)
    if result is None:
        raise CheckpointError(
            f"{checkpoint.path}: not SigLIP, no embeddings.patch_embedding.bias beside a position embedding "
            f"(first keys: {few(list(checkpoint.tensors))})",
            "rice-eval encoders inspect says what it is",
        )
    found, spec, head = result
    if spec is FIXED:
        arch = "learned positions, bicubic without antialias at other sizes"
        return load(found, spec, request, has_head=head, arch=arch)
    patch = found.numbers["patch_size"]
    return load(
        found,
        spec,
        request,
        inputs=lambda pixels: patches_of(pixels, patch),
        positional=True,
        has_head=head,
        arch="NaFlex, learned positions, bilinear with antialias at every size",
    )
