"""Patches in the text space of a dual encoder: each patch as if the last attention saw it alone.

For CLIP the last block's attention gives way to its values through its output map, as MaskCLIP does (arXiv 2112.01071, section 3.2;
its code keeps the block's residual and MLP); the final norm and the projection follow. SigLIP pools by attention with a learned
query: a patch's embedding is what that head gives for the patch alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

__all__ = ["clip_patches", "siglip_patches"]


def clip_patches(tokens: Tensor, block: Any, norm: Any, projection: Any) -> Tensor:
    """CLIP.

    Args:
        tokens: ``(B, N, D)`` patch tokens that enter the last block.
        block: the last block (transformers' ``CLIPEncoderLayer``).
        norm: the final norm.
        projection: to the text space.

    Returns:
        ``(B, N, E)``.
    """
    attention = block.self_attn
    values = attention.out_proj(attention.v_proj(block.layer_norm1(tokens))) + tokens
    out: Tensor = projection(norm(values + block.mlp(block.layer_norm2(values))))
    return out


def siglip_patches(tokens: Tensor, head: Any) -> Tensor:
    """SigLIP.

    Args:
        tokens: ``(B, N, D)`` patch tokens after the final norm.
        head: the pooling head (transformers' ``SiglipMultiheadAttentionPoolingHead``).

    Returns:
        ``(B, N, D)``.
    """
    attention = head.attention
    # With one key the attention's weight is 1: what is left are the values through the output map.
    weight, bias = (part.chunk(3)[2] for part in (attention.in_proj_weight, attention.in_proj_bias))
    pooled = attention.out_proj(F.linear(tokens, weight, bias))
    out: Tensor = pooled + head.mlp(head.layernorm(pooled))
    return out
