"""Memory for what lives as long as a shard, apart from the heap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Arena"]

_CHUNK = 64 << 20
"""Above 32 MiB, glibc's largest threshold, so that a chunk is a mapping of its own: it goes back to the system as a whole."""


class Arena:
    """Hands out tensors from large chunks, each freed when the last of its tensors is.

    Tokens of a shard outlive the activations that are made and freed between them; on the heap they would leave holes, and
    resident memory would creep up with the number of images.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the CPU, aligned to 64 bytes."""
        size = dtype.itemsize
        for side in shape:
            size *= side
        start = -(-self._used // 64) * 64
        if start + size > len(self._chunk):
            self._chunk, start = torch.empty(max(_CHUNK, size), dtype=torch.uint8), 0
        self._used = start + size
        return self._chunk[start : start + size].view(dtype).view(tuple(shape))
