"""Tokens of a split as numbered rows, and the labels of their pixels, for probes that compare tokens one by one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rice_eval.bank.source import ImageTokens, TokenReader
from rice_eval.datasets.base import IGNORE
from rice_eval.errors import PlanError
from rice_eval.probes.linear import Moments
from rice_eval.protocols.segmentation import FrameLabels, joined
from rice_eval.views import Frame

__all__ = ["ROWS_AT_ONCE", "MaskStore", "PatchLabels", "TokenRows", "from_patches", "majority", "patches_of"]

ROWS_AT_ONCE = 32_768
"""Rows a piece: at 1024 features 128 MB in float32."""


def patches_of(labels: NDArray[np.integer[Any]], grid: tuple[int, int]) -> Tensor:
    """``(h, w)`` labels to ``(N, P)`` int64 labels of each token's P pixels.

    Raises:
        PlanError: tokens that do not divide the frame.
    """
    (h, w), (gh, gw) = labels.shape, grid
    if h % gh or w % gw:
        raise PlanError(
            f"{gh} x {gw} tokens do not divide a frame of {h} x {w} px, and this protocol labels whole patches",
            "choose an encoder or a view whose tokens divide it",
        )
    cells = torch.from_numpy(np.asarray(labels, dtype=np.int64)).view(gh, h // gh, gw, w // gw)
    return cells.permute(0, 2, 1, 3).reshape(gh * gw, -1)


def from_patches(labels: Tensor, grid: tuple[int, int], frame: Frame) -> NDArray[np.int16]:
    """``(N, P)`` labels of each token's pixels back to the ``(h, w)`` frame."""
    (gh, gw), (h, w) = grid, frame.size
    cells = labels.view(gh, gw, h // gh, w // gw).permute(0, 2, 1, 3).reshape(h, w)
    out: NDArray[np.int16] = cells.to(torch.int16).numpy()
    return out


class MaskStore:
    """Label maps of a split in an unnamed temporary file: memory does not grow with the split."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="rice-eval-masks-")  # noqa: SIM115  (lives as long as the store)
        self._places: dict[int, tuple[int, tuple[int, int]]] = {}

    def add(self, index: int, labels: NDArray[np.int16]) -> None:
        """Store the ``(h, w)`` labels of one image."""
        self._file.seek(0, 2)
        self._places[index] = (self._file.tell(), (labels.shape[0], labels.shape[1]))
        self._file.write(np.ascontiguousarray(labels, dtype=np.int16).tobytes())

    def __getitem__(self, index: int) -> Tensor:
        """``(h, w)`` int64."""
        start, shape = self._places[index]
        self._file.seek(start)
        raw = np.frombuffer(self._file.read(2 * shape[0] * shape[1]), dtype=np.int16).reshape(shape)
        return torch.from_numpy(raw.astype(np.int64))


class PatchLabels(FrameLabels):
    """Rides on the training pass: every token's pixel labels to an unnamed temporary file, and the features' moments.

    Views with one frame an image only.

    Args:
        layer: the layer read.
        width: D.
        held: images whose moments are kept apart.
        advance: called with 1 after each image.
    """

    def __init__(self, layer: int, width: int, held: Sequence[int], advance: Callable[[int], None]) -> None:
        self._layer, self._held, self._advance = layer, frozenset(held), advance
        self._store = MaskStore()
        self.moments = Moments(width)
        self.held_moments = Moments(width)

    def consume(self, tokens: ImageTokens) -> None:
        """Take in one image."""
        if len(tokens.frames) != 1:
            raise PlanError(
                "this protocol reads one window an image, not a sliding view", "use a view such as square=224"
            )
        labels = patches_of(tokens.target[0], tokens.grids[self._layer][0])
        self._store.add(tokens.index, labels.to(torch.int16).numpy())
        moments = self.held_moments if tokens.index in self._held else self.moments
        moments.add(tokens.patches[self._layer][0])
        self._advance(1)

    def __getitem__(self, index: int) -> Tensor:
        """``(N, P)`` int64 labels of one image."""
        return self._store[index]


def majority(labels: Tensor, classes: int) -> Tensor:
    """``(N, P)`` labels to ``(N,)``: the most frequent, counting ``IGNORE`` as one too; of equals the lowest."""
    shifted = labels - IGNORE
    counts = torch.zeros(len(labels), classes - IGNORE, dtype=torch.int32)
    counts.scatter_add_(1, shifted, torch.ones_like(shifted, dtype=torch.int32))
    return counts.argmax(dim=1) + IGNORE


class TokenRows:
    """Rows of some images' tokens, in pieces, standardised.

    Args:
        reader: of the split.
        layer: the layer read.
        indices: the images, in order.
        change: what is done to each image's ``(N, D)`` tokens.
        keep: ``(N,)`` bool, which tokens of an image become rows; None for all.
    """

    def __init__(
        self,
        reader: TokenReader,
        layer: int,
        indices: Sequence[int],
        change: Callable[[Tensor], Tensor],
        keep: Callable[[int], Tensor] | None = None,
    ) -> None:
        self._reader, self._layer, self.indices = reader, layer, tuple(indices)
        self._change, self._keep = change, keep

    def image(self, index: int) -> Tensor:
        """``(n, D)`` rows of one image."""
        tokens = self._change(joined(self._reader[index].patches[self._layer]).float())
        return tokens if self._keep is None else tokens[self._keep(index)]

    def __call__(self) -> Iterator[tuple[int, Tensor]]:
        """Pieces of about ``ROWS_AT_ONCE`` rows with the number of their first row."""
        waiting: list[Tensor] = []
        first = count = 0
        for index in self.indices:
            waiting.append(self.image(index))
            count += len(waiting[-1])
            if count >= ROWS_AT_ONCE:
                yield first, torch.cat(waiting)
                first, count, waiting = first + count, 0, []
        if count:
            yield first, torch.cat(waiting)
