"""An attentive reader: one query a position looks at all tokens of a crop once, and every character is read at the same time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["AttentiveReader", "positions"]


def positions(columns: Tensor, width: int) -> Tensor:
    """``(..., width)`` sines and cosines of places in [0, 1]: wavelengths from 2 to 1/128, so that columns can be told apart."""
    rates = torch.logspace(math.log10(math.pi), math.log10(256 * math.pi), width // 2, device=columns.device)
    angles = columns[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class AttentiveReader(nn.Module):
    """Position queries, one cross-attention, a linear classifier.

    Args:
        mean, scale: ``(D,)`` standardisation of tokens.
        classes: C; class 0 ends the text.
        length: positions, the longest text that can be read.
        width: of queries, keys and values.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor, classes: int, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("scale", scale.clone())
        self.queries = nn.Parameter(torch.randn(length, width) / math.sqrt(width))
        self.keys, self.values = nn.Linear(mean.shape[0], width), nn.Linear(mean.shape[0], width)
        self.place = nn.Linear(2 * (width // 2), width)
        self.classify = nn.Linear(width, classes)

    def forward(self, tokens: Tensor, columns: Tensor, valid: Tensor) -> Tensor:
        """Logits of every position.

        Args:
            tokens: ``(B, N, D)``.
            columns: ``(B, N)`` place of each token along the line, 0 to 1.
            valid: ``(B, N)`` bool, False where padded.

        Returns:
            ``(B, length, C)``.
        """
        x = (tokens.float() - self.mean) * self.scale
        keys = self.keys(x) + self.place(positions(columns, self.keys.out_features))
        score = torch.einsum("qw,bnw->bqn", self.queries, keys) / math.sqrt(keys.shape[-1])
        share = score.masked_fill(~valid[:, None], float("-inf")).softmax(dim=-1)
        out: Tensor = self.classify(torch.einsum("bqn,bnw->bqw", share, self.values(x)))
        return out

    @staticmethod
    def decode(logits: Tensor) -> list[int]:
        """Classes from 1 up to the first end, of ``(length, C)`` logits."""
        best = logits.argmax(dim=-1).tolist()
        return best[: best.index(0)] if 0 in best else best

    @staticmethod
    def targets(texts: Sequence[Sequence[int]], length: int) -> Tensor:
        """``(B, length)`` classes: the text, one end, then -100 (ignored); texts longer than ``length`` are cut."""
        out = torch.full((len(texts), length), -100, dtype=torch.long)
        for row, text in enumerate(texts):
            cut = list(text[:length])
            out[row, : len(cut)] = torch.tensor(cut, dtype=torch.long)
            if len(cut) < length:
                out[row, len(cut)] = 0
        return out
