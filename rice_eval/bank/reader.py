"""Random access to a finished entry of the bank."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rice_eval.bank.shard import MappedShard
from rice_eval.bank.source import ImageTokens
from rice_eval.errors import UsageError
from rice_eval.views import View

__all__ = ["Reader"]


class Reader:
    """Tokens of any image, straight from the memory map (see ``TokenReader``).

    Tensors are views of the map (floats as stored; int8 banks give fp32 copies): copy before changing them in place.

    Args:
        layers: layers to give.
        indices: the dataset's indices that have tokens, ascending.
        shard_images: images a shard.
        mapped: opens a shard by its number.
        view: the view, for the frames.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        indices: tuple[int, ...],
        shard_images: int,
        mapped: Callable[[int], MappedShard],
        view: View,
    ) -> None:
        self.layers = layers
        self.indices = indices
        self._length = shard_images
        self._mapped = mapped
        self._view = view

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> ImageTokens:
        """Tokens of the image at ``index`` of the dataset.

        Raises:
            UsageError: the image has no tokens: it was skipped, or the dataset has no such index.
        """
        shard = self._mapped(index // self._length) if index >= 0 else ()
        if not isinstance(shard, MappedShard) or index not in shard:
            raise UsageError(f"image {index} has no tokens", "ask for the source's indices only")
        return shard.image(index).tokens(self._view, self.layers)

    def __iter__(self) -> Iterator[ImageTokens]:
        return (self[index] for index in self.indices)

    def select(self, layers: tuple[int, ...]) -> Reader:
        """The same reader with some of its layers."""
        return Reader(layers, self.indices, self._length, self._mapped, self._view)
