"""A plain pre-norm Vision Transformer with timm's names, for the encoders that must not need timm."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PlainViT"]


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(x.transpose(1, 2).reshape(b, n, d))
        return out


class _Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class _Scale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, layer_scale: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(dim, heads)
        self.ls1 = _Scale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = _Mlp(dim)
        self.ls2 = _Scale(dim) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class _PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x)
        return out


class PlainViT(nn.Module):
    """ViT with a class token, learned positions, exact GELU and, where asked, LayerScale.

    Args:
        dim: width D.
        depth: number of blocks.
        heads: attention heads.
        patch: pixels a side of a patch.
        grid: side of the learned position grid.
        layer_scale: whether each branch ends in a learned scale a channel.
    """

    def __init__(self, *, dim: int, depth: int, heads: int, patch: int, grid: int, layer_scale: bool) -> None:
        super().__init__()
        self.grid = grid
        self.patch_embed = _PatchEmbed(dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, dim))
        self.blocks = nn.ModuleList(_Block(dim, heads, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, h: int, w: int) -> Tensor:
        """``(1, 1 + h * w, D)`` position embeddings, bicubic without antialias (as Hugging Face's DINOv2 does)."""
        if (h, w) == (self.grid, self.grid):
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        square = patches.reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(square, size=(h, w), mode="bicubic", align_corners=False)
        return torch.cat([cls, resized.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x: Tensor, take: Collection[int], norm: bool) -> tuple[dict[int, Tensor], tuple[int, int]]:
        """Normalised images ``(B, 3, H, W)`` to ``{layer: (B, 1 + N, D)}`` for each layer in ``take``, and the grid."""
        x = self.patch_embed(x)
        h, w = int(x.shape[2]), int(x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions(h, w)
        taken = {}
        for number, block in enumerate(self.blocks[: max(take)], start=1):
            x = block(x)
            if number in take:
                taken[number] = self.norm(x) if norm else x
        return taken, (h, w)
