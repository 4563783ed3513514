"""What every reader of image files shares: names, images, sizes, the fingerprint."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from rice_eval.datasets.base import Dataset, Image, decode_image, files_fingerprint
from rice_eval.datasets.rasters import upright_size
from rice_eval.datasets.storage import Storage, sums
from rice_eval.errors import DataError

__all__ = ["FileDataset", "image_ids", "need_files", "need_split"]

FORMAT = 1
"""Raised whenever a reader turns the same files into other annotations, so that fingerprints part."""


def need_files(storage: Storage, names: Iterable[str], what: str, layout: str) -> None:
    """Raises DataError with how many of the files are missing and the first of them, if any is."""
    listed = list(names)
    absent = [name for name in listed if not storage.exists(name)]
    if absent:
        raise DataError(
            f"{storage.label(absent[0])}: no such {what} ({len(absent)} of {len(listed)} missing)",
            f"expected layout: {layout}",
        )


def need_split(dataset: str, split: str, known: Sequence[str]) -> None:
    """Raises DataError where ``split`` is none of the splits a layout has."""
    if split not in known:
        raise DataError(f"dataset '{dataset}' has no split '{split}'", f"its splits: {', '.join(known)}")


def image_ids(names: Sequence[str]) -> tuple[str, ...]:
    """Ids of images: the file's stem, or the path below their common folder where two files share a stem."""
    stems = tuple(posixpath.splitext(posixpath.basename(name))[0] for name in names)
    if len(set(stems)) == len(stems):
        return stems
    common = posixpath.commonpath([posixpath.dirname(name) for name in names])
    return tuple(posixpath.relpath(name, common) if common else name for name in names)


class FileDataset(Dataset):
    """Image files in a storage.

    Args:
        name: the registry's name.
        split: the split's own name.
        storage: where the files lie.
        images: a file name an image, relative to the storage.
        annotations: files that hold annotations of many images (JSON, lists): hashed whole.
        maps: an annotation file an image (mask, XML), or none: their sums of content enter the fingerprint.
        facts: whatever else decides the annotations (class mapping, options).
        sizes: heights and widths where the annotations state them; images are checked against them when decoded.
    """

    def __init__(
        self,
        name: str,
        split: str,
        storage: Storage,
        images: Sequence[str],
        *,
        annotations: Sequence[str] = (),
        maps: Sequence[str] = (),
        facts: Mapping[str, Any],
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        if not images:
            raise DataError(f"{storage.root}: {name} has no image in split '{split}'", "check --data and the split")
        self.name = name
        self.split = split
        self.storage = storage
        self.images = tuple(images)
        self.ids = image_ids(self.images)
        self._sizes = tuple(sizes) if sizes is not None else None
        self._annotations = tuple(annotations)
        self._maps = tuple(maps)
        self._facts = dict(facts)

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def _digest(self) -> str:
        # Images and maps go by their ids, annotation files by base names, wherever the layout puts them.
        parts = [(posixpath.basename(name), self.storage.read(name)) for name in self._annotations]
        for names, content in ((self._maps, True), (self.images, False)):
            parts += [(key, part) for key, (_, part) in zip(self.ids, sums(self.storage, names, by_content=content))]
        facts = {**self._facts, "reader": self.name, "format": FORMAT, "split": self.split, "classes": self.classes}
        return files_fingerprint(parts, {**facts, "things": self.things})

    @property
    def fingerprint(self) -> str:
        """sha256 over annotation files, sums of label maps, names and sizes of images, classes and options."""
        return self._digest

    def image_id(self, index: int) -> str:
        """See ``Dataset``."""
        return self.ids[index]

    def size(self, index: int) -> tuple[int, int]:
        """See ``Dataset``: from the annotations where they state it, else from the image's header."""
        if self._sizes is not None:
            return self._sizes[index]
        name = self.images[index]
        return upright_size(self.storage.open(name), self.storage.label(name))

    def image(self, index: int) -> Image:
        """See ``Dataset``; DataError too where the image has another size than the annotations state."""
        name = self.images[index]
        pixels = decode_image(self.storage.read(name), self.storage.label(name))
        height, width = pixels.shape[:2]
        if self._sizes is not None and (height, width) != self._sizes[index]:
            stated = self._sizes[index]
            raise DataError(
                f"{self.storage.label(name)}: {width}x{height} pixels upright, but the annotations say "
                f"{stated[1]}x{stated[0]}",
                "annotations must be in the pixels of the upright image: fetch the original, or strip its EXIF rotation",
            )
        return pixels
