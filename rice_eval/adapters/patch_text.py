"""Patches in the text space of a dual encoder: each patch as if the last attention saw it alone.

For CLIP the last block's attention gives way to its values through its output map, as MaskCLIP does (arXiv 2112.01071, section 3.2;
its code keeps the block's residual and MLP); the final norm and the projection follow. SigLIP pools by attention with a learned
query: a patch's embedding is what that head gives for the patch alone. CLOC pools the same way. open_clip's Vision Transformers run
their last block and their pooling on sequences of one patch, its ResNets the values of their attention pooling at every place.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

__all__ = ["clip_patches", "cloc_patches", "map_patches", "native_patches", "siglip_patches", "trunk_patches"]


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


def cloc_patches(tokens: Tensor, image: Any) -> Tensor:
    """CLOC.

    Args:
        tokens: ``(B, N, D)`` patch tokens after the final norm.
        image: the image tower, with ``pool`` and ``projection``.

    Returns:
        ``(B, N, E)``.
    """
    width = tokens.shape[-1]
    # With one key the attention's weight is 1, whatever the learned query asks for.
    values = F.linear(tokens, image.pool.kv.weight[width:], image.pool.kv.bias[width:])
    out: Tensor = image.projection(image.pool.out(values))
    return out


def native_patches(tokens: Tensor, visual: Any) -> Tensor:
    """A Vision Transformer of open_clip.

    Args:
        tokens: ``(B, N, D)`` patch tokens that enter the last block.
        visual: the image tower.

    Returns:
        ``(B, N, E)``.
    """
    flat = tokens.reshape(-1, 1, tokens.shape[-1])
    first = visual.transformer.batch_first
    alone = visual.transformer.resblocks[-1](flat if first else flat.transpose(0, 1))
    alone = alone if first else alone.transpose(0, 1)
    # The patch twice: some towers pool the class token's place, others all places but that one.
    pooled, _ = visual._pool(alone.expand(-1, 2, -1))
    out: Tensor = pooled if visual.proj is None else pooled @ visual.proj
    return out.reshape(*tokens.shape[:2], -1)


def trunk_patches(tokens: Tensor, visual: Any) -> Tensor:
    """A timm trunk that pools by attention (SigLIP's), inside open_clip.

    Args:
        tokens: ``(B, N, D)`` patch tokens after the final norm.
        visual: the image tower, with ``trunk`` and ``head``.

    Returns:
        ``(B, N, E)``.
    """
    trunk = visual.trunk
    skipped = 0 if getattr(trunk, "pool_include_prefix", False) else getattr(trunk, "num_prefix_tokens", 0)
    flat = tokens.reshape(-1, 1, tokens.shape[-1]).expand(-1, 1 + skipped, -1)
    out: Tensor = visual.head(trunk.forward_head(flat))
    return out.reshape(*tokens.shape[:2], -1)


def map_patches(tokens: Tensor, pool: Any) -> Tensor:
    """CLIP's ResNets: the attention pooling's values through its output map, without positions, as MaskCLIP.

    Args:
        tokens: ``(B, N, D)`` places of the last stage.
        pool: the attention pooling, with ``v_proj`` and ``c_proj``.

    Returns:
        ``(B, N, E)``.
    """
    out: Tensor = pool.c_proj(pool.v_proj(tokens))
    return out
