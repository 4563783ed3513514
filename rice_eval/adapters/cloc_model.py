"""CLOC as a torch module: image tower, text tower, Prompter, grounding head (arXiv:2410.02746).

No weights or code of CLOC are public. What the paper states is built as stated; what it leaves open (marked "chosen" below and
in docs/encoders.md) is one definition among several, written down so that files in this layout mean one thing.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ClocConfig", "ClocModel", "box_sinusoids"]


@dataclass(frozen=True)
class ClocConfig:
    """Every number of a CLOC model.

    Attributes:
        image_size, patch_size: native side and patch in pixels.
        width, depth, heads, mlp: of the image tower.
        embed_dim: width E of the common space.
        text_width, text_depth, text_heads, text_mlp: of the text tower.
        vocab_size, context: of the tokenizer; the paper's is T5's with 77 tokens.
        eos_id: the text is pooled at its first token of this id; T5's is 1.
        prompter_mlp: hidden width of the Prompter's one block.
        grounding_hidden: hidden width of the grounding head.
        act: gelu or quick_gelu, of both towers; Prompter and grounding head use gelu.
        eps: of every LayerNorm.
        temperature: of the box sinusoids.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp: int
    embed_dim: int
    text_width: int
    text_depth: int
    text_heads: int
    text_mlp: int
    vocab_size: int
    prompter_mlp: int
    grounding_hidden: int
    context: int = 77
    eos_id: int = 1
    act: str = "gelu"
    eps: float = 1e-5
    temperature: float = 10000.0

    @classmethod
    def parse(cls, data: dict[str, Any]) -> ClocConfig:
        """From JSON values.

        Raises:
            ValueError: an unknown, missing or impossible field, named.
        """
        known = {f.name: f for f in fields(cls)}
        unknown = [k for k in data if k not in known]
        if unknown:
            raise ValueError(f"unknown field '{unknown[0]}'")
        for name, spec in known.items():
            if name not in data:
                if spec.default is MISSING:
                    raise ValueError(f"missing field '{name}'")
                continue
            value = data[name]
            if spec.type == "int" and (
                not isinstance(value, int) or isinstance(value, bool) or value < (0 if name == "eos_id" else 1)
            ):
                raise ValueError(f"field '{name}' is {value!r}, not a positive integer")
            if spec.type == "float" and (not isinstance(value, int | float) or not value > 0):
                raise ValueError(f"field '{name}' is {value!r}, not a positive number")
        config = cls(**data)
        if config.act not in ("gelu", "quick_gelu"):
            raise ValueError(f"field 'act' is {config.act!r}, not gelu or quick_gelu")
        if config.width % config.heads or config.text_width % config.text_heads or config.width % 4:
            raise ValueError("widths must be multiples of their heads, and the image tower's of 4")
        if config.image_size % config.patch_size:
            raise ValueError("image_size must be a multiple of patch_size")
        return config


def box_sinusoids(boxes: Tensor, width: int, temperature: float) -> Tensor:
    """Sinusoids of a box's two corners.

    Args:
        boxes: ``(n, 4)`` xyxy in units of the image's sides.
        width: D, a multiple of 4.
        temperature: ratio of the longest to the shortest wavelength.

    Returns:
        ``(n, 2, D)``: for corner (x, y) the quarters sin(2 pi x w), cos(2 pi x w), sin(2 pi y w), cos(2 pi y w) with
        w_k = temperature ** (-k / (D / 4)), k = 0 .. D / 4 - 1 (chosen).
    """
    quarter = width // 4
    steps = torch.arange(quarter, device=boxes.device, dtype=torch.float32) / quarter
    waves = 2 * math.pi * temperature ** (-steps)
    angles = boxes.float().reshape(-1, 2, 2, 1) * waves  # (n, corner, axis, D/4)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).reshape(-1, 2, width)


class _Activation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.quick = name == "quick_gelu"

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(mixed.transpose(1, 2).reshape(b, n, d))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """Pre-norm transformer block (chosen for the Prompter, CLIP's for the towers)."""

    def __init__(self, width: int, heads: int, mlp: int, act: str, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, mlp)
        self.fc2 = nn.Linear(mlp, width)
        self.act = _Activation(act)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        x = x + self.attn(self.norm1(x), causal)
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))  # type: ignore[no-any-return]


class _Pool(nn.Module):
    """Attention pooling: one learned query over the patch tokens, as many heads as the tower (chosen)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(width))
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        k, v = self.kv(x).reshape(b, n, 2, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q = self.query.to(k.dtype).reshape(1, self.heads, 1, d // self.heads).expand(b, -1, -1, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v).reshape(b, d))  # type: ignore[no-any-return]


class _Image(nn.Module):
    def __init__(self, c: ClocConfig) -> None:
        super().__init__()
        self.side = c.image_size // c.patch_size
        self.patch_embedding = nn.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=False)
        self.position_embedding = nn.Parameter(torch.zeros(self.side**2, c.width))
        self.pre_norm = nn.LayerNorm(c.width, eps=c.eps)
        self.blocks = nn.ModuleList(_Block(c.width, c.heads, c.mlp, c.act, c.eps) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=c.eps)
        self.pool = _Pool(c.width, c.heads)
        self.projection = nn.Linear(c.width, c.embed_dim, bias=False)

    def positions(self, h: int, w: int) -> Tensor:
        """``(h * w, D)``: bicubic without antialias where the grid is not the native one, as transformers' CLIP does."""
        if (h, w) == (self.side, self.side):
            return self.position_embedding
        grid = self.position_embedding.reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        return F.interpolate(grid, (h, w), mode="bicubic", align_corners=False).flatten(2)[0].T

    def tokens(self, pixels: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
        """Block number -> ``(B, N, D)`` tokens after it, before the final norm; blocks after the deepest are not run."""
        x = self.patch_embedding(pixels)
        h, w = x.shape[-2:]
        x = self.pre_norm(x.flatten(2).transpose(1, 2) + self.positions(h, w))
        out: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            if number in layers:
                out[number] = x
            if number == max(layers):
                break
        return out


class _Text(nn.Module):
    """CLIP's text tower: causal, pooled at the first end-of-text token."""

    def __init__(self, c: ClocConfig) -> None:
        super().__init__()
        self.eos_id = c.eos_id
        self.token_embedding = nn.Embedding(c.vocab_size, c.text_width)
        self.position_embedding = nn.Parameter(torch.zeros(c.context, c.text_width))
        self.blocks = nn.ModuleList(
            _Block(c.text_width, c.text_heads, c.text_mlp, c.act, c.eps) for _ in range(c.text_depth)
        )
        self.norm = nn.LayerNorm(c.text_width, eps=c.eps)
        self.projection = nn.Linear(c.text_width, c.embed_dim, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """``(B, E)`` of ``(B, L)`` token ids that each hold ``eos_id``."""
        x = self.token_embedding(ids) + self.position_embedding[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, causal=True)
        end = (ids == self.eos_id).int().argmax(dim=1)
        pooled = self.norm(x)[torch.arange(len(ids), device=ids.device), end]
        return self.projection(pooled)  # type: ignore[no-any-return]


class _Prompter(nn.Module):
    """z = Prompter(l, f'(x)): a prompt before the patch tokens, one single-head block, average pooling, projection."""

    def __init__(self, c: ClocConfig) -> None:
        super().__init__()
        self.width, self.temperature = c.width, c.temperature
        self.corner_embedding = nn.Parameter(torch.zeros(2, c.width))
        self.text_in = nn.Linear(c.embed_dim, c.width)
        self.block = _Block(c.width, 1, c.prompter_mlp, "gelu", c.eps)
        self.projection = nn.Linear(c.width, c.embed_dim, bias=False)

    def boxes(self, boxes: Tensor) -> Tensor:
        """``(n, 2, D)`` prompt tokens of ``(n, 4)`` boxes; a learned vector a corner tells them apart (chosen)."""
        return (
            box_sinusoids(boxes, self.width, self.temperature).to(self.corner_embedding.dtype) + self.corner_embedding
        )

    def texts(self, embeddings: Tensor) -> Tensor:
        """``(n, 1, D)`` prompt tokens of ``(n, E)`` L2-normalised text embeddings (a linear map: chosen)."""
        return self.text_in(embeddings).unsqueeze(1)  # type: ignore[no-any-return]

    def forward(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        """``(n, E)`` for ``(n, P, D)`` prompts on one image's ``(N, D)`` tokens; prompts do not see each other.

        The mean is over prompt and patch tokens (chosen).
        """
        image = tokens.unsqueeze(0).expand(len(prompts), -1, -1)
        return self.projection(self.block(torch.cat((prompts, image), dim=1)).mean(dim=1))  # type: ignore[no-any-return]


class _Grounding(nn.Module):
    def __init__(self, c: ClocConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(c.embed_dim, c.grounding_hidden)
        self.fc2 = nn.Linear(c.grounding_hidden, 4)

    def forward(self, z: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(z)))  # type: ignore[no-any-return]


class ClocModel(nn.Module):
    """The whole of CLOC; the encoder drives its parts."""

    def __init__(self, config: ClocConfig) -> None:
        super().__init__()
        self.config = config
        self.image = _Image(config)
        self.text = _Text(config)
        self.prompter = _Prompter(config)
        self.grounding = _Grounding(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
