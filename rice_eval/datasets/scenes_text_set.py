"""``scenes-text``: the embedded benchmark's text. Pages of words at controlled size, turn, contrast and clutter, made from a seed.

Every line states how it was drawn, so that accuracy can be plotted against the height of a character in pixels. Words and
fonts of ``val`` never occur in ``train``; a third of the lines are random letters and digits, which no lexicon helps to read.
The bytes are the same on every machine: glyphs come from sheets and are placed by the integer rasteriser of ``scenes``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rice_eval.datasets.base import Dataset, DatasetOptions, TextLine, check_options, files_fingerprint
from rice_eval.datasets.scenes_pack import SPLITS, Font, halve, pack
from rice_eval.datasets.scenes_raster import ONE, Draws, Pose, composite, premultiply, resize, sample
from rice_eval.datasets.scenes_text import draw_sign_text, line
from rice_eval.errors import UsageError

__all__ = ["HEIGHTS", "LineFacts", "ScenesText", "ScenesTextOptions", "factory"]

GENERATOR = 1
"""Version of the drawing; raised when the same seed gives other bytes."""

HEIGHTS = (5, 6, 8, 10, 12, 16, 20, 24, 32)
"""Heights of a capital letter in pixels; every page has a line of each, as far as there is room."""
TURNS = (0, 0, 0, 4, -4, 10, -10, 20, -20)
"""Degrees by which a line is turned, clockwise; a third of the lines lie straight."""
CONTRASTS = (36, 72, 144)
"""Difference of brightness between ink and ground, 0 to 255."""
SYMBOLS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class LineFacts:
    """How a line was drawn.

    Attributes:
        height_px: height of a capital letter in pixels.
        rotation: degrees, clockwise.
        contrast: of brightness against its ground, 0 to 255.
        clutter: whether it stands on the photo itself; on a plain plate otherwise.
        font: name of the font.
    """

    height_px: int
    rotation: int
    contrast: int
    clutter: bool
    font: str


@dataclass(frozen=True)
class _Page:
    image: Bytes
    lines: tuple[TextLine, ...]
    facts: tuple[LineFacts, ...]


def _words(draws: Draws, split: str) -> tuple[str, Font]:
    """A sign's word or number, or three to eight random letters and digits; and a font of the split."""
    sign = draw_sign_text(draws, split, ("white",))
    if draws.below(3):
        return sign.text, sign.font
    return "".join(SYMBOLS[draws.below(len(SYMBOLS))] for _ in range(draws.between(3, 8))), sign.font


@lru_cache(maxsize=16)
def _capital(file: str) -> int:
    """Height of the letter H in the pixels of a glyph sheet."""
    font = next(f for split in SPLITS for f in pack().fonts[split] if f.file == file)
    _, (_, y0, _, y1) = line("H", font)
    return y1 - y0


def _texture(cover: Bytes, ink: int, ground: int | None) -> tuple[Bytes, ...]:
    """Coverage ``(h, w)`` as straight RGBA: ink over a plain ground, or over nothing; a pyramid of halvings."""
    height, width = cover.shape
    rgba = np.full((height, width, 4), ink, np.uint8)
    if ground is None:
        rgba[..., 3] = cover
    else:
        mixed = (ink * cover.astype(np.int32) + ground * (255 - cover.astype(np.int32)) + 127) // 255
        rgba[..., :3] = mixed[..., None]
        rgba[..., 3] = 255
    levels = [rgba]
    while min(levels[-1].shape[:2]) >= 16:
        levels.append(halve(levels[-1]))
    return tuple(levels)


def _backdrop(draws: Draws, split: str, size: int) -> Bytes:
    files = pack().backgrounds[split]
    levels = pack().pyramid(files[draws.below(len(files))])
    height, width = levels[0].shape[:2]
    side = min(height, width) * draws.between(60, 100) // 100
    x, y = draws.below(width - side + 1), draws.below(height - side + 1)
    return np.ascontiguousarray(resize(levels[0], (x * ONE, y * ONE, (x + side) * ONE, (y + side) * ONE), size))


def _page(seed: int, split: str, index: int, size: int) -> _Page:
    """One page: lines of every height in random order, each where the first free place of sixty draws is."""
    draws = Draws(seed, SPLITS.index(split), index, 7)
    canvas = _backdrop(draws, split, size)
    taken = np.zeros((size, size), np.bool_)
    lines, facts = [], []
    # The tall ones first, while there is room; then one more of every height as far as they fit.
    for height in (*sorted(HEIGHTS, reverse=True), *sorted(HEIGHTS, reverse=True)):
        text, font = _words(draws, split)
        turn = TURNS[draws.below(len(TURNS))]
        contrast = CONTRASTS[draws.below(len(CONTRASTS))]
        clutter, dark = draws.below(2) == 1, draws.below(2) == 1
        level = draws.below(256)
        cover, (x0, y0, x1, y1) = line(text, font)
        pad = pack().glyph_em // 4
        # Even sizes keep the pyramid's levels exact halvings.
        w, h = -(-(x1 - x0 + 2 * pad) // 32) * 32, -(-(y1 - y0 + 2 * pad) // 32) * 32
        left, top = (w - (x1 - x0)) // 2, (h - (y1 - y0)) // 2
        framed = np.zeros((h, w), np.uint8)
        framed[top : top + y1 - y0, left : left + x1 - x0] = cover[y0:y1, x0:x1]
        scale = height * ONE // _capital(font.file)
        for _ in range(60):
            centre = draws.below(size) * ONE + ONE // 2, draws.below(size) * ONE + ONE // 2
            pose = Pose(*centre, scale, turn)
            u, v = np.array([0, w, w, 0]) - w / 2, np.array([0, 0, h, h]) - h / 2
            x, y = pose.forward(u.astype(np.float64), v.astype(np.float64))
            if min(x.min(), y.min()) < 1 or max(x.max(), y.max()) > size - 1:
                continue
            wx0, wy0, wx1, wy1 = pose.window((h, w), (size, size))
            if not taken[wy0:wy1, wx0:wx1].any():
                break
        else:
            continue
        window = (wx0, wy0, wx1, wy1)
        under = int(canvas[wy0:wy1, wx0:wx1].astype(np.int64).mean())
        ground = under if clutter else 56 + level * 143 // 255
        # The ink goes to the asked side of the ground where there is room for the contrast, else to the other.
        dark = ground - contrast >= 0 if dark else ground + contrast > 255
        ink = ground - contrast if dark else ground + contrast
        ink = min(max(ink, 0), 255)
        levels = _texture(framed, ink, None if clutter else ground)
        texture = next((t for t in reversed(levels) if t.shape[0] * ONE >= h * scale), levels[0])
        composite(canvas, sample(premultiply(texture), (h, w), pose, window), window)
        taken[wy0:wy1, wx0:wx1] = True
        u = np.array([left, left + x1 - x0, left + x1 - x0, left], np.float64) - w / 2
        v = np.array([top, top, top + y1 - y0, top + y1 - y0], np.float64) - h / 2
        # 1/64 of a pixel: coarser than what platforms' floating point could differ by.
        polygon = np.rint(np.stack(pose.forward(u, v), 1) * 64) / 64
        lines.append(TextLine(polygon, text))
        facts.append(LineFacts(height, turn, abs(ink - ground), clutter, font.name))
    return _Page(canvas, tuple(lines), tuple(facts))


@lru_cache(maxsize=64)
def _cached(seed: int, split: str, index: int, size: int) -> _Page:
    return _page(seed, split, index, size)


@lru_cache(maxsize=4096)
def _written(seed: int, split: str, index: int, size: int) -> tuple[tuple[TextLine, ...], tuple[LineFacts, ...]]:
    """What a page says: scorers ask for it long after its pixels were let go."""
    page = _cached(seed, split, index, size)
    return page.lines, page.facts


class ScenesText(Dataset):
    """One split, drawn on demand; page ``i`` depends on (seed, split, i, size) alone, never on ``n``.

    Args:
        split: ``train`` or ``val``.
        n: number of pages.
        size: side of the pages in pixels. Characters keep their height in pixels at every size; larger pages hold more.
        seed: which set of pages.

    Raises:
        UsageError: a split that does not exist.
    """

    name = "scenes-text"
    provides = frozenset({"text"})

    def __init__(self, split: str, n: int, size: int = 448, seed: int = 0) -> None:
        if split not in SPLITS:
            raise UsageError(f"dataset 'scenes-text' has no split '{split}'", f"its splits: {', '.join(SPLITS)}")
        self.split, self.n, self.side, self.seed = split, n, size, seed

    def __len__(self) -> int:
        return self.n

    @property
    def fingerprint(self) -> str:
        """sha256 over the generator's version, the assets' bytes, split, number, size and seed."""
        facts = {"dataset": self.name, "generator": GENERATOR, "assets": pack().fingerprint, "seed": self.seed}
        return files_fingerprint([], {**facts, "split": self.split, "n": self.n, "size": self.side})

    def _key(self, index: int) -> tuple[int, str, int, int]:
        if not 0 <= index < self.n:
            raise IndexError(f"page {index} of {self.n}")
        return self.seed, self.split, index, self.side

    def _say(self, index: int) -> tuple[tuple[TextLine, ...], tuple[LineFacts, ...]]:
        return _written(*self._key(index))

    def image_id(self, index: int) -> str:
        """The index in six digits."""
        return f"{index:06d}"

    def size(self, index: int) -> tuple[int, int]:
        """Height and width, both the set's side."""
        return self.side, self.side

    def image(self, index: int) -> Bytes:
        """``(S, S, 3)`` uint8 RGB."""
        return _cached(*self._key(index)).image.copy()

    def text(self, index: int) -> tuple[TextLine, ...]:
        """The lines, each with the polygon of its ink; all are legible by construction, however hard to read."""
        return self._say(index)[0]

    def line_facts(self, index: int) -> tuple[LineFacts, ...]:
        """How each line of ``text`` was drawn."""
        return self._say(index)[1]


class ScenesTextOptions(DatasetOptions):
    """Options of the reader: pages of each split, their side in pixels, the seed."""

    size: int = Field(448, ge=128, le=2048)
    seed: int = Field(0, ge=0, lt=1 << 32)
    n_train: int = Field(160, ge=1, le=1_000_000)
    n_val: int = Field(80, ge=1, le=1_000_000)


def factory(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``scenes-text``: pages from memory; no folder of data is read."""
    given = check_options("scenes-text", ScenesTextOptions, options)
    if data is not None:
        raise UsageError("dataset 'scenes-text' is made in memory and reads no folder", "leave --data out for it")
    return ScenesText(split, given.n_train if split == "train" else given.n_val, given.size, given.seed)
