"""How an image becomes tiles."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Tiling"]


@dataclass(frozen=True)
class Tiling:
    """Use ``Tiling.single(view)`` or ``Tiling.anyres(side, pinpoints)``."""

    kind: str

    @classmethod
    def single(cls, view: str) -> Tiling:
        """One tile: the whole image through a view of ``rice_eval.views`` (``square=448``, ``letterbox=448``, ``native,pad=14``)."""
        raise NotImplementedError

    @classmethod
    def anyres(cls, side: int, pinpoints: tuple[tuple[int, int], ...] = (), max_tiles: int | None = None) -> Tiling:
        """LLaVA-NeXT's tiles of ``side`` px; default pinpoints are those of LLaVA-NeXT in multiples of ``side``."""
        raise NotImplementedError
