"""Label histograms of tokens: with them, training a head on tokens equals training it on pixels.

With nearest-neighbour upsampling of the logits, the cross-entropies of a patch's pixels add up to ``-sum_c n_c log p_c``, where
``n_c`` counts the patch's pixels of class c. Ignored pixels drop out of the counts and so lower the token's weight.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "SparseTargets",
    "TargetStore",
    "cell_histograms",
    "concatenate",
    "token_areas",
    "token_histograms",
    "token_loss",
]

Labels = NDArray[np.int64]


def _token_of_pixel(pixels: int, tokens: int) -> NDArray[np.int64]:
    """``(pixels,)`` the token whose cell holds each pixel's centre: floor((p + 1/2) * tokens / pixels), in whole numbers."""
    return ((2 * np.arange(pixels, dtype=np.int64) + 1) * tokens) // (2 * pixels)


@dataclass(frozen=True)
class SparseTargets:
    """Histograms of N tokens, without their zeros.

    Attributes:
        tokens: ``(k,)`` int64 token of each entry, ascending.
        classes: ``(k,)`` int64 class of each entry.
        counts: ``(k,)`` int64 pixels, all positive.
        size: N.
    """

    tokens: NDArray[np.int64]
    classes: NDArray[np.int64]
    counts: NDArray[np.int64]
    size: int

    def dense(self, classes: int) -> Tensor:
        """``(N, C)`` float32 counts."""
        out = torch.zeros(self.size, classes)
        out[torch.from_numpy(self.tokens), torch.from_numpy(self.classes)] = torch.from_numpy(self.counts).float()
        return out


def token_histograms(labels: Labels, grid: tuple[int, int], ignore: int) -> SparseTargets:
    """How many pixels of each class each token covers.

    Args:
        labels: ``(h, w)`` labels of the frame the encoder saw, ``ignore`` where nothing counts (padding too).
        grid: ``(gh, gw)`` tokens; they need not divide the frame: a pixel belongs to the token nearest to its centre.
        ignore: the label that counts nowhere.

    Returns:
        Histograms of ``gh * gw`` tokens in raster order.
    """
    gh, gw = grid
    h, w = labels.shape
    token = _token_of_pixel(h, gh)[:, None] * gw + _token_of_pixel(w, gw)[None, :]
    keep = labels != ignore
    if not keep.any():
        none = np.zeros(0, dtype=np.int64)
        return SparseTargets(none, none, none, gh * gw)
    kept = labels[keep].astype(np.int64)
    span = int(kept.max()) + 1
    counts = np.bincount(token[keep] * span + kept, minlength=0)
    entries = np.flatnonzero(counts)
    return SparseTargets(entries // span, entries % span, counts[entries].astype(np.int64), gh * gw)


def cell_histograms(labels: Labels, grid: tuple[int, int], side: int, ignore: int) -> SparseTargets:
    """``token_histograms`` of parts of tokens.

    Args:
        labels, grid, ignore: see ``token_histograms``.
        side: a token is cut into ``side * side`` cells.

    Returns:
        Histograms of ``gh * gw * side * side`` cells: tokens in raster order, and within each its cells in raster order.
    """
    fine = token_histograms(labels, (grid[0] * side, grid[1] * side), ignore)
    if side == 1:
        return fine
    row, column = np.divmod(fine.tokens, grid[1] * side)
    token = row // side * grid[1] + column // side
    cell = token * side * side + row % side * side + column % side
    order = np.argsort(cell, kind="stable")
    return SparseTargets(cell[order], fine.classes[order], fine.counts[order], fine.size)


def token_loss(logits: Tensor, counts: Tensor) -> Tensor:
    """Mean cross-entropy over labelled pixels: equal to the pixel loss under nearest-neighbour upsampling.

    Args:
        logits: ``(T, C)``.
        counts: ``(T, C)`` label histograms.

    Returns:
        A scalar; 0 where no pixel is labelled.
    """
    total = counts.sum().clamp(min=1.0)
    return -(counts * torch.log_softmax(logits, dim=-1)).sum() / total


def token_areas(predicted: Tensor, counts: Tensor) -> Tensor:
    """Areas of a prediction of one class a token.

    Args:
        predicted: ``(T,)`` or ``(T, H)`` int64 classes, one column a head.
        counts: ``(T, C)`` label histograms.

    Returns:
        ``(3, C)`` or ``(H, 3, C)`` float64 areas in pixels: intersection, prediction, label. Exactly those of the label map
        upsampled to nearest neighbours.
    """
    single = predicted.ndim == 1
    columns = predicted[:, None] if single else predicted
    exact = counts.double()
    weight, label = exact.sum(dim=1), exact.sum(dim=0)
    out = torch.zeros(columns.shape[1], 3, counts.shape[1], dtype=torch.float64, device=counts.device)
    for head, column in enumerate(columns.unbind(dim=1)):
        out[head, 0].index_add_(0, column, exact.gather(1, column[:, None])[:, 0])
        out[head, 1].index_add_(0, column, weight)
        out[head, 2] = label
    return out[0] if single else out


class TargetStore:
    """Histograms of a whole split in an unnamed temporary file: memory does not grow with the split.

    An image of 1024 tokens takes about 10 kB on disk. The file goes when the store does.
    """

    _ENTRY = np.dtype([("token", "<u4"), ("class", "<u2"), ("count", "<u4")])

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="rice-eval-targets-")  # noqa: SIM115  (lives as long as the store)
        self._places: dict[int, tuple[int, int, int]] = {}

    def add(self, index: int, targets: SparseTargets) -> None:
        """Store the histograms of one image (of all its frames, one after the other)."""
        entries = np.empty(len(targets.tokens), dtype=self._ENTRY)
        entries["token"], entries["class"], entries["count"] = targets.tokens, targets.classes, targets.counts
        self._file.seek(0, 2)
        self._places[index] = (self._file.tell(), len(entries), targets.size)
        self._file.write(entries.tobytes())

    def __contains__(self, index: int) -> bool:
        return index in self._places

    def __getitem__(self, index: int) -> SparseTargets:
        """The histograms of the image at ``index``."""
        start, count, size = self._places[index]
        self._file.seek(start)
        entries = np.frombuffer(self._file.read(count * self._ENTRY.itemsize), dtype=self._ENTRY)
        fields = (entries[name].astype(np.int64) for name in ("token", "class", "count"))
        tokens, classes, counts = fields
        return SparseTargets(tokens, classes, counts, size)


def concatenate(parts: list[SparseTargets]) -> SparseTargets:
    """Histograms of several frames as one run of tokens."""
    starts = np.cumsum([0] + [p.size for p in parts])
    return SparseTargets(
        np.concatenate([p.tokens + start for p, start in zip(parts, starts)]),
        np.concatenate([p.classes for p in parts]),
        np.concatenate([p.counts for p in parts]),
        int(starts[-1]),
    )
