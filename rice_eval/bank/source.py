"""What protocols see of the bank: tokens of one split of a dataset at one view, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from rice_eval.datasets.base import Dataset
from rice_eval.views import Frame

__all__ = ["Consumer", "ImageTokens", "TokenReader", "TokenSource"]


@dataclass(frozen=True)
class ImageTokens:
    """Tokens of one image.

    Attributes:
        index: the image's index in its dataset.
        frames: the view's F windows.
        patches: layer -> F tensors ``(N_f, D)``, fp32 or the bank's float type, on the CPU unless a pass hands them over.
        grids: layer -> F pairs ``(h, w)`` with ``N_f = h * w``.
        cls: ``(F, D)`` or None.
        target: what the consumer's ``annotate`` returned for this image; None for a plain reader.
    """

    index: int
    frames: tuple[Frame, ...]
    patches: Mapping[int, tuple[Tensor, ...]]
    grids: Mapping[int, tuple[tuple[int, int], ...]]
    cls: Tensor | None = None
    target: Any = None


class Consumer(Protocol):
    """Something that rides on a pass instead of reading the bank.

    ``annotate`` may run in a decoding worker (it must be picklable); ``consume`` runs in the main process, image by image in
    the dataset's order.
    """

    def annotate(self, dataset: Dataset, index: int, frames: tuple[Frame, ...]) -> Any:
        """What ``consume`` needs of the image's annotations."""
        ...

    def consume(self, tokens: ImageTokens) -> None:
        """Take in one image."""
        ...


class TokenReader(Protocol):
    """Random access to a finished split in the bank; memory-mapped, so memory stays flat."""

    layers: tuple[int, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ImageTokens:
        """Tokens of the image at ``index`` of the dataset."""
        ...

    def __iter__(self) -> Iterator[ImageTokens]: ...


class TokenSource(Protocol):
    """Tokens of one split at one view.

    Attributes:
        forwards: images pushed through the encoder so far by this source; 0 from a warm bank.
        indices: the dataset's indices that have tokens (all, unless bad images were skipped).
    """

    @property
    def forwards(self) -> int: ...

    @property
    def indices(self) -> tuple[int, ...]: ...

    def consume(self, *consumers: Consumer) -> None:
        """Show every image to every consumer, once, in order: from the bank if it is there, else on the pass that fills it."""
        ...

    def reader(self) -> TokenReader:
        """The finished bank entry; extracts what is missing first."""
        ...
