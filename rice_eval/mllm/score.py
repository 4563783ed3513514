"""Exact match of short answers."""

from __future__ import annotations

__all__ = ["exact", "normalise"]


def normalise(text: str) -> str:
    """Lower case, white space collapsed, quotes and final punctuation dropped."""
    return " ".join(text.lower().split()).strip("\"'`").rstrip(".,!?;: ").strip("\"'`")


def exact(answer: str, truth: str) -> bool:
    """Whether two short answers are the same once normalised."""
    return normalise(answer) == normalise(truth)
