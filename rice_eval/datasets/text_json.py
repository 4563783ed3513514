"""Scene text with one annotation file a set: COCO-Text 2 and TextOCR, both tables of images, annotations and links between them."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rice_eval.datasets.base import Dataset, DatasetOptions, TextLine, check_options
from rice_eval.datasets.files import FileDataset, need_files, need_split
from rice_eval.datasets.rasters import IMAGES
from rice_eval.datasets.segmentation import find_folder
from rice_eval.datasets.storage import Storage, open_storage
from rice_eval.datasets.text import text_line, transcript
from rice_eval.errors import DataError

__all__ = ["OutlineOptions", "TextTable", "coco_text", "textocr"]

Outline = Literal["polygon", "box"]
Words = Callable[[Mapping[str, Any], Outline, str], TextLine]


class OutlineOptions(DatasetOptions):
    """``outline``: words with the polygon the annotators drew, or with the upright box around it, as the field cuts crops."""

    outline: Outline = "polygon"


class TextTable(FileDataset):
    """Images of a table, with the words of each, kept in flat arrays: TextOCR has more than a million."""

    provides = frozenset({"text"})

    def __init__(
        self,
        name: str,
        split: str,
        storage: Storage,
        images: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        lines: Sequence[tuple[TextLine, ...]],
        source: str,
        outline: Outline,
    ) -> None:
        facts = {"empty": "don't-care", "outline": outline}
        super().__init__(name, split, storage, images, annotations=[source], facts=facts, sizes=sizes)
        words = [line for of_image in lines for line in of_image]
        self._texts, self._ignore = tuple(w.text for w in words), np.array([w.ignore for w in words], dtype=np.bool_)
        self._points = np.concatenate([w.polygon for w in words]) if words else np.zeros((0, 2))
        self._ends = np.cumsum([0, *(len(w.polygon) for w in words)])
        self._first = np.cumsum([0, *map(len, lines)])

    def text(self, index: int) -> tuple[TextLine, ...]:
        """See ``Dataset``."""
        return tuple(
            TextLine(self._points[self._ends[k] : self._ends[k + 1]], self._texts[k], bool(self._ignore[k]))
            for k in range(self._first[index], self._first[index + 1])
        )


def _corners(box: Sequence[float]) -> list[float]:
    """Eight coordinates of a box ``x, y, w, h``, clockwise from the top left."""
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def _outline(entry: Mapping[str, Any], key: str, outline: Outline) -> list[float]:
    """The drawn polygon, or the box: where it was asked for, or where no polygon was drawn."""
    drawn = entry.get(key) or ()
    return _corners(entry["bbox"]) if outline == "box" or len(drawn) < 6 else list(drawn)


def coco_word(entry: Mapping[str, Any], outline: Outline, label: str) -> TextLine:
    """COCO-Text's entry: what is not legible is don't-care."""
    text = transcript(entry.get("utf8_string") or "").strip()  # null, where nothing is legible
    return text_line(_outline(entry, "mask", outline), text, entry["legibility"] != "legible", label)


def textocr_word(entry: Mapping[str, Any], outline: Outline, label: str) -> TextLine:
    """TextOCR's entry: a single point stands for what the annotators could not read."""
    text = transcript(entry["utf8_string"]).strip()
    return text_line(_outline(entry, "points", outline), text, text == ".", label)


def _table(
    name: str,
    split: str,
    storage: Storage,
    source: str,
    folder: str,
    outline: Outline,
    word: Words,
    chosen: Callable[[Mapping[str, Any]], bool],
    layout: str,
) -> TextTable:
    """Read a table: ``imgs`` and ``anns`` by id, ``imgToAnns`` from an image to its annotations."""
    content = storage.json(source)
    label = storage.label(source)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(k), dict) for k in ("imgs", "anns", "imgToAnns")
    ):
        raise DataError(f"{label}: has no tables imgs, anns and imgToAnns", "fetch the annotations again")
    images, sizes, lines = [], [], []
    for key, entry in content["imgs"].items():
        where = f"{label}: image {key}"
        try:
            if not chosen(entry):
                continue
            images.append(posixpath.join(folder, posixpath.basename(str(entry["file_name"]))))
            sizes.append((int(entry["height"]), int(entry["width"])))
            numbers = content["imgToAnns"].get(key, ())
            lines.append(tuple(word(content["anns"][str(n)], outline, f"{label}: annotation {n}") for n in numbers))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{where}: a malformed entry ({type(error).__name__}: {error})", "fetch the annotations again"
            ) from error
    need_files(storage, images, "image", layout)
    return TextTable(name, split, storage, images, sizes, lines, source, outline)


COCO_FILES = ("cocotext.v2.json", "annotations/cocotext.v2.json")
COCO_IMAGES = ("train2014", "images/train2014", "imgs", "images")
"""Every image of COCO-Text is one of COCO's train2014, whatever its split."""


def coco_text(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``coco-text``: COCO-Text 2 (arXiv 1601.07140); ``cocotext.v2.json``, ``train2014/*.jpg``; splits train, val."""
    given = check_options("coco-text", OutlineOptions, options)
    need_split("coco-text", split, ("train", "val"))
    layout = "cocotext.v2.json, train2014/COCO_train2014_*.jpg"
    storage = open_storage(data, "coco-text", layout).rooted([COCO_FILES], "coco-text", layout)
    source = next(name for name in COCO_FILES if storage.exists(name))
    folder = find_folder(storage, COCO_IMAGES, IMAGES, "COCO_train2014_*.jpg", layout)
    return _table(
        "coco-text", split, storage, source, folder, given.outline, coco_word, lambda e: e["set"] == split, layout
    )


def textocr(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``textocr``: TextOCR 0.1 (arXiv 2105.05486); ``TextOCR_0.1_{split}.json``, ``train_images/*.jpg``; splits train, val."""
    given = check_options("textocr", OutlineOptions, options)
    need_split("textocr", split, ("train", "val"))
    source = f"TextOCR_0.1_{split}.json"
    layout = f"{source}, train_images/*.jpg (images of both splits)"
    storage = open_storage(data, "textocr", layout).rooted([source], "textocr", layout)
    folders = ("train_images", "train_val_images/train_images", "train", "images")
    folder = find_folder(storage, folders, IMAGES, "*.jpg", layout)
    return _table("textocr", split, storage, source, folder, given.outline, textocr_word, lambda e: True, layout)
