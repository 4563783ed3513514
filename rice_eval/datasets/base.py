"""The contract between a dataset on disk and everything else.

A reader turns one real layout into one set of types: images as ``uint8 (H, W, 3)``, semantic masks as class indices,
boxes as xyxy in pixels, text as polygons with transcripts. Every annotation is in the pixels of ``image(i)``.
"""

from __future__ import annotations

import hashlib
import struct
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from rice_eval.cards import first_problem
from rice_eval.errors import DataError, UsageError

__all__ = [
    "IGNORE",
    "Annotation",
    "Correspondences",
    "Dataset",
    "DatasetFactory",
    "DatasetOptions",
    "Instances",
    "Question",
    "TextLine",
    "check_options",
    "decode_image",
    "files_fingerprint",
    "undecoded",
]

IGNORE = -1
"""The label of a pixel that counts nowhere, whatever number the files use for it."""

Annotation = Literal["semantic", "instances", "text", "depth", "points", "questions"]
Image = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Instances:
    """Objects of one image.

    Attributes:
        boxes: ``(n, 4)`` float64 xyxy in pixels, x2 and y2 exclusive.
        labels: ``(n,)`` int64 indices into ``Dataset.things``.
        masks: COCO run-length encodings (``{"size": [H, W], "counts": bytes}``) a box, or None where the set has none.
        crowd: ``(n,)`` bool; a crowd region is neither a target nor a mistake.
        area: ``(n,)`` float64 pixels, as the set states it (of the mask where there is one).
        ids: ``(n,)`` int64 annotation ids.
        names: a phrase a box (sprite name, referring expression), or None.
    """

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    masks: tuple[Mapping[str, Any], ...] | None
    crowd: NDArray[np.bool_]
    area: NDArray[np.float64]
    ids: NDArray[np.int64]
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TextLine:
    """A line or word of text: ``polygon (k, 2)`` float64 pixels clockwise from the top left, its transcript, don't-care."""

    polygon: NDArray[np.float64]
    text: str
    ignore: bool = False


@dataclass(frozen=True)
class Question:
    """A question about one image with its short answer; ``kind`` groups questions (presence, counting, colour, …)."""

    kind: str
    question: str
    answer: str
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Correspondences:
    """Matched points of an image and another rendering of it: ``here`` and ``there`` are ``(n, 2)`` float64 xy in pixels."""

    other: Image
    here: NDArray[np.float64]
    there: NDArray[np.float64]


class Dataset(ABC):
    """One split of a dataset, read lazily; picklable, so that decoding workers can have it.

    Subclasses set the attributes and override what they provide; ``provides`` says which annotations those are.

    Attributes:
        name: the registry's name.
        split: the split's own name (``train2017``).
        classes: names of the semantic classes, in the order of the mask's indices.
        things: names of the instance classes, in the order of ``Instances.labels``.
        palette: RGB a semantic class, for pictures.
        provides: the annotations this split has.
        fingerprint: sha256 over everything that decides images and annotations (see ``files_fingerprint``).
        left_out: names of what a derived dataset has no image of since it can't be read; records list them as skipped.
    """

    name: str
    split: str
    classes: tuple[str, ...] = ()
    things: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    provides: frozenset[Annotation] = frozenset()

    @property
    def left_out(self) -> tuple[str, ...]:
        """See the class."""
        return ()

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that decides images and annotations."""
        raise NotImplementedError

    def image_id(self, index: int) -> str:
        """A stable name of the image (its file's stem)."""
        raise NotImplementedError

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of ``image(index)``, without decoding it where the layout allows."""
        height, width = self.image(index).shape[:2]
        return int(height), int(width)

    def image(self, index: int) -> Image:
        """``(H, W, 3)`` uint8 RGB, upright. Raises DataError naming the file where it can't be decoded."""
        raise NotImplementedError

    def semantic(self, index: int) -> Labels:
        """``(H, W)`` int64 class indices, ``IGNORE`` where nothing is labelled."""
        raise self._lacks("semantic")

    def instances(self, index: int) -> Instances:
        """The objects of one image."""
        raise self._lacks("instances")

    def text(self, index: int) -> tuple[TextLine, ...]:
        """The text lines of one image."""
        raise self._lacks("text")

    def depth(self, index: int) -> NDArray[np.float32]:
        """``(H, W)`` depth; the unit is the set's own, larger is farther, NaN where unknown."""
        raise self._lacks("depth")

    def points(self, index: int) -> Correspondences:
        """Another rendering of the scene and points matched to it."""
        raise self._lacks("points")

    def questions(self, index: int) -> tuple[Question, ...]:
        """Questions about one image."""
        raise self._lacks("questions")

    def _lacks(self, annotation: Annotation) -> DataError:
        has = ", ".join(sorted(self.provides)) or "images alone"
        return DataError(
            f"dataset '{self.name}' has no {annotation} annotations (it has {has})", "choose another dataset"
        )


class DatasetOptions(BaseModel):
    """Base of every reader's options: unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


DatasetFactory = Callable[[str, Path | None, Mapping[str, Any]], Dataset]
"""What the registry holds under a dataset's name: ``factory(split, data, options) -> Dataset``.

``data`` is the user's ``--data`` folder (or zip), None where none was given; a reader that needs one says so.
"""

_Options = TypeVar("_Options", bound=DatasetOptions)


def check_options(name: str, schema: type[_Options], options: Mapping[str, Any]) -> _Options:
    """Options of reader ``name`` against its schema; UsageError in one line otherwise."""
    try:
        return schema.model_validate(dict(options))
    except ValidationError as error:
        known = ", ".join(schema.model_fields) or "none"
        raise UsageError(f"dataset '{name}': {first_problem(error)}", f"its options: {known}") from error


def decode_image(source: Path | bytes, label: str | None = None) -> Image:
    """Decode one image as upright RGB.

    EXIF orientation is applied; grayscale, palette, 16-bit, CMYK and alpha images are converted (alpha over black is what
    ``convert("RGB")`` drops to, so alpha is composed over white instead, as viewers show it).

    Args:
        source: a file, or its bytes.
        label: what to call it in errors; the path by default.

    Raises:
        DataError: the file is missing, truncated or no image.
    """
    from io import BytesIO

    from PIL import Image as Pil
    from PIL import ImageOps

    name = label or (str(source) if isinstance(source, Path) else "image")
    try:
        with Pil.open(source if isinstance(source, Path) else BytesIO(source)) as opened:
            opened.load()
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I") or upright.mode == "F":
                # 16-bit grayscale: Pillow would clip at 255 instead of scaling.
                deep = np.asarray(upright, dtype=np.float64)
                scaled = np.clip(np.rint(deep / 257.0 if deep.max(initial=0) > 255 else deep), 0, 255).astype(np.uint8)
                return np.repeat(scaled[..., None], 3, axis=2)
            if "A" in upright.getbands() or "transparency" in upright.info:
                rgba = upright.convert("RGBA")
                upright = Pil.alpha_composite(Pil.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
            return np.asarray(upright.convert("RGB"), dtype=np.uint8).copy()
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such image", "check --data against the dataset's layout") from error
    except (OSError, SyntaxError, ValueError, struct.error, Pil.DecompressionBombError) as error:
        fix = "replace the file, or pass --on-bad-image=skip to leave it out and count it"
        raise DataError(f"{name}: can't be decoded ({undecoded(error)})", fix) from error


def undecoded(error: Exception) -> str:
    """Why Pillow can't read a file, without the address of the buffer it was in."""
    from PIL import UnidentifiedImageError

    return "empty, or no image format that is known" if isinstance(error, UnidentifiedImageError) else str(error)


def files_fingerprint(parts: Sequence[tuple[str, Path | bytes]], facts: Mapping[str, Any]) -> str:
    """sha256 over named files' bytes and a few facts, independent of where the files lie.

    Args:
        parts: ``(name, path or bytes)``; annotation files are hashed whole. Images may be given as ``name:size`` bytes where
            hashing all of them would take longer than the run.
        facts: numbers and names that decide the labels (class mapping, split, options).
    """
    import json

    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, part in parts:
        digest.update(f"\0{name}\0".encode(errors="surrogateescape"))  # file names need not be UTF-8
        if isinstance(part, bytes):
            digest.update(part)
        else:
            try:
                with part.open("rb") as handle:
                    for block in iter(lambda: handle.read(1 << 20), b""):
                        digest.update(block)
            except OSError as error:
                raise DataError(
                    f"{part}: can't be read ({error.strerror})", "check --data against the dataset's layout"
                ) from error
    return digest.hexdigest()
