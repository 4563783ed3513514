"""``scenes``: the embedded benchmark. Composed images with exact truth of every kind, made in memory from a seed.

Cut-outs of fifteen classes and signs with text, on photos; the sprites, backgrounds, fonts and words of ``val`` never occur in
``train``, and colours are drawn at random, so that they do not give a class away. See ``docs/scenes.md``.
"""

from __future__ import annotations

import dataclasses
import mmap
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rice_eval.datasets import scenes_rle
from rice_eval.datasets.base import (
    Correspondences,
    Dataset,
    DatasetOptions,
    Instances,
    Question,
    TextLine,
    check_options,
)
from rice_eval.datasets.scenes_facts import (
    MAX_SIZE,
    MIN_SIZE,
    annotation_id,
    check_numbers,
    classes,
    fingerprint,
    palette,
    things,
)
from rice_eval.datasets.scenes_folder import ScenesFolder
from rice_eval.datasets.scenes_layout import GENERATOR
from rice_eval.datasets.scenes_pack import pack
from rice_eval.datasets.scenes_questions import questions
from rice_eval.datasets.scenes_render import Scene, matches, render

__all__ = ["Scenes", "ScenesOptions", "factory"]

_CACHE_BYTES = 256 << 20  # some 1,200 renderings of 224 px


class _Cache:
    """The latest renderings of this process, in an unnamed temporary file; safe between threads.

    Mapped from a file, they count as page cache: memory stays flat however many scenes are used. Once the file has reached its
    limit a new one is begun; arrays that are still in use keep the old one's pages. Where nothing can be written, every call renders.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._file: IO[bytes] | None = None
        self._pages: mmap.mmap | None = None
        self._scenes: dict[tuple[int, str, int, int], Scene] = {}
        self._lock = threading.Lock()

    def get(self, seed: int, split: str, index: int, size: int) -> Scene:
        key = (seed, split, index, size)
        with self._lock:
            if key in self._scenes:
                return self._scenes[key]
        scene = render(seed, split, index, size)
        with self._lock:
            if key not in self._scenes:
                with suppress(OSError):
                    self._scenes[key] = self._mapped(scene)
        return scene

    def _mapped(self, scene: Scene) -> Scene:
        length = scene.image.nbytes + scene.owner.nbytes
        if self._file is None or self._pages is None or self._held + length > self._limit:
            self._scenes.clear()
            self._pages = None
            if self._file is not None:
                self._file.close()
            self._file, self._held = tempfile.TemporaryFile(prefix="rice-eval-scenes-"), 0  # noqa: SIM115 (closed above)
            self._file.truncate(max(self._limit, length))  # a hole: no room is taken until something is written
            # One mapping for all scenes, because each holds a file descriptor.
            self._pages = mmap.mmap(self._file.fileno(), max(self._limit, length), access=mmap.ACCESS_READ)
        start = self._held
        # Written through the file, read through the mapping: a full disk is an error here, not a signal at the first touch.
        self._file.seek(start)
        self._file.write(scene.image.tobytes() + scene.owner.tobytes())
        self._file.flush()
        self._held += length
        image = np.frombuffer(self._pages, np.uint8, scene.image.size, start).reshape(scene.image.shape)
        owner = np.frombuffer(self._pages, np.uint8, scene.owner.size, start + scene.image.size).reshape(
            scene.owner.shape
        )
        return dataclasses.replace(scene, image=image, owner=owner)


_cache = _Cache(_CACHE_BYTES)


class Scenes(Dataset):
    """One split, rendered on demand; scene ``i`` depends on (seed, split, i) alone, never on ``n``.

    Args:
        split: ``train`` or ``val``.
        n: number of scenes.
        size: side of the images in pixels, ``MIN_SIZE`` to ``MAX_SIZE``. The layout is the same at every size.
        seed: which set of scenes.

    Raises:
        UsageError: a split that does not exist, or a number out of range.
    """

    name = "scenes"
    provides = frozenset({"semantic", "instances", "text", "depth", "points", "questions"})

    def __init__(self, split: str, n: int, size: int = 224, seed: int = 0) -> None:
        check_numbers(split, n, size, seed)
        self.split, self.n, self.side, self.seed = split, n, size, seed
        self.classes, self.things, self.palette = classes(), things(), palette()

    def __len__(self) -> int:
        return self.n

    @property
    def fingerprint(self) -> str:
        """sha256 over the generator's version, the assets' bytes, split, number, size and seed."""
        return fingerprint(self.split, self.n, self.side, self.seed, GENERATOR, pack().fingerprint)

    def scene(self, index: int) -> Scene:
        """The rendering with its whole truth."""
        if not 0 <= index < self.n:
            raise IndexError(f"scene {index} of {self.n}")
        return _cache.get(self.seed, self.split, index, self.side)

    def other(self, index: int) -> Scene:
        """The other rendering (view b) of the same objects."""
        return render(self.seed, self.split, index, self.side, view=1)

    def image_id(self, index: int) -> str:
        """The index in six digits, as ``data make`` names the files."""
        return f"{index:06d}"

    def size(self, index: int) -> tuple[int, int]:
        """Height and width, both the set's side."""
        return self.side, self.side

    def image(self, index: int) -> NDArray[np.uint8]:
        """``(S, S, 3)`` uint8 RGB."""
        return self.scene(index).image.copy()

    def semantic(self, index: int) -> NDArray[np.int64]:
        """``(S, S)`` int64: 0 the background, then the classes of ``things`` plus one. No pixel is ignored."""
        return self.scene(index).labels()

    def instances(self, index: int) -> Instances:
        """Things and signs with at least one visible pixel, from the farthest to the nearest; boxes and masks show what is visible."""
        scene = self.scene(index)
        masks = tuple(
            {"size": list(scene.owner.shape), "counts": scenes_rle.encode(scene.owner == thing.owner)}
            for thing in scene.objects
        )
        return Instances(
            boxes=np.array([thing.box for thing in scene.objects], np.float64).reshape(-1, 4),
            labels=np.array([thing.label for thing in scene.objects], np.int64),
            masks=masks,
            crowd=np.zeros(len(scene.objects), bool),
            area=np.array([thing.area for thing in scene.objects], np.float64),
            ids=np.array([annotation_id(index, thing.owner) for thing in scene.objects], np.int64),
            names=tuple(thing.name for thing in scene.objects),
        )

    def text(self, index: int) -> tuple[TextLine, ...]:
        """The words on signs; ``ignore`` where something covers a part of them."""
        return tuple(
            TextLine(thing.polygon, thing.text, ignore=not thing.legible)
            for thing in self.scene(index).objects
            if thing.text is not None and thing.polygon is not None
        )

    def depth(self, index: int) -> NDArray[np.float32]:
        """``(S, S)`` distances: 1 to 3 for objects (twice as far is half as large), 4 for the background."""
        return self.scene(index).depth()

    def points(self, index: int) -> Correspondences:
        """View b, and points of objects that are visible in both views, exact to 1/64 of a pixel."""
        there = self.other(index)
        here, other, _ = matches(self.scene(index), there, self.seed, self.split, index)
        return Correspondences(there.image, here, other)

    def questions(self, index: int) -> tuple[Question, ...]:
        """At most one question a kind: presence, counting, colour, position, reading, box."""
        return questions(self.scene(index), self.seed, self.split, index)


class ScenesOptions(DatasetOptions):
    """Options of the reader.

    Without a data folder, those not given are 300 train and 150 val scenes of 224 px, seed 0. With one, ``size`` and
    ``seed`` must be the folder's where they are given, and ``n_train``, ``n_val`` take that many scenes from its start.
    """

    size: int | None = Field(None, ge=MIN_SIZE, le=MAX_SIZE)
    seed: int | None = Field(None, ge=0, lt=1 << 32)
    n_train: int | None = Field(None, ge=1)
    n_val: int | None = Field(None, ge=1)


def factory(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """The registry's entry: scenes from memory, or from a folder that ``rice-eval data make scenes`` wrote."""
    given = check_options("scenes", ScenesOptions, options)
    n = given.n_train if split == "train" else given.n_val
    if data is not None:
        return ScenesFolder(data, split, n=n, size=given.size, seed=given.seed)
    default = 300 if split == "train" else 150
    return Scenes(split, n or default, 224 if given.size is None else given.size, given.seed or 0)
