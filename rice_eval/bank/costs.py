"""What a forward costs, kept beside the tokens: counting it takes a forward of its own and seconds, and it never changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from rice_eval import __version__
from rice_eval.results.files import write_atomic

__all__ = ["FLOPS", "counted_once"]

FLOPS = "flops.json"
"""Name of the file in the bank's folder: a line of text that says what was counted -> operations, or null where they can't be."""


def counted_once(root: Path, encoder: str, size: tuple[int, int], count: Callable[[], int | None]) -> int | None:
    """Operations of one image's forward: from the bank's folder, or counted and left there.

    Processes that count at the same time may lose each other's figures, which are then counted again; a file that can't be read
    counts as empty.

    Args:
        root: the bank's folder.
        encoder: fingerprint of the encoder.
        size: ``(H, W)`` of the image.
        count: called where nobody has counted yet.
    """
    # What is counted depends on torch's formulas and on how this version runs the encoder.
    name = f"{encoder} {size[0]}x{size[1]} rice-eval {__version__} torch {torch.__version__}"
    known = _read(root / FLOPS)
    if name in known:
        return known[name]
    found = count()
    known = {**_read(root / FLOPS), name: found}  # read again: others may have counted meanwhile
    # A bank that may only be read: counted again next time.
    with suppress(OSError):
        root.mkdir(parents=True, exist_ok=True)
        write_atomic(root / FLOPS, (json.dumps(known, indent=1, sort_keys=True) + "\n").encode())
    return found


def _read(path: Path) -> dict[str, int | None]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if v is None or type(v) is int} if isinstance(found, dict) else {}
