"""Projectors from an encoder's tokens to a language model's embeddings."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

__all__ = ["KINDS", "Projector"]

KINDS = ("linear", "mlp2x_gelu", "pixel-shuffle", "2x2-merge")


class Projector(nn.Module):
    """Tokens of a grid to embeddings: ``forward(tokens (T, N, D), grid) -> (T, n, D_lm)``."""

    kind: str
    width_in: int
    width_out: int

    @classmethod
    def new(cls, kind: str, width_in: int, width_out: int, seed: int = 0) -> Projector:
        """A projector with seeded random weights."""
        raise NotImplementedError

    @classmethod
    def load(cls, path: Path, width_in: int, width_out: int) -> Projector:
        """Read a saved one; CheckpointError naming both widths where they differ."""
        raise NotImplementedError

    def save(self, path: Path) -> None:
        """Write it as safetensors, kind and widths in the header; the bytes depend on the weights alone."""
        raise NotImplementedError

    def grid_out(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The grid after projection."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """See the class."""
        raise NotImplementedError
