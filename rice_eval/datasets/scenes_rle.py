"""COCO's compressed run-length encoding of a mask, so that writing ``scenes`` needs no extra package."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["encode"]


def encode(mask: NDArray[np.bool_]) -> bytes:
    """Runs of a mask ``(H, W)`` in column order, zeros first, as the printable bytes of COCO's ``counts``.

    Each run, less the run two before it from the fourth on, is written in groups of five bits, least first, with a sixth bit
    for "more follows" and an offset of 48, as documented in the COCO API's ``maskApi.c``.
    """
    flat = np.concatenate([[False], np.asarray(mask, bool).ravel(order="F")])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    runs = np.diff(np.concatenate([[0], edges, [flat.size - 1]])).tolist()
    out = bytearray()
    for k, run in enumerate(runs):
        value = run - runs[k - 2] if k > 2 else run
        more = True
        while more:
            group = value & 31
            value >>= 5
            more = value != -1 if group & 16 else value != 0
            out.append((group | (32 if more else 0)) + 48)
    return bytes(out)
