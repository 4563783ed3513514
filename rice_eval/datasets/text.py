"""Pages and scenes with text lines or words in place: SROIE, ICDAR 2015, Total-Text, FUNSD.

A line's polygon starts at the point where its file starts and goes clockwise; an empty transcript counts as don't-care.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rice_eval.datasets.base import Dataset, DatasetOptions, TextLine, check_options
from rice_eval.datasets.files import FileDataset, need_split
from rice_eval.datasets.rasters import IMAGES
from rice_eval.datasets.segmentation import NoOptions, find_folder, pair
from rice_eval.datasets.storage import Storage, open_storage
from rice_eval.errors import DataError, MissingExtraError

__all__ = ["Sroie", "TextPages", "funsd", "icdar2015", "sroie", "text_line", "totaltext", "transcript"]

Parser = Callable[[Storage, str], tuple[TextLine, ...]]


def text_line(points: Any, text: str, ignore: bool, label: str) -> TextLine:
    """A line from ``(k, 2)`` points of a file; turned clockwise, its first point kept.

    Raises:
        DataError: fewer than three points, or numbers that are none.
    """
    polygon: NDArray[np.float64] = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    if len(polygon) < 3:
        raise DataError(f"{label}: a polygon of {len(polygon)} points", "a polygon has three points or more")
    if not np.isfinite(polygon).all():
        raise DataError(f"{label}: a polygon with a coordinate that is no finite number", "mend its coordinates")
    x, y = polygon.T
    if float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) < 0:  # y points down: clockwise is positive
        polygon = np.concatenate([polygon[:1], polygon[:0:-1]])
    return TextLine(polygon, text, ignore or not text)


def transcript(value: Any) -> str:
    """A transcript from a JSON file as it is.

    Raises:
        TypeError: no text: ``null`` must not become the word None, nor a number lose its zeros.
        ValueError: half of a surrogate pair, which no file can hold.
    """
    if not isinstance(value, str):
        raise TypeError(f"the transcript {value!r} is not text")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"the transcript {value!r} holds half of a surrogate pair")
    return value


class TextPages(FileDataset):
    """Images with a file of text lines each, which ``parse`` reads."""

    provides = frozenset({"text"})

    def __init__(
        self,
        name: str,
        split: str,
        storage: Storage,
        images: Sequence[str],
        truths: Sequence[str],
        parse: Parser,
        facts: Mapping[str, Any] | None = None,
        annotations: Sequence[str] = (),
    ) -> None:
        facts = {"empty": "don't-care", **(facts or {})}
        super().__init__(name, split, storage, images, annotations=annotations, maps=truths, facts=facts)
        self.truths = tuple(truths)
        self._parse = parse

    def text(self, index: int) -> tuple[TextLine, ...]:
        """See ``Dataset``. Raises DataError naming file and line where the annotation is malformed."""
        return self._parse(self.storage, self.truths[index])


def quads(storage: Storage, name: str, unread: str | None) -> tuple[TextLine, ...]:
    """Lines ``x1,y1,x2,y2,x3,y3,x4,y4,transcript``; the transcript may hold commas, ``unread`` marks don't-care."""
    found = []
    for number, line in storage.lines(name):
        label = f"{storage.label(name)}:{number}"
        parts = line.split(",", 8)
        try:
            points = [float(part) for part in parts[:8]]
            if len(parts) != 9:
                raise ValueError(f"{len(parts)} fields")
            if "\r" in parts[8]:
                raise ValueError("a carriage return within it: lines end with line feeds")
        except ValueError as error:
            raise DataError(f"{label}: not x1,y1,…,x4,y4,transcript ({error})", "mend the line") from error
        text = parts[8].strip()
        found.append(text_line(points, text, text == unread, label))
    return tuple(found)


def sroie_lines(storage: Storage, name: str) -> tuple[TextLine, ...]:
    """SROIE's boxes: every line is legible."""
    return quads(storage, name, None)


def icdar_words(storage: Storage, name: str) -> tuple[TextLine, ...]:
    """ICDAR 2015's words: ``###`` is don't-care."""
    return quads(storage, name, "###")


class Sroie(TextPages):
    """Receipts with text lines and their key fields."""

    def __init__(
        self, split: str, storage: Storage, images: Sequence[str], truths: Sequence[str], keys: Sequence[str]
    ) -> None:
        self.keys = tuple(keys)
        super().__init__("sroie", split, storage, images, truths, sroie_lines, annotations=keys)

    def fields(self, index: int) -> dict[str, str]:
        """The key fields of a receipt (company, date, address, total), those that it has; {} where the split has none."""
        if not self.keys:
            return {}
        content = self.storage.json(self.keys[index])
        if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
            raise DataError(f"{self.storage.label(self.keys[index])}: not an object of text fields", "mend the file")
        return dict(content)


def _stems(names: Sequence[str], prefix: str = "") -> dict[str, str]:
    """Each name's stem, without ``prefix``, and the name.

    Raises:
        DataError: two of one stem (``1.csv`` and ``1.txt``): which of them counts must not be a matter of chance.
    """
    found: dict[str, str] = {}
    for name in names:
        first = found.setdefault(posixpath.splitext(name)[0].removeprefix(prefix), name)
        if first != name:
            raise DataError(f"{first} and {name} are both there for one image", "remove one of them")
    return found


def sroie(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``sroie``: ICDAR 2019 receipts; ``{split}/img/*.jpg``, ``{split}/box/*.csv`` (or ``.txt``), ``{split}/key/*.json``."""
    check_options("sroie", NoOptions, options)
    layout = f"{split}/img/*.jpg, {split}/box/*.csv, {split}/key/*.json"
    storage = open_storage(data, "sroie", layout).rooted([f"{split}/img", f"{split}/box"], "sroie", layout)
    images = storage.files(f"{split}/img", IMAGES)
    boxes = {
        stem: f"{split}/box/{name}" for stem, name in _stems(storage.files(f"{split}/box", (".csv", ".txt"))).items()
    }
    names, truths = pair(storage, f"{split}/img", images, boxes, layout, "box file")
    found = {stem: f"{split}/key/{name}" for stem, name in _stems(storage.files(f"{split}/key", ".json")).items()}
    keys = pair(storage, f"{split}/img", images, found, layout, "key file")[1] if found else []
    return Sroie(split, storage, names, truths, keys)


ICDAR_FOLDERS = {
    "train": (("ch4_training_images", "train_images"), ("ch4_training_localization_transcription_gt", "train_gts")),
    "test": (("ch4_test_images", "test_images"), ("Challenge4_Test_Task1_GT", "test_gts")),
}
"""Folders (or zips of that name) of images and of ground truth, as the challenge ships them."""


def icdar2015(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``icdar2015``: incidental scene text (challenge 4), words with quadrilaterals; splits train, test."""
    check_options("icdar2015", NoOptions, options)
    need_split("icdar2015", split, tuple(ICDAR_FOLDERS))
    pictures, truths = ICDAR_FOLDERS[split]
    layout = f"{pictures[0]}/img_*.jpg, {truths[0]}/gt_img_*.txt (folders, or the zips of those names)"
    wanted = [tuple(n + tail for n in group for tail in ("", ".zip")) for group in (pictures, truths)]
    storage = open_storage(data, "icdar2015", layout).rooted(wanted, "icdar2015", layout)
    for folder in (*pictures, *truths):
        # The challenge's zips have no folder inside, and those of train and test share their files' names.
        if not storage.is_folder(folder):
            storage.mount_archive(f"{folder}.zip", folder)
    where = find_folder(storage, pictures, IMAGES, "images", layout)
    truth = find_folder(storage, truths, ".txt", "gt_*.txt", layout)
    found = {stem: f"{truth}/{name}" for stem, name in _stems(storage.files(truth, ".txt"), "gt_").items()}
    return TextPages(
        "icdar2015",
        split,
        storage,
        *pair(storage, where, storage.files(where, IMAGES), found, layout, "ground truth"),
        icdar_words,
    )


def total_text(storage: Storage, name: str) -> tuple[TextLine, ...]:
    """Total-Text's polygons, from its text or MATLAB files; ``#`` is don't-care."""
    return _total_mat(storage, name) if name.endswith(".mat") else _total_txt(storage, name)


RECORD = re.compile(
    r"x:\s*\[\[(?P<x>[^\]]*)\]\],\s*y:\s*\[\[(?P<y>[^\]]*)\]\],\s*ornt:\s*(?P<ornt>\[.*?\]),\s*transcriptions:\s*(?P<text>\[.*\])\s*$",
    re.DOTALL,
)


def _total_txt(storage: Storage, name: str) -> tuple[TextLine, ...]:
    found = []
    # Long coordinate lists are broken over lines: a record starts where a line starts with x.
    for number, record in enumerate(re.split(r"(?m)^(?=x:)", storage.text(name))):
        if not record.strip():
            continue
        label = f"{storage.label(name)}: record {number}"
        match = RECORD.match(record)
        try:
            if match is None:
                raise ValueError("not x: [[…]], y: [[…]], ornt: […], transcriptions: […]")
            x, y = ([float(v) for v in match[axis].split()] for axis in "xy")
            texts, ornt = ast.literal_eval(match["text"]), ast.literal_eval(match["ornt"])
            points = np.stack([x, y], 1)
            text = transcript(texts[0]) if texts else ""
        except (TypeError, ValueError, SyntaxError) as error:
            raise DataError(f"{label}: malformed ({error})", "fetch the file again") from error
        found.append(text_line(points, text, text == "#" or ornt == ["#"], label))
    return tuple(found)


def _total_mat(storage: Storage, name: str) -> tuple[TextLine, ...]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingExtraError.of("scipy", "ocr", "reading Total-Text's .mat files") from error
    label = storage.label(name)
    try:
        content = loadmat(BytesIO(storage.read(name)))
        rows = content["polygt"] if "polygt" in content else content["gt"]
        cells = [
            (np.ravel(r[1]), np.ravel(r[3]), "".join(map(str, np.ravel(r[4]))), "".join(map(str, np.ravel(r[5]))))
            for r in rows
        ]
        lines = [(np.stack([x, y], 1).astype(np.float64), text, ornt) for x, y, text, ornt in cells]
    except DataError:
        raise
    except Exception as error:  # loadmat raises whatever its parsers meet in a damaged file.
        raise DataError(
            f"{label}: not a ground truth of Total-Text ({type(error).__name__}: {error})", "fetch it again"
        ) from error
    return tuple(text_line(points, text, text == "#" or ornt == "#", label) for points, text, ornt in lines)


def totaltext(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``totaltext``: words with polygons, curved ones too; splits train, test; text files before MATLAB files."""
    check_options("totaltext", NoOptions, options)
    need_split("totaltext", split, ("train", "test"))
    part = split.capitalize()
    where = f"Images/{part}"
    folders = [f"{top}Polygon/{part}" for top in ("Groundtruth/", "txt_format/", "groundtruth_text/Groundtruth/", "")]
    layout = f"{where}/img*.jpg, {folders[0]}/poly_gt_img*.txt (or .mat)"
    storage = open_storage(data, "totaltext", layout).rooted([where], "totaltext", layout)
    truth = find_folder(storage, folders, (".txt", ".mat"), "poly_gt_*", layout)
    found = {
        stem.removeprefix("poly_").removeprefix("gt_"): f"{truth}/{name}"
        for suffix in (".mat", ".txt")
        for stem, name in _stems(storage.files(truth, suffix)).items()
    }
    return TextPages(
        "totaltext",
        split,
        storage,
        *pair(storage, where, storage.files(where, IMAGES), found, layout, "ground truth"),
        total_text,
    )


class FunsdOptions(DatasetOptions):
    """``level``: words, or the entities (questions, answers, headers) that they form."""

    level: Literal["words", "entities"] = "words"


def funsd_entities(storage: Storage, name: str) -> list[Mapping[str, Any]]:
    """The entities of a form: text, box, label, words, linking."""
    content = storage.json(name)
    if not isinstance(content, dict) or not isinstance(content.get("form"), list):
        raise DataError(f"{storage.label(name)}: has no list 'form'", "fetch FUNSD's annotations again")
    return list(content["form"])


def _boxes(storage: Storage, name: str, words: bool) -> tuple[TextLine, ...]:
    label = storage.label(name)
    found = []
    for entity in funsd_entities(storage, name):
        try:
            for item in entity["words"] if words else [entity]:
                x1, y1, x2, y2 = (float(v) for v in item["box"])
                corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
                found.append(text_line(corners, transcript(item["text"]).strip(), False, label))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{label}: a malformed entry ({type(error).__name__}: {error})", "fetch it again"
            ) from error
    return tuple(found)


def funsd_words(storage: Storage, name: str) -> tuple[TextLine, ...]:
    """FUNSD's words."""
    return _boxes(storage, name, words=True)


def funsd_lines(storage: Storage, name: str) -> tuple[TextLine, ...]:
    """FUNSD's entities, each with the whole of its text."""
    return _boxes(storage, name, words=False)


def funsd(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``funsd``: scanned forms; ``training_data`` and ``testing_data`` with ``images/`` and ``annotations/``; option ``level``."""
    chosen = check_options("funsd", FunsdOptions, options)
    need_split("funsd", split, ("train", "test"))
    top = {"train": "training_data", "test": "testing_data"}[split]
    where, truth = f"{top}/images", f"{top}/annotations"
    layout = f"dataset/{where}/*.png, dataset/{truth}/*.json"
    storage = open_storage(data, "funsd", layout).rooted([where, truth], "funsd", layout)
    found = {stem: f"{truth}/{name}" for stem, name in _stems(storage.files(truth, ".json")).items()}
    names = pair(storage, where, storage.files(where, IMAGES), found, layout, "ground truth")
    parse = funsd_words if chosen.level == "words" else funsd_lines
    return TextPages("funsd", split, storage, *names, parse, {"level": chosen.level})
