"""Lines of text as a dataset of their own: each cut out, turned upright and brought to one height, so that a bank can key them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rice_eval.datasets.base import Dataset, TextLine
from rice_eval.datasets.files import FileDataset
from rice_eval.datasets.recognition import LabelFile, LmdbCrops
from rice_eval.datasets.scenes_text_set import LineFacts
from rice_eval.datasets.subset import Subset
from rice_eval.errors import DataError
from rice_eval.views import resize

__all__ = ["LineGeometry", "Scale", "TextCrops", "crop_of", "geometry", "line_facts", "rectify"]

FORMAT = 1
"""Version of the cutting; part of the fingerprint."""

_LARGEST = 1 << 22
"""Pixels of a line that are laid out whatever its image measures; far larger lines than the image come of broken polygons."""

Bytes = NDArray[np.uint8]
Points = NDArray[np.float64]
Scale = Literal["fit", "native"]


@runtime_checkable
class _Described(Protocol):
    def line_facts(self, index: int) -> tuple[LineFacts, ...]: ...


def line_facts(dataset: Dataset, index: int) -> tuple[LineFacts, ...] | None:
    """How the lines of an image were drawn, where the dataset says (``scenes-text``), through subsets; else None."""
    if isinstance(dataset, Subset):
        return line_facts(dataset.base, dataset.picked[index])
    return dataset.line_facts(index) if isinstance(dataset, _Described) else None


@dataclass(frozen=True)
class LineGeometry:
    """Height and width of a line along its own axes in pixels, and its turn in degrees, clockwise."""

    height: float
    width: float
    rotation: float


def _rails(polygon: Points) -> tuple[Points, Points]:
    """The line's upper and lower edge, both from left to right, with as many points each.

    A polygon of an even number of points is taken as its files draw it: half along the top, half back along the bottom. With
    an odd number the last point of the top is used for both edges.
    """
    half = (len(polygon) + 1) // 2
    top, bottom = polygon[:half], polygon[half:][::-1]
    if len(bottom) < len(top):
        bottom = np.concatenate([bottom, top[-1:]])
    return top, bottom


def geometry(polygon: Points) -> LineGeometry:
    """The size and turn of ``(k, 2)`` clockwise points that start at the top left."""
    top, bottom = _rails(polygon)
    middle = (top + bottom) / 2
    width = float(np.linalg.norm(np.diff(middle, axis=0), axis=1).sum())
    height = float(np.linalg.norm(bottom - top, axis=1).mean())
    run = middle[-1] - middle[0]
    return LineGeometry(height, width, float(np.degrees(np.arctan2(run[1], run[0]))))


def rectify(image: Bytes, polygon: Points, size: tuple[int, int], margins: tuple[float, float] = (0.0, 0.0)) -> Bytes:
    """Lay a polygon out as an upright rectangle: bilinear samples at the pixel centres, the image's border repeated outside it.

    Args:
        image: ``(H, W, 3)`` uint8.
        polygon: ``(k, 2)`` clockwise from the top left; between its points along the top and bottom, edges are straight.
        size: ``(h, w)`` of what the polygon itself fills.
        margins: vertical and horizontal, in shares of ``h`` and of ``w``, added on both sides of it.

    Returns:
        ``(round(h (1 + 2 m_v)), round(w (1 + 2 m_h)), 3)`` uint8.
    """
    top, bottom = _rails(polygon)
    steps = np.linalg.norm(np.diff((top + bottom) / 2, axis=0), axis=1)
    place = np.concatenate([[0.0], np.cumsum(steps)])
    place /= place[-1] or 1.0
    rows, columns = round(size[0] * (1 + 2 * margins[0])), round(size[1] * (1 + 2 * margins[1]))
    v = (np.arange(rows) + 0.5) / rows * (1 + 2 * margins[0]) - margins[0]
    u = (np.arange(columns) + 0.5) / columns * (1 + 2 * margins[1]) - margins[1]
    rails = []
    for rail in (top, bottom):
        along = np.stack([np.interp(u, place, rail[:, axis]) for axis in (0, 1)], 1)
        # Past its ends a rail goes straight on in the direction of its first and last stretch.
        first = (rail[1] - rail[0]) / ((place[1] - place[0]) or 1.0)
        last = (rail[-1] - rail[-2]) / ((place[-1] - place[-2]) or 1.0)
        along += np.minimum(u, 0)[:, None] * first + np.maximum(u - 1, 0)[:, None] * last
        rails.append(along)
    points = rails[0][None] * (1 - v[:, None, None]) + rails[1][None] * v[:, None, None]
    return _bilinear(image, points)


def _bilinear(image: Bytes, points: Points) -> Bytes:
    height, width = image.shape[:2]
    x = np.clip(points[..., 0] - 0.5, 0, width - 1)
    y = np.clip(points[..., 1] - 0.5, 0, height - 1)
    x0, y0 = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    x1, y1 = np.minimum(x0 + 1, width - 1), np.minimum(y0 + 1, height - 1)
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]
    above = image[y0, x0] * (1 - fx) + image[y0, x1] * fx
    below = image[y1, x0] * (1 - fx) + image[y1, x1] * fx
    out: Bytes = np.rint(above * (1 - fy) + below * fy).astype(np.uint8)
    return out


@dataclass(frozen=True)
class _Shape:
    """A crop's size: of the polygon before and after scaling, its margins, and the width that shows image."""

    native: tuple[int, int]
    margins: tuple[float, float]
    content: int
    squeezed: bool


def _shape(polygon: Points, height: int, scale: Scale, margin: float, max_aspect: float) -> _Shape:
    line = geometry(polygon)
    tall, wide = max(line.height, 1.0), max(line.width, 1.0)
    vertical = margin
    if scale == "native" and tall * (1 + 2 * margin) <= height:
        vertical = (height / tall - 1) / 2
    full = tall * (1 + 2 * vertical)
    across = wide + 2 * margin * tall
    content = max(1, round(height * across / full))
    limit = int(height * max_aspect)
    native = (max(1, round(tall)), max(1, round(wide)))
    return _Shape(native, (vertical, margin * tall / wide), min(content, limit), content > limit)


def crop_of(
    image: Bytes, polygon: Points, height: int, scale: Scale, margin: float, max_aspect: float
) -> tuple[Bytes, int]:
    """A line as a crop of the given height: see ``TextCrops``.

    Returns:
        ``(height, W, 3)`` uint8, W the next multiple of ``height``, and the width in pixels that shows the line; the rest
        repeats the mean colour of the last column.
    """
    shape = _shape(polygon, height, scale, margin, max_aspect)
    upright = rectify(image, polygon, shape.native, shape.margins)
    scaled = resize(upright, (height, shape.content), "bicubic")
    out = np.empty((height, -(-shape.content // height) * height, 3), np.uint8)
    out[:, : shape.content] = scaled
    out[:, shape.content :] = np.rint(scaled[:, -1].mean(axis=0)).astype(np.uint8)
    return out, shape.content


def _whole_of(dataset: Dataset) -> Dataset:
    while isinstance(dataset, Subset):
        dataset = dataset.base
    return dataset


class TextCrops(Dataset):
    """Every legible line of a dataset as an image of its own.

    A line is laid out upright along its polygon, with some margin, and scaled to one height; its width follows, and is
    filled up to the next multiple of the height, so that crops share a few sizes. Don't-care lines make no crop.

    Args:
        base: images with text; words that are images already (LMDB, label files) are brought to the height alike.
        height: of the crops in pixels.
        scale: ``fit``: the line with its margin fills the height; ``native``: pixels stay pixels, and what lies above and
            below the line fills the height (lines too tall for it are fitted).
        margin: around the line, in shares of its height.
        max_aspect: widest crop in heights; longer lines are squeezed, and counted in ``squeezed``.

    Attributes:
        unreadable: ids of entries of a recognition set whose image can't be decoded or whose label can't be read; they make
            no crop, and a record lists them among the images it left out.
    """

    provides = frozenset({"text"})

    def __init__(
        self, base: Dataset, height: int, scale: Scale = "fit", margin: float = 0.15, max_aspect: float = 32.0
    ) -> None:
        self.base, self.height, self.scale, self.margin, self.max_aspect = base, height, scale, margin, max_aspect
        self.name, self.split = base.name, base.split
        self._page: tuple[int, Bytes] | None = None

    @cached_property
    def beyond(self) -> tuple[str, ...]:
        """Folders of LMDBs with entries after ``num-samples``: the field's readers leave them out too."""
        inner = _whole_of(self.base)
        return inner.beyond if isinstance(inner, LmdbCrops) else ()

    @cached_property
    def outside(self) -> int:
        """Lines of an image file that lie wholly outside it or have no area: they make a crop, of its border's pixels."""
        inner = _whole_of(self.base)
        if not isinstance(inner, FileDataset) or isinstance(inner, LabelFile):  # a label file's crop is its own line
            return 0
        sizes: dict[int, tuple[int, int]] = {}
        count = 0
        for page, _, line in self._found[0]:
            if page not in sizes:
                try:
                    sizes[page] = self.base.size(page)
                except DataError:  # it can't be decoded: the pass says so
                    sizes[page] = (1 << 62, 1 << 62)
            height, width = sizes[page]
            (left, top), (right, bottom) = line.polygon.min(axis=0), line.polygon.max(axis=0)
            count += right <= max(left, 0) or bottom <= max(top, 0) or left >= width or top >= height
        return count

    @cached_property
    def _found(self) -> tuple[list[tuple[int, int, TextLine]], int, tuple[str, ...]]:
        inner = _whole_of(self.base)
        lenient = isinstance(inner, (LmdbCrops, LabelFile))
        found, ignored, unreadable = [], 0, []
        for index in range(len(self.base)):
            try:
                lines: Sequence[TextLine] = self.base.text(index)
                if lenient:
                    self.base.image(index)  # a damaged body is found here, not halfway through a pass
            except DataError:
                if not lenient:
                    raise
                unreadable.append(self.base.image_id(index))
                continue
            for number, line in enumerate(lines):
                if line.ignore or not line.text:
                    ignored += 1
                else:
                    found.append((index, number, line))
        return found, ignored, tuple(unreadable)

    @property
    def ignored(self) -> int:
        """Don't-care lines, empty labels among them."""
        return self._found[1]

    @property
    def unreadable(self) -> tuple[str, ...]:
        """See the class."""
        return self._found[2]

    @property
    def left_out(self) -> tuple[str, ...]:
        """``unreadable``, after the split's name: numbers of two LMDBs are alike."""
        return tuple(f"{self.split}:{key}" for key in self.unreadable)

    @property
    def squeezed(self) -> int:
        """Lines longer than ``max_aspect``."""
        return sum(self._shape(k).squeezed for k in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_page": None}

    def __len__(self) -> int:
        return len(self._found[0])

    @cached_property
    def fingerprint(self) -> str:
        """Of the base and of how lines are cut."""
        cut = f"{FORMAT}/{self.height}/{self.scale}/{self.margin:g}/{self.max_aspect:g}"
        return hashlib.sha256(f"{self.base.fingerprint}/crops/{cut}".encode()).hexdigest()

    def origin(self, index: int) -> tuple[int, int]:
        """The image of ``base`` that a crop comes from, and the line's number in its ``text``."""
        return self._found[0][index][:2]

    def image_id(self, index: int) -> str:
        """The image's name and the line's number."""
        page, number = self.origin(index)
        return f"{self.base.image_id(page)}-{number:04d}"

    def _shape(self, index: int) -> _Shape:
        polygon = self._found[0][index][2].polygon
        return _shape(polygon, self.height, self.scale, self.margin, self.max_aspect)

    def content_width(self, index: int) -> int:
        """Pixels from the left that show the line."""
        return self._shape(index).content

    def size(self, index: int) -> tuple[int, int]:
        """The height, and a multiple of it."""
        return self.height, -(-self.content_width(index) // self.height) * self.height

    def image(self, index: int) -> Bytes:
        """``(height, W, 3)`` uint8."""
        page, _, line = self._found[0][index]
        held = self._page  # crops of a page follow each other: it is decoded once
        if held is None or held[0] != page:
            held = self._page = (page, self.base.image(page))
        drawn, (height, width) = geometry(line.polygon), held[1].shape[:2]
        if drawn.height * drawn.width > max(_LARGEST, 4.0 * (height**2 + width**2)):
            raise DataError(
                f"{self.image_id(index)}: the polygon of {line.text!r} is {drawn.width:.0f} x {drawn.height:.0f} pixels, "
                f"its image {width} x {height}",
                "mend the polygon",
            )
        return crop_of(held[1], line.polygon, self.height, self.scale, self.margin, self.max_aspect)[0]

    def text(self, index: int) -> tuple[TextLine, ...]:
        """The line, its polygon the part of the crop that shows it."""
        width = float(self.content_width(index))
        corners = np.array([(0, 0), (width, 0), (width, self.height), (0, self.height)], dtype=np.float64)
        return (TextLine(corners, self._found[0][index][2].text),)
