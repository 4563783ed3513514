"""Protocol ``text-mask``: finding text in whole images from frozen tokens, and boxes from the map."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from rice_eval.bank.source import ImageTokens
from rice_eval.datasets.base import IGNORE, Annotation, Dataset, TextLine
from rice_eval.datasets.text_crops import line_facts
from rice_eval.errors import MissingExtraError
from rice_eval.metrics.text_boxes import match, smallest_rectangle
from rice_eval.metrics.text_statistics import TextStatistics, TextSums
from rice_eval.probes.linear import LinearMap
from rice_eval.protocols.base import Context, Outcome, Panel
from rice_eval.protocols.linear import Linear, LinearTrainPass
from rice_eval.protocols.ocr_lines import group_names, groups_of, spread
from rice_eval.protocols.segmentation import LayerSet, check_optimiser, scaled_logits
from rice_eval.report.panels import Polygons
from rice_eval.views import Frame

__all__ = ["Finder", "MaskScorer", "TextMask", "boxes_of", "text_labels"]

MASK_METRICS = ("hmean", "precision", "recall", "text_iou", "pixel_accuracy")

Labels = NDArray[np.int64]
Polygon = NDArray[np.float64]


def text_labels(lines: Sequence[TextLine], size: tuple[int, int], shrink: float = 0.0) -> Labels:
    """``(H, W)`` labels: 1 in legible text, ``IGNORE`` in don't-care text, 0 elsewhere; legible text wins.

    Args:
        lines: of the image.
        size: ``(H, W)``.
        shrink: share of a line's height cut off above and below, so that lines close to one another stay apart; what is cut
            off counts as no text.
    """
    codes = np.zeros(size, dtype=np.int64)
    for line in lines:
        if line.ignore:
            _fill(codes, line.polygon, 2)
    for line in lines:
        if not line.ignore:
            _fill(codes, _thinner(line.polygon, shrink) if shrink else line.polygon, 1)
    return np.where(codes == 2, IGNORE, codes)


def _fill(canvas: Labels, polygon: Polygon, value: int) -> None:
    """Set the pixels whose centres lie in a polygon (even-odd rule)."""
    x0, y0 = np.floor(polygon.min(axis=0)).astype(int).clip(0)
    x1, y1 = np.ceil(polygon.max(axis=0)).astype(int)
    area = canvas[y0:y1, x0:x1]
    if not area.size:
        return
    x = (np.arange(x0, x0 + area.shape[1]) + 0.5)[None, :]
    y = (np.arange(y0, y0 + area.shape[0]) + 0.5)[:, None]
    inside = np.zeros(area.shape, dtype=np.bool_)
    for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, -1, axis=0)):
        if ay != by:
            inside ^= ((y >= min(ay, by)) & (y < max(ay, by))) & (x < ax + (y - ay) * (bx - ax) / (by - ay))
    area[inside] = value


def _thinner(polygon: Polygon, share: float) -> Polygon:
    """The polygon with ``share`` of its height cut off above and below."""
    half = (len(polygon) + 1) // 2
    top, bottom = polygon[:half], polygon[half:][::-1]
    if len(top) != len(bottom):
        return polygon
    down = (bottom - top) * share
    return np.concatenate([top + down, (bottom - down)[::-1]])


class _MaskPass(LinearTrainPass):
    """Labels of the training images from their lines; see ``text_labels``."""

    shrink: ClassVar[float] = 0.0

    def annotate(self, dataset: Dataset, index: int, frames: tuple[Frame, ...]) -> tuple[NDArray[np.int16], ...]:
        """F arrays ``(h, w)``."""
        labels = text_labels(dataset.text(index), dataset.size(index), self.shrink)
        return tuple(frame.mask(labels, IGNORE).astype(np.int16) for frame in frames)


class _ThinPass(_MaskPass):
    """The middle half of each line alone is text."""

    shrink: ClassVar[float] = 0.25


def boxes_of(
    probability: NDArray[np.float32], threshold: float, min_area: float, grow: float, join: float = 0.0
) -> tuple[list[Polygon], list[float]]:
    """Text regions from a map: connected parts (8 neighbours) above a threshold, each in its smallest rectangle.

    Args:
        probability: ``(H, W)`` of text, 0 to 1.
        threshold: a pixel is text above it.
        min_area: pixels a part has at least.
        grow: share of a rectangle's short side that is added on every side (undoes labels that were thinned).
        join: parts of one row of an upright page are one region when the gap between them is at most so many heights of the
            lower one, as it will have grown; see ``_rows``.

    Returns:
        ``(4, 2)`` polygons in pixels and scores (mean probability of the region), the largest score first.
    """
    try:
        from scipy import ndimage
    except ImportError as error:
        raise MissingExtraError.of("scipy", "ocr", "finding connected text") from error
    labels, count = ndimage.label(probability > threshold, structure=np.ones((3, 3), dtype=np.int64))
    parts: list[_Part] = []
    for number, window in enumerate(ndimage.find_objects(labels, count), start=1):
        if window is None:
            continue
        inside = labels[window] == number
        if int(inside.sum()) < min_area:
            continue
        rows, columns_ = np.nonzero(inside)
        y, x = rows + window[0].start, columns_ + window[1].start
        # The corners of the part's outermost pixels: enough for its smallest rectangle.
        edge = (rows == 0) | (rows == inside.shape[0] - 1) | ~_inner(inside)[rows, columns_]
        points = np.concatenate([np.stack([x[edge] + dx, y[edge] + dy], 1) for dx in (0, 1) for dy in (0, 1)])
        box = (window[1].start, window[0].start, window[1].stop, window[0].stop)
        parts.append(_Part(box, points.astype(np.float64), float(probability[window][inside].sum()), len(rows)))
    found: list[tuple[float, Polygon]] = []
    for row in _rows([part.box for part in parts], join, grow) if join and parts else [[k] for k in range(len(parts))]:
        rectangle = smallest_rectangle(np.concatenate([parts[k].points for k in row]))
        if rectangle is not None:
            score = sum(parts[k].total for k in row) / sum(parts[k].pixels for k in row)
            found.append((score, _grown(rectangle, grow) if grow else rectangle))
    found.sort(key=lambda item: -item[0])
    return [polygon for _, polygon in found], [score for score, _ in found]


@dataclass(frozen=True)
class _Part:
    """A connected part: ``(x0, y0, x1, y1)``, ``(k, 2)`` corners of its outermost pixels, its probabilities' sum, its pixels."""

    box: tuple[int, int, int, int]
    points: Polygon
    total: float
    pixels: int


def _rows(boxes: Sequence[tuple[int, int, int, int]], join: float, grow: float) -> list[list[int]]:
    """Parts that belong together, as lists of their numbers.

    Two parts do when they share more than half of the lower one's height, the higher one is less than twice as high, and what
    lies between them is at most ``join`` heights of the lower one wide, where a height is what it is after growing.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    order = np.argsort(corners[:, 0], kind="stable")
    left, top, right, bottom = corners[order].T
    high = bottom - top
    # A part that is less than twice as high and begins past this is too far away: of a map full of specks few pairs are left.
    reach = right + (3 * grow + join * (1 + 2 * grow)) * high
    ends = np.searchsorted(left, reach, side="right")
    pairs: list[NDArray[np.int64]] = []
    for place, end in enumerate(ends):
        rest = slice(place + 1, max(int(end), place + 1))
        low = np.minimum(high[place], high[rest])
        shared = np.minimum(bottom[place], bottom[rest]) - np.maximum(top[place], top[rest])
        gap = left[rest] - right[place] - grow * (high[place] + high[rest])
        alike = (shared > 0.5 * low) & (np.maximum(high[place], high[rest]) < 2 * low)
        near = np.flatnonzero(alike & (gap <= join * low * (1 + 2 * grow)))
        pairs.append(np.stack([np.full(len(near), order[place]), order[place + 1 + near]]))
    first, second = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), dtype=np.int64)
    size = len(boxes)
    joined = coo_array((np.ones(len(first), dtype=np.bool_), (first, second)), shape=(size, size))
    _, row_of = connected_components(joined, directed=False)
    rows: dict[int, list[int]] = {}
    for k, row in enumerate(row_of.tolist()):
        rows.setdefault(row, []).append(k)
    return list(rows.values())


def _inner(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels whose four neighbours are all in the mask."""
    wide = np.pad(mask, 1)
    return wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]


def _grown(rectangle: Polygon, share: float) -> Polygon:
    across, down = rectangle[1] - rectangle[0], rectangle[3] - rectangle[0]
    width, height = float(np.linalg.norm(across)), float(np.linalg.norm(down))
    by = share * min(width, height)
    right, low = across / max(width, 1e-9) * by, down / max(height, 1e-9) * by
    out: Polygon = rectangle + np.array([-right - low, right - low, right + low, low - right])
    return out


@dataclass(frozen=True)
class TextMask(Linear):
    """Finding text: a linear map of each token to text or not, as ``linear`` trains it, then boxes.

    Labels are pixels inside the lines' polygons; don't-care regions count nowhere. At test the map is upsampled bilinearly
    to the image; connected parts above the threshold, in their smallest rectangles, are scored by the rule of ICDAR 2015. The
    pixel IoU of text is that of the map against the polygons.

    Attributes:
        thin: train on the middle half of each line, so that lines close to one another stay apart where the map is fine
            enough; ``grow`` widens boxes again. The pixel IoU is then that of the middle halves.
        threshold: a pixel is text above this probability.
        cell: pixels of what the encoder saw that one value of the map covers: a token of stride s is cut into
            round(s / cell) ** 2 cells, each with logits of its own from the whole token, so that lines closer than tokens
            can stay apart; 0 gives a token one value.
        min_tokens: smallest part, in values of the map (of averaged ones, where they are averaged).
        grow: share of a box's short side that is added on every side; 0.5 brings a line of half its height back to the whole.
        join: on upright pages, parts of one row with at most so many heights of the lower one between them are one line; 0
            keeps every part a region of its own.
        smooth: pixels of what the encoder saw: where values are finer (early stages of a CNN, or cells), their logits are
            averaged over as much, so that a line is one part and not its strokes.
    """

    id: ClassVar[str] = "text-mask"
    kind: ClassVar[str] = "ocr"
    needs: ClassVar[frozenset[Annotation]] = frozenset({"text"})
    metric: ClassVar[str] = "hmean"

    layer_set: LayerSet = "quarters"
    thin: bool = False
    threshold: float = 0.5
    cell: float = 0.0
    min_tokens: float = 0.5
    grow: float = 0.0
    join: float = 0.0
    smooth: float = 14.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_optimiser(self.lrs, self.wds, self.betas)
        lengths = (self.cell, self.min_tokens, self.grow, self.join, self.smooth)
        if not 0 < self.threshold < 1 or not all(0 <= v < math.inf for v in lengths):
            raise ValueError("threshold is in (0, 1), cell, min_tokens, grow, join and smooth 0 or more")
        if 0 < self.cell < 1:
            raise ValueError("cell is a pixel at least, or 0 for one value a token")

    def cells_a_side(self, stride: float) -> int:
        """See ``cell``."""
        return max(1, round(stride / self.cell)) if self.cell else 1

    @property
    def train_pass(self) -> type[LinearTrainPass]:
        """What labels the training images."""
        return _ThinPass if self.thin else _MaskPass

    @property
    def shrink(self) -> float:
        """See ``text_labels``."""
        return 0.25 if self.thin else 0.0

    def boxes(self, probability: NDArray[np.float32], token_area: float) -> tuple[list[Polygon], list[float]]:
        """Regions of a map; ``token_area`` is what one of its values covers, in pixels of the image."""
        return boxes_of(probability, self.threshold, self.min_tokens * token_area, self.grow, self.join)

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``."""
        fitted = self.fit(context, 2, self.train_pass)
        test = context.tokens("test", self.view)
        scorer = MaskScorer(context.test, context.panels, context.keep_predictions, self.threshold, self.shrink)
        finder = Finder(self, fitted.head, fitted.layer, scorer.add, context.progress("find", len(test.indices)))
        test.consume(finder)
        statistics, panels = scorer.finish(test.indices)
        return Outcome(
            statistics=statistics,
            chosen=fitted.chosen,
            layers=(fitted.layer,),
            heads=fitted.heads,
            seconds={**fitted.seconds, "predict": finder.seconds},
            panels=panels,
            warnings=fitted.notes,
            predictions=scorer.kept,
        )


def probability_map(
    head: LinearMap, tokens: ImageTokens, layer: int, smooth: float
) -> tuple[NDArray[np.float32], float]:
    """The probability of text of every pixel of the image, and the area in its pixels that one independent value covers.

    Args:
        head: ``(N, D)`` tokens -> ``(N, n * n * 2)`` logits, of n * n cells in raster order.
        tokens: of the image.
        layer: the layer that the head reads.
        smooth: pixels of the frame; logits of finer values are averaged over as much.
    """
    logits = []
    frame = tokens.frames[0]
    grid = tokens.grids[layer][0]
    side = math.isqrt(head.bias.shape[0] // 2)
    stride = max(frame.size[0] / (grid[0] * side), 1.0)
    reach = max(1, round(smooth / stride)) // 2  # an odd window keeps its middle
    reach = min(reach, max(grid) * side)  # which covers the map from anywhere in it
    for patches, (h, w) in zip(tokens.patches[layer], tokens.grids[layer]):
        both: Tensor = head(patches).reshape(h, w, side, side, 2)
        one = (both[..., 1] - both[..., 0]).transpose(1, 2).reshape(1, 1, h * side, w * side)
        if reach:
            one = F.avg_pool2d(one, 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)
        logits.append(one[0])
    scaled = scaled_logits(logits, tokens.frames)
    grown = F.interpolate(scaled[None], size=frame.image_size, mode="bilinear", align_corners=False)[0, 0]
    cell = stride * (2 * reach + 1)
    area = cell * cell / (frame.scale[0] * frame.scale[1])
    return torch.sigmoid(grown).cpu().numpy().astype(np.float32), area


class Finder:
    """Rides on the test pass: the probability map and regions of every image, handed on.

    Args:
        protocol: how regions are found.
        head, layer: of the text mask.
        found: called with index, the image's lines, map, regions.
        advance: called with 1 after each image.
    """

    def __init__(
        self,
        protocol: TextMask,
        head: LinearMap,
        layer: int,
        found: Callable[[int, tuple[TextLine, ...], NDArray[np.float32], list[Polygon]], None],
        advance: Callable[[int], None],
    ) -> None:
        self._protocol, self._head, self._layer, self._found, self._advance = protocol, head, layer, found, advance
        self.seconds = 0.0

    def __getstate__(self) -> dict[str, Any]:
        # A decoding worker annotates and nothing else.
        return {}

    def annotate(self, dataset: Dataset, index: int, frames: tuple[Frame, ...]) -> tuple[TextLine, ...]:
        """The lines of the image."""
        return dataset.text(index)

    def consume(self, tokens: ImageTokens) -> None:
        """Find the text of one image."""
        start = time.perf_counter()
        probability, area = probability_map(self._head, tokens, self._layer, self._protocol.smooth)
        polygons, _ = self._protocol.boxes(probability, area)
        self._found(tokens.index, tokens.target, probability, polygons)
        self.seconds += time.perf_counter() - start
        self._advance(1)


class MaskScorer:
    """Scores what was found in whole images: regions by the rule of ICDAR 2015, pixels by their IoU.

    Args:
        dataset: the test split.
        panels: images to keep for the report.
        keep: whether all regions found are kept.
        threshold: a pixel is text above it.
        shrink: see ``text_labels``.
    """

    def __init__(self, dataset: Dataset, panels: int, keep: bool, threshold: float = 0.5, shrink: float = 0.0) -> None:
        self._data, self._wanted, self._threshold, self._shrink = dataset, panels, threshold, shrink
        self._sums = TextSums(MASK_METRICS)
        self._names: list[str] = []
        self._panels: dict[int, Panel] = {}
        self.kept: dict[str, Any] | None = {} if keep else None

    def add(
        self, index: int, lines: tuple[TextLine, ...], probability: NDArray[np.float32], found: list[Polygon]
    ) -> None:
        """Score one image: its lines, the ``(H, W)`` probability of text, and the regions."""
        labels = text_labels(lines, (probability.shape[0], probability.shape[1]), self._shrink)
        valid, read = labels != IGNORE, probability > self._threshold
        inter = int((read & (labels == 1)).sum())
        union = int(((read | (labels == 1)) & valid).sum())
        right = int(((read == (labels == 1)) & valid).sum())
        result = match([t.polygon for t in lines], [t.ignore for t in lines], found)
        hits, true, seen = len(result.pairs), len(result.truths), len(result.found)
        name = self._data.image_id(index)
        self._sums.add(name, (2 * hits, hits, hits, inter, right), (true + seen, seen, true, union, int(valid.sum())))
        facts = line_facts(self._data, index)
        matched = {i for i, _ in result.pairs}
        for i in result.truths:
            groups = groups_of(lines[i], facts[i] if facts is not None else None)
            self._names += groups
            self._sums.groups(name, (0, 0, float(i in matched), 0, 0), (0, 0, 1, 0, 0), groups)
        shown = Polygons(tuple(found), ("",) * len(found))
        truth = [line for line in lines if not line.ignore]
        if self._wanted:
            polygons = Polygons(tuple(t.polygon for t in truth), ("",) * len(truth))
            self._panels[index] = Panel(name, index, polygons, shown)
        if self.kept is not None:
            self.kept[name] = shown

    def finish(self, indices: Sequence[int]) -> tuple[TextStatistics, tuple[Panel, ...]]:
        """Statistics, and panels of images evenly spread."""
        shown = spread(list(indices), self._wanted)
        panels = tuple(self._panels[i] for i in sorted(shown) if i in self._panels)
        return self._sums.statistics(group_names(self._names)), panels
