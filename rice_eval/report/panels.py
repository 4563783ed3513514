"""Pictures of results, drawn from arrays: what an encoder saw, what was true, what was predicted, where it failed.

Every function takes arrays and gives ``PanelPicture`` objects; nothing here reads a dataset or an encoder. The same arrays
give the same pixels.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pil
from PIL import ImageDraw, ImageFont

__all__ = [
    "ROLES",
    "SIDE",
    "Boxes",
    "LegendEntry",
    "PanelPicture",
    "Polygons",
    "Role",
    "Tile",
    "class_palette",
    "detection_panel",
    "pca_maps",
    "segmentation_panel",
    "text_panel",
    "upsample_nearest",
]

Picture = NDArray[np.uint8]
_Scalar = TypeVar("_Scalar", bound=np.generic)
Role = Literal["image", "truth", "prediction", "error", "tokens"]
ROLES: tuple[Role, ...] = ("image", "truth", "prediction", "error", "tokens")
"""What a tile shows, in the order of a strip."""

SIDE = 224
"""Longer side of a tile in pixels: five encoders times eight images stay under 3 MB in a page."""

_IGNORED = (203, 213, 232)  # pale blue: no greys, and no colour of VOC's map, whose 7th class is (128, 128, 128)
_WRONG = (225, 45, 57)
_TRUE = (38, 194, 129)
_HALO = (16, 18, 22)
_PAGE = 6  # lines of text from which an image is drawn as a page: what was read stands in the boxes, not above them
_LINE = 3  # pixels of a box's outline; tiles with boxes are twice as wide as label maps and shown at half size


@dataclass(frozen=True)
class Tile:
    """One picture of a strip.

    Attributes:
        role: what it shows.
        picture: ``(h, w, 3)`` uint8 RGB.
        flat: few plain colours (label maps, token maps): stored without loss.
    """

    role: Role
    picture: Picture
    flat: bool = False


@dataclass(frozen=True)
class LegendEntry:
    """A class that occurs in a panel, and its colour."""

    name: str
    color: tuple[int, int, int]


@dataclass(frozen=True)
class PanelPicture:
    """The strip of one test image.

    Attributes:
        image_id: name of the image in its dataset.
        index: its number in the split.
        tiles: pictures, at most one a role.
        legend: classes that occur in the truth or in the prediction.
        note: one line on how well this image went, empty where nothing is to be said.
    """

    image_id: str
    index: int
    tiles: tuple[Tile, ...]
    legend: tuple[LegendEntry, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Boxes:
    """Boxes of one image: ``boxes (n, 4)`` xyxy in pixels, ``labels (n,)`` class indices, ``scores (n,)`` in [0, 1] or None."""

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Polygons:
    """Text of one image: a ``(k, 2)`` polygon in pixels and a transcript a line."""

    polygons: tuple[NDArray[np.float64], ...]
    texts: tuple[str, ...]


def class_palette(n: int) -> Picture:
    """``(n, 3)`` uint8 colours: hues a golden angle apart, lightness in three steps, so that neighbours differ."""
    golden = 0.61803398875  # 1 / golden ratio: no two of the first hundreds of multiples come close
    steps = ((0.58, 0.62), (0.72, 0.55), (0.44, 0.60))
    rgb = [colorsys.hls_to_rgb((0.58 + k * golden) % 1.0, *steps[k % 3]) for k in range(n)]
    return np.asarray(np.rint(np.asarray(rgb, dtype=np.float64).reshape(n, 3) * 255), dtype=np.uint8)


def upsample_nearest(picture: NDArray[_Scalar], size: tuple[int, int]) -> NDArray[_Scalar]:
    """``(h, w, ...)`` repeated to ``size = (H, W)`` by nearest neighbour (pixel centres)."""
    rows = ((np.arange(size[0]) + 0.5) * picture.shape[0] / size[0]).astype(np.int64)
    columns = ((np.arange(size[1]) + 0.5) * picture.shape[1] / size[1]).astype(np.int64)
    return np.ascontiguousarray(picture[rows][:, columns])


def pca_maps(tokens: Sequence[NDArray[np.floating]], grids: Sequence[tuple[int, int]]) -> list[Picture]:
    """Patch tokens as colours: their first three principal components over all the images given, as red, green and blue.

    Args:
        tokens: ``(N_i, D)`` an image, in raster order.
        grids: ``(h_i, w_i)`` an image, ``N_i = h_i * w_i``.

    Returns:
        ``(h_i, w_i, 3)`` uint8 an image. Each component runs from its 1st to its 99th percentile over all images; its sign is
        the one that makes its largest loading positive. Components that the tokens do not have are mid grey.

    Raises:
        ValueError: a grid that does not fit its tokens, or tokens that are not finite.
    """
    if len(tokens) != len(grids) or any(t.shape[0] != h * w for t, (h, w) in zip(tokens, grids, strict=False)):
        raise ValueError("every image needs h * w tokens of its grid")
    if not tokens:
        return []
    stacked = np.concatenate([np.asarray(t, dtype=np.float64) for t in tokens])
    if not np.isfinite(stacked).all():
        raise ValueError("patch tokens hold values that are not finite")
    centred = stacked - stacked.mean(axis=0)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    shown = np.full((len(stacked), 3), 0.5)
    for k, which in enumerate(np.argsort(variances)[::-1][:3]):
        if variances[which] <= 1e-12 * max(float(variances.max()), 1e-300):
            continue
        axis = axes[:, which]
        scores = centred @ (axis * np.sign(axis[np.argmax(np.abs(axis))]))
        low, high = np.percentile(scores, (1, 99))
        if high > low:
            shown[:, k] = np.clip((scores - low) / (high - low), 0, 1)
    rgb = np.rint(shown * 255).astype(np.uint8)
    ends = np.cumsum([h * w for h, w in grids])[:-1]
    return [part.reshape(h, w, 3) for part, (h, w) in zip(np.split(rgb, ends), grids, strict=True)]


def segmentation_panel(
    image_id: str,
    index: int,
    image: Picture,
    truth: NDArray[np.integer],
    prediction: NDArray[np.integer],
    classes: Sequence[str],
    *,
    palette: Sequence[tuple[int, int, int]] = (),
    tokens: Picture | None = None,
    side: int = SIDE,
) -> PanelPicture:
    """Image, truth, prediction, error map and token map of one segmented image.

    Args:
        image: ``(H, W, 3)`` uint8.
        truth: ``(H, W)`` class indices; anything outside the classes is ignored and drawn in pale blue.
        prediction: ``(H, W)`` class indices.
        classes: names by index.
        palette: RGB by index; ``class_palette`` where it is shorter than the classes.
        tokens: ``(h, w, 3)`` from ``pca_maps``.
        side: longer side of the tiles.
    """
    if truth.shape != image.shape[:2] or prediction.shape != image.shape[:2]:
        raise ValueError("image, truth and prediction must have one height and width")
    n = len(classes)
    colors = np.asarray(palette, dtype=np.uint8) if len(palette) >= n > 0 else class_palette(n)
    small = _fit(image, side)
    size = (small.shape[0], small.shape[1])
    labelled = (truth >= 0) & (truth < n)
    right = int(((truth == prediction) & labelled).sum())
    t, p = upsample_nearest(truth, size), upsample_nearest(prediction, size)
    present = sorted(set(np.unique(truth[labelled]).tolist()) | set(np.unique(prediction[labelled]).tolist()))
    tiles = [
        Tile("image", small),
        Tile("truth", _paint(t, colors), flat=True),
        Tile("prediction", _paint(p, colors), flat=True),
        Tile("error", _errors(small, t, p, n)),
    ]
    if tokens is not None:
        tiles.append(Tile("tokens", upsample_nearest(tokens, size), flat=True))
    total = int(labelled.sum())
    return PanelPicture(
        image_id,
        index,
        tuple(tiles),
        tuple(LegendEntry(classes[c], _rgb(colors[c])) for c in present if 0 <= c < n),
        f"{100 * right / total:.1f} % of pixels right" if total else "no labelled pixels",
    )


def detection_panel(
    image_id: str,
    index: int,
    image: Picture,
    truth: Boxes,
    prediction: Boxes,
    classes: Sequence[str],
    *,
    palette: Sequence[tuple[int, int, int]] = (),
    score: float = 0.3,
    tokens: Picture | None = None,
    side: int = SIDE * 2,
) -> PanelPicture:
    """Image, true boxes and predicted boxes of one image.

    Args:
        score: predicted boxes under this score are not drawn; the note says how many are.
        side: longer side of the tiles; twice that of label maps, so that labels can be read.
    """
    n = len(classes)
    colors = np.asarray(palette, dtype=np.uint8) if len(palette) >= n > 0 else class_palette(n)
    small = _fit(image, side)
    scale = small.shape[1] / image.shape[1], small.shape[0] / image.shape[0]
    keep = np.ones(len(prediction.labels), dtype=np.bool_) if prediction.scores is None else prediction.scores >= score
    shown = Boxes(
        prediction.boxes[keep],
        prediction.labels[keep],
        None if prediction.scores is None else prediction.scores[keep],
    )
    tiles = [
        Tile("image", small),
        Tile("truth", _draw_boxes(small, truth, classes, colors, scale)),
        Tile("prediction", _draw_boxes(small, shown, classes, colors, scale)),
    ]
    if tokens is not None:
        tiles.append(Tile("tokens", upsample_nearest(tokens, (small.shape[0], small.shape[1])), flat=True))
    present = sorted({int(c) for c in (*truth.labels, *shown.labels) if 0 <= c < n})
    note = f"{len(truth.labels)} true, {len(shown.labels)} predicted"
    if prediction.scores is not None:
        note += f" at score {score:.2g} or more"
    return PanelPicture(
        image_id, index, tuple(tiles), tuple(LegendEntry(classes[c], _rgb(colors[c])) for c in present), note
    )


def text_panel(
    image_id: str,
    index: int,
    image: Picture,
    truth: Polygons,
    prediction: Polygons,
    *,
    tokens: Picture | None = None,
) -> PanelPicture:
    """Image, true text and read text of one image: the transcripts stand at the top left of their polygons, on whole pages in them."""
    page = len(truth.polygons) >= _PAGE
    small = _fit(image, SIDE * (4 if page else 3))
    scale = np.array([small.shape[1] / image.shape[1], small.shape[0] / image.shape[0]])
    draw = _typeset if page else _draw_polygons
    tiles = [
        Tile("image", small),
        Tile("truth", draw(small, truth, scale, _TRUE)),
        Tile("prediction", draw(small, prediction, scale, (255, 176, 32))),
    ]
    if tokens is not None:
        tiles.append(Tile("tokens", upsample_nearest(tokens, (small.shape[0], small.shape[1])), flat=True))
    # Only lines that were given to the reader stand in the order of what was read.
    given = len(truth.polygons) == len(prediction.polygons) and all(
        np.array_equal(a, b) for a, b in zip(truth.polygons, prediction.polygons)
    )
    same = sum(a == b for a, b in zip(truth.texts, prediction.texts))
    note = (
        f"{same} of {len(truth.texts)} lines read exactly"
        if given and any(truth.texts)
        else f"{len(truth.texts)} true lines, {len(prediction.texts)} found"
    )
    return PanelPicture(image_id, index, tuple(tiles), (), note)


def _fit(image: Picture, side: int) -> Picture:
    height, width = image.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return np.ascontiguousarray(image)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Pil.fromarray(image).resize(size, Pil.Resampling.BICUBIC), dtype=np.uint8)


def _rgb(color: NDArray[np.uint8]) -> tuple[int, int, int]:
    return int(color[0]), int(color[1]), int(color[2])


def _paint(labels: NDArray[np.integer], colors: Picture) -> Picture:
    inside = (labels >= 0) & (labels < len(colors))
    table = np.concatenate([colors.reshape(-1, 3), np.array([_IGNORED], dtype=np.uint8)])
    return np.asarray(table[np.where(inside, labels, len(colors))], dtype=np.uint8)


def _errors(image: Picture, truth: NDArray[np.integer], prediction: NDArray[np.integer], n: int) -> Picture:
    """The image in faint grey, wrong pixels in red, ignored ones in pale blue."""
    grey = np.asarray(Pil.fromarray(image).convert("L"), dtype=np.float64)[..., None]
    base = np.broadcast_to(232 - (255 - grey) * 0.45, image.shape)
    labelled = ((truth >= 0) & (truth < n))[..., None]
    wrong = labelled & (truth != prediction)[..., None]
    red = 0.25 * base + 0.75 * np.array(_WRONG, dtype=np.float64)
    out = np.where(wrong, red, np.where(labelled, base, np.array(_IGNORED, dtype=np.float64)))
    return np.asarray(np.rint(out), dtype=np.uint8)


def _draw_boxes(
    image: Picture, boxes: Boxes, classes: Sequence[str], colors: Picture, scale: tuple[float, float]
) -> Picture:
    canvas = Pil.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    order = range(len(boxes.labels)) if boxes.scores is None else np.argsort(boxes.scores, kind="stable")
    for k in order:  # the surest box is drawn last, on top
        label = int(boxes.labels[k])
        name = classes[label] if 0 <= label < len(classes) else str(label)
        color = _rgb(colors[label]) if 0 <= label < len(colors) else _IGNORED
        x1, y1, x2, y2 = (float(v) * scale[i % 2] for i, v in enumerate(boxes.boxes[k]))
        x1, x2 = min(x1, x2), max(x1, x2)
        y1, y2 = min(y1, y2), max(y1, y2)
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=_HALO, width=1)
        draw.rectangle((x1, y1, x2, y2), outline=color, width=_LINE)
        _tag(draw, (x1, y1), name if boxes.scores is None else f"{name} {float(boxes.scores[k]):.2f}", color)
    return np.asarray(canvas, dtype=np.uint8)


def _draw_polygons(image: Picture, text: Polygons, scale: NDArray[np.float64], color: tuple[int, int, int]) -> Picture:
    canvas = Pil.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    for polygon, transcript in zip(text.polygons, text.texts, strict=True):
        points = [(float(x), float(y)) for x, y in polygon * scale]
        if len(points) < 2:
            continue
        draw.line([*points, points[0]], fill=_HALO, width=_LINE + 2)
        draw.line([*points, points[0]], fill=color, width=_LINE)
        if transcript:
            _tag(draw, (min(x for x, _ in points), min(y for _, y in points)), transcript, color)
    return np.asarray(canvas, dtype=np.uint8)


def _typeset(image: Picture, text: Polygons, scale: NDArray[np.float64], color: tuple[int, int, int]) -> Picture:
    """Thin outlines; where there is a transcript it covers what the image has there, at its size and in its direction."""
    canvas = Pil.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    limit = 2.0 * max(canvas.size)  # a box far beyond the page must not ask for a picture of its own size
    for polygon, transcript in zip(text.polygons, text.texts, strict=True):
        points = np.clip(polygon * scale, -limit, limit)
        if len(points) < 3 or not np.isfinite(points).all():
            continue
        outline = [(float(x), float(y)) for x, y in points]
        draw.polygon(outline, fill=(255, 255, 255) if transcript else None, outline=color, width=1)
        if not transcript:
            continue
        half = (len(points) + 1) // 2
        along, down = points[half - 1] - points[0], points[-1] - points[0]
        width, height = max(2, round(float(np.linalg.norm(along)))), max(2, round(float(np.linalg.norm(down))))
        word = _words(transcript, (width, height))
        turned = word.rotate(-np.degrees(np.arctan2(along[1], along[0])), expand=True, resample=Pil.Resampling.BICUBIC)
        middle = points.mean(axis=0)
        place = round(middle[0] - turned.width / 2), round(middle[1] - turned.height / 2)
        canvas.paste(_HALO, place, turned)
    return np.asarray(canvas, dtype=np.uint8)


def _words(text: str, size: tuple[int, int]) -> Pil.Image:
    """A mask of the text that fills a box of ``size = (width, height)`` from its left, in a font that fits."""
    plain = _plain(text)
    width, height = size
    font = ImageFont.load_default(size=max(4, height * 0.9))
    long = font.getlength(plain)
    if long > width:
        font = ImageFont.load_default(size=max(4, height * 0.9 * width / long))
    mask = Pil.new("L", size)
    ImageDraw.Draw(mask).text((1, height / 2), plain, fill=255, font=font, anchor="lm")
    return mask


def _plain(text: str) -> str:
    """The built-in font has Latin letters only: others are drawn as a question mark."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)


def _tag(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, color: tuple[int, int, int]) -> None:
    """A small label above ``at``."""
    plain = _plain(text)
    plain = plain if len(plain) <= 28 else plain[:27] + "."
    font = ImageFont.load_default(size=14)
    left, top, right, bottom = draw.textbbox((0, 0), plain, font=font)
    width, height = right - left + 4, bottom - top + 4
    x, y = max(0.0, at[0]), max(0.0, at[1] - height)
    draw.rectangle((x, y, x + width, y + height), fill=color)
    light = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    draw.text((x + 2 - left, y + 2 - top), plain, fill=_HALO if light > 120 else (255, 255, 255), font=font)
