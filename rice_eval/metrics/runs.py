"""Checks of COCO's run lengths in files of others, before pycocotools sees them: it trusts what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["check_runs", "decode_runs"]


def decode_runs(counts: Any) -> list[int]:
    """The runs of COCO's compressed ``counts``, str or bytes.

    Raises:
        ValueError: anything else, or a last run that is cut off.
    """
    if not isinstance(counts, (str, bytes)):
        raise ValueError(f"counts are {type(counts).__name__}")
    runs: list[int] = []
    value = shift = 0
    for byte in counts.encode() if isinstance(counts, str) else counts:
        group = byte - 48
        if not 0 <= group < 64:
            raise ValueError(f"the byte {byte} in its counts")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("its counts are cut off")
    return runs


def check_runs(runs: Sequence[Any], height: int, width: int) -> None:
    """Raise ValueError where runs are no whole numbers of zero or more that sum to ``height * width``."""
    if not all(type(run) is int and run >= 0 for run in runs):
        raise ValueError("a run is a whole number of zero or more")
    if sum(runs) != height * width:
        raise ValueError(f"its runs sum to {sum(runs)}, its image has {height * width} pixels")
