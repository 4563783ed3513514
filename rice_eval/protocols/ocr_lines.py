"""What every protocol that reads lines shares: charsets, features along a line, scores by line, groups of lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rice_eval.datasets.base import Dataset, TextLine
from rice_eval.datasets.scenes_text_set import LineFacts
from rice_eval.datasets.text_crops import TextCrops, geometry, line_facts
from rice_eval.errors import DataError
from rice_eval.metrics.text import LINE_METRICS, line_sums
from rice_eval.metrics.text_statistics import TextStatistics, TextSums
from rice_eval.probes.ctc import beam_search, best_path, split_steps
from rice_eval.probes.linear import LinearMap
from rice_eval.protocols.base import Panel
from rice_eval.protocols.segmentation import check_choice
from rice_eval.report.panels import Polygons
from rice_eval.views import Frame

__all__ = [
    "CHARSETS",
    "POOLS",
    "Charset",
    "LineReader",
    "LineScorer",
    "as_batch",
    "check_lines",
    "columns",
    "crops_of",
    "group_names",
    "groups_of",
    "line_features",
    "need_lines",
    "remarks",
    "spread",
    "unspellable",
]

_DIGITS = "0123456789"
_SMALL = "abcdefghijklmnopqrstuvwxyz"
CHARSETS: dict[str, str] = {
    "digits": _DIGITS,
    "alnum": _DIGITS + _SMALL,
    "alnum-case": _DIGITS + _SMALL + _SMALL.upper(),
    "ascii": "".join(chr(c) for c in range(0x20, 0x7F)),
}
"""Characters by name: digits; the 36 of the recognition benchmarks; with capitals; printable ASCII with the blank."""

POOLS = ("mean", "max", "stack")
"""How the tokens above one another become one: mean, maximum, or all of them side by side."""


@dataclass(frozen=True)
class Charset:
    """Characters as classes 1 to n; 0 is CTC's blank.

    Attributes:
        name: of ``CHARSETS``, or ``train`` for the characters of the training lines.
        characters: without repeats.
    """

    name: str
    characters: str

    @classmethod
    def of(cls, name: str, texts: Sequence[str]) -> Charset:
        """The charset ``name``; ``texts`` are the training lines."""
        if name == "train":
            return cls(name, "".join(sorted({c for text in texts for c in text})))
        return cls(name, CHARSETS[name])

    @property
    def classes(self) -> int:
        """Characters and the blank."""
        return len(self.characters) + 1

    def fold(self, text: str) -> str:
        """The text as the charset writes it: small letters where it has no capitals."""
        return text.lower() if self.name == "alnum" else text

    def encode(self, text: str) -> tuple[list[int], list[str]]:
        """Classes of the text, and the characters that the charset lacks."""
        place = _places(self.characters)
        folded = self.fold(text)
        return [place[c] for c in folded if c in place], [c for c in folded if c not in place]

    def decode(self, classes: Sequence[int]) -> str:
        """The text of classes from 1."""
        return "".join(self.characters[c - 1] for c in classes)


@lru_cache(maxsize=32)
def _places(characters: str) -> dict[str, int]:
    return {c: k + 1 for k, c in enumerate(characters)}


@lru_cache(maxsize=16)
def crops_of(dataset: Dataset, height: int, scale: str, margin: float, max_aspect: float) -> TextCrops:
    """``TextCrops`` of a dataset, made once: all jobs of a run share them."""
    return TextCrops(dataset, height, "native" if scale == "native" else "fit", margin, max_aspect)


def columns(grid: tuple[int, int], frame: Frame, content: int) -> int:
    """Columns of the grid that show the line: up to the one that holds its right end, at least one.

    Args:
        grid: ``(h, w)`` tokens of the crop.
        frame: how the crop lies on what the encoder saw.
        content: pixels of the crop from the left that show the line.
    """
    end = float(frame.points(np.array([[float(content), 0.0]]))[0, 0])
    return int(min(max(math.ceil(end / frame.size[1] * grid[1]), 1), grid[1]))


def line_features(patches: Tensor, grid: tuple[int, int], count: int, pool: str) -> Tensor:
    """Tokens of a crop as a sequence from left to right.

    Args:
        patches: ``(h * w, D)``.
        grid: ``(h, w)``.
        count: T, the columns to keep.
        pool: one of ``POOLS``.

    Returns:
        ``(T, D)``, or ``(T, h * D)`` for ``stack``.
    """
    grown = patches.view(grid[0], grid[1], -1)[:, :count].float()
    if pool == "mean":
        return grown.mean(dim=0)
    if pool == "max":
        return grown.amax(dim=0)
    return grown.transpose(0, 1).reshape(count, -1)


_HEIGHT_EDGES = (8, 12, 16, 24, 32, 48)
_LENGTHS = ((1, 3), (4, 6), (7, 10), (11, 20), (21, 10**6))


def _range(name: str, value: float, edges: Sequence[float], unit: str) -> str:
    k = int(np.searchsorted(edges, value, side="right"))
    if k == 0:
        return f"{name} <{edges[0]:g}{unit}"
    return f"{name} {edges[k - 1]:g}-{edges[k]:g}{unit}" if k < len(edges) else f"{name} >={edges[-1]:g}{unit}"


def groups_of(line: TextLine, facts: LineFacts | None) -> tuple[str, ...]:
    """Names of the groups a line belongs to: height, turn, length; contrast, ground and font where they are known.

    The height is that of a capital letter where the dataset states it, else that of the polygon.
    """
    shape = geometry(line.polygon)
    length = next((a, b) for a, b in _LENGTHS if len(line.text) <= b)
    turn = abs(facts.rotation) if facts is not None else abs(shape.rotation)
    out = [
        f"height {facts.height_px} px" if facts is not None else _range("height", shape.height, _HEIGHT_EDGES, " px"),
        _range("turn", turn, (2, 7, 15), " deg"),
        f"length {length[0]}-{length[1]}" if length[1] < 10**6 else f"length >={length[0]}",
    ]
    if facts is not None:
        nominal = min((36, 72, 144), key=lambda c: abs(c - facts.contrast))
        out += [f"contrast {nominal}", "on photo" if facts.clutter else "on plate", f"font {facts.font}"]
    return tuple(out)


def group_names(found: Sequence[str]) -> list[str]:
    """Groups in reading order: by kind, then by their first number."""
    kinds = ("height", "turn", "length", "contrast", "on", "font")

    def place(name: str) -> tuple[int, float, str]:
        kind, _, rest = name.partition(" ")
        number = rest.lstrip("<>=").split("-")[0].split(" ")[0]
        low = float(number) if number.replace(".", "").isdigit() else 0.0
        return (kinds.index(kind) if kind in kinds else len(kinds), -1.0 if rest.startswith("<") else low, name)

    return sorted(set(found), key=place)


def spread(indices: Sequence[int], count: int) -> set[int]:
    """``count`` of the indices, evenly spread."""
    if not indices or count < 1:
        return set()
    picked = np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(int)
    return {indices[k] for k in picked}


class LineScorer:
    """Scores lines that were read, given where they are: per image and per group, with panels of whole images.

    Args:
        crops: the lines.
        panels: how many images to keep for the report.
        keep: whether every reading is kept.
    """

    def __init__(self, crops: TextCrops, panels: int, keep: bool) -> None:
        self._crops, self._keep = crops, keep
        self._read: dict[int, str] = {}
        self._panels = panels

    def add(self, index: int, read: str) -> None:
        """What was read of crop ``index``."""
        self._read[index] = read

    def finish(self) -> tuple[TextStatistics, tuple[Panel, ...], dict[str, Any] | None]:
        """Statistics by image, panels, and every reading where they are kept."""
        base = self._crops.base
        sums = TextSums(LINE_METRICS)
        pages: dict[int, list[tuple[TextLine, str]]] = {}
        names: list[str] = []
        held: tuple[int, tuple[TextLine, ...], tuple[LineFacts, ...] | None] | None = None
        for index in sorted(self._read):
            page, number = self._crops.origin(index)
            if held is None or held[0] != page:
                held = (page, base.text(page), line_facts(base, page))
            line = held[1][number]
            score = line_sums(line.text, self._read[index])
            groups = groups_of(line, held[2][number] if held[2] is not None else None)
            names += groups
            sums.add(base.image_id(page), score.numerators, score.denominators, groups)
            pages.setdefault(page, []).append((line, self._read[index]))
        shown = spread(sorted(pages), self._panels)
        panels = []
        for page in sorted(shown):
            polygons = tuple(line.polygon for line, _ in pages[page])
            truth = Polygons(polygons, tuple(line.text for line, _ in pages[page]))
            panels.append(Panel(base.image_id(page), page, truth, Polygons(polygons, tuple(r for _, r in pages[page]))))
        kept = None
        if self._keep:
            kept = {
                base.image_id(page): Polygons(tuple(li.polygon for li, _ in found), tuple(r for _, r in found))
                for page, found in pages.items()
            }
        return sums.statistics(group_names(names)), tuple(panels), kept


def remarks(crops: TextCrops, what: str) -> tuple[str, ...]:
    """What a reader must know of the lines of a split."""
    out = []
    if crops.ignored:
        out.append(f"{what}: {crops.ignored} lines are don't-care or have an empty label; they are not read")
    if crops.unreadable:
        shown = ", ".join(crops.unreadable[:5]) + (", …" if len(crops.unreadable) > 5 else "")
        out.append(f"{what}: {len(crops.unreadable)} entries can't be read: {shown}")
    out += [f"{what}: {root} has entries after its num-samples, which are not read" for root in crops.beyond]
    if crops.outside:
        out.append(f"{what}: {crops.outside} lines lie outside their image or have no area; what is there is read")
    if crops.squeezed:
        out.append(f"{what}: {crops.squeezed} lines are longer than {crops.max_aspect:g} heights and were squeezed")
    return tuple(out)


def need_lines(crops: TextCrops, what: str) -> None:
    """DataError where a split (``what``: test, train) has no line to read, with what became of those that it has."""
    if len(crops):
        return
    lost = f"{crops.ignored} are don't-care or empty, {len(crops.unreadable)} entries can't be read"
    raise DataError(
        f"dataset '{crops.name}', split '{crops.split}': no {what} image has a legible line ({lost})",
        "check its labels with rice-eval data check, or take another split",
    )


def as_batch(windows: Sequence[np.ndarray[Any, np.dtype[np.uint8]]], device: torch.device) -> Tensor:
    """``(B, 3, h, w)`` float in [0, 1] from B windows of one size."""
    return torch.from_numpy(np.stack(windows)).to(device).permute(0, 3, 1, 2).float() / 255


def check_lines(charset: str, pool: str, scale: str, height: int, margin: float, max_aspect: float) -> None:
    """ValueError unless the settings of lines hold."""
    check_choice("charset", charset, (*CHARSETS, "train"))
    check_choice("pool", pool, POOLS)
    check_choice("scale", scale, ("fit", "native"))
    if height < 8 or not (0 <= margin < math.inf and 1 <= max_aspect < math.inf):
        raise ValueError("height is at least 8, margin 0 or more, max_aspect 1 or more")


@dataclass(frozen=True)
class LineReader:
    """A trained reader of lines.

    Attributes:
        head: ``(T, D)`` features -> ``(T, K * C)`` logits.
        layer: the layer it reads.
        steps: K, CTC steps a token.
        charset: its characters.
        pool: of ``POOLS``.
        beam: width of the beam search; 0 for greedy decoding.
    """

    head: LinearMap
    layer: int
    steps: int
    charset: Charset
    pool: str
    beam: int

    def read(self, patches: Tensor, grid: tuple[int, int], count: int) -> str:
        """The text of a crop from its ``(h * w, D)`` tokens, of which the first ``count`` columns show it."""
        return self.decode(self.head(line_features(patches, grid, count, self.pool)))

    def decode(self, logits: Tensor) -> str:
        """The text of ``(T, K * C)`` logits."""
        rows = split_steps(logits, self.steps)
        found = beam_search(rows, self.beam) if self.beam else best_path(rows)
        return self.charset.decode(found)


def unspellable(crops: TextCrops, charset: Charset) -> tuple[str, ...]:
    """Test lines that the charset can't write: they can never be read exactly."""
    texts = [crops.text(i)[0].text for i in range(len(crops))]
    lines = sum(bool(charset.encode(text)[1]) for text in texts)
    capitals = sum(charset.fold(text) != text for text in texts)
    notes = []
    if lines:
        notes.append(f"test: {lines} of {len(texts)} lines have characters outside the charset '{charset.name}'")
    if capitals:
        notes.append(
            f"test: {capitals} of {len(texts)} lines have capitals, which the charset '{charset.name}' does not write; "
            "word_accuracy and anls alone ignore them"
        )
    return tuple(notes)
