"""Bounds of a probe's sizes. Light: no torch at import."""

from __future__ import annotations

__all__ = ["MOST_PROMPT", "MOST_SIDE", "MOST_WIDTH"]

MOST_SIDE, MOST_PROMPT, MOST_WIDTH = 64, 4096, 65_536
"""More cells a side, learned embeddings or channels than any language model here could take."""
