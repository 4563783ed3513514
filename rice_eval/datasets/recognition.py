"""Crops of words or lines with one transcript each: LMDB files, and folders with a label file.

Nothing is left out: an entry with an empty label is don't-care, one whose image or label can't be read raises an error when
it is asked for, and ``faults`` says how many of each there are.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from rice_eval.datasets.base import (
    Dataset,
    DatasetOptions,
    Image,
    TextLine,
    check_options,
    decode_image,
    files_fingerprint,
)
from rice_eval.datasets.files import FORMAT, FileDataset, need_files
from rice_eval.datasets.rasters import upright_size
from rice_eval.datasets.segmentation import NoOptions
from rice_eval.datasets.storage import Storage, open_storage
from rice_eval.errors import DataError, MissingExtraError

__all__ = ["LabelFile", "LmdbCrops", "label_file", "lmdb_crops"]


def whole(text: str, size: tuple[int, int]) -> tuple[TextLine, ...]:
    """The one line of a crop, its polygon the crop's own border; an empty transcript is don't-care."""
    height, width = size
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], dtype=np.float64)
    return (TextLine(corners, text, not text),)


_environments: dict[tuple[int, str], Any] = {}
"""Open files by process: an environment must not cross a fork, nor be opened twice in one process."""
_lock = threading.Lock()


def _environment(root: Path) -> Any:
    """The environment of a folder, opened once a process, read-only and without a lock file."""
    try:
        import lmdb
    except ImportError as error:
        raise MissingExtraError.of("lmdb", "ocr", "reading an LMDB") from error
    key = (os.getpid(), str(root.resolve()))
    with _lock:
        if key not in _environments:
            try:
                _environments[key] = lmdb.open(
                    key[1], readonly=True, lock=False, readahead=False, meminit=False, create=False
                )
            except lmdb.Error as error:
                raise DataError(f"{root}: can't be opened as an LMDB ({error})", "fetch the file again") from error
        return _environments[key]


class LmdbCrops(Dataset):
    """An LMDB in the field's key layout: ``num-samples``, ``image-%09d``, ``label-%09d``, counted from 1.

    Args:
        split: the name of the folder.
        root: the folder that holds ``data.mdb``.

    Raises:
        DataError: not an LMDB, or no ``num-samples`` in it.
    """

    name = "lmdb"
    provides = frozenset({"text"})

    def __init__(self, split: str, root: Path) -> None:
        self.split = split
        self.root = root
        count = self._get("num-samples")
        try:
            if count is None:
                raise ValueError("no num-samples")
            self._count = int(count)
        except ValueError as error:
            raise DataError(
                f"{root}: not a recognition set ({error})", "its keys are num-samples, image-%09d, label-%09d"
            ) from error
        if self._count < 1:
            raise DataError(f"{root}: num-samples is {self._count}", "make the file again")

    def _get(self, key: str) -> bytes | None:
        environment = _environment(self.root)
        import lmdb

        try:
            with environment.begin() as transaction:
                value = transaction.get(key.encode())
        except lmdb.Error as error:
            raise DataError(f"{self.root}: {key} can't be read ({error})", "fetch the file again") from error
        return None if value is None else bytes(value)

    def __len__(self) -> int:
        return self._count

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every label, and every image's number of bytes."""
        parts = []
        for index in range(self._count):
            label, image = self._get(f"label-{index + 1:09d}"), self._get(f"image-{index + 1:09d}")
            size = -1 if image is None else len(image)
            parts.append((str(index), f"{size}:".encode() + (b"\xff" if label is None else label)))
        return files_fingerprint(parts, {"reader": "lmdb", "format": FORMAT, "samples": self._count})

    def image_id(self, index: int) -> str:
        """The entry's number in the file, from 1."""
        return f"{index + 1:09d}"

    def _bytes(self, kind: str, index: int) -> bytes:
        key = f"{kind}-{index + 1:09d}"
        value = self._get(key)
        if value is None:
            raise DataError(f"{self.root}: has no {key}, though num-samples is {self._count}", "make the file again")
        return value

    def size(self, index: int) -> tuple[int, int]:
        """See ``Dataset``."""
        return upright_size(BytesIO(self._bytes("image", index)), f"{self.root}:image-{index + 1:09d}")

    def image(self, index: int) -> Image:
        """See ``Dataset``."""
        return decode_image(self._bytes("image", index), f"{self.root}:image-{index + 1:09d}")

    def label(self, index: int) -> str:
        """The transcript of an entry. Raises DataError where there is none, or where it is not UTF-8."""
        try:
            return self._bytes("label", index).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.root}: label-{index + 1:09d} is not UTF-8 ({error})", "mend the label") from error

    def text(self, index: int) -> tuple[TextLine, ...]:
        """See ``Dataset``."""
        return whole(self.label(index), self.size(index))

    def faults(self, decode: bool = True) -> dict[str, tuple[str, ...]]:
        """Ids of the entries with a corrupt image (where ``decode``), a missing or unreadable label, an empty label."""
        found: dict[str, list[str]] = {"image": [], "label": [], "empty": []}
        for index in range(self._count):
            for kind, read in (("label", self.label), ("image", self.image)):
                if kind == "image" and not decode:
                    continue
                try:
                    if kind == "label" and read(index) == "":
                        found["empty"].append(self.image_id(index))
                    elif kind == "image":
                        read(index)
                except DataError:
                    found[kind].append(self.image_id(index))
        return {kind: tuple(ids) for kind, ids in found.items()}


def lmdb_crops(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``lmdb``: the split is the path of an LMDB's folder below the data folder (``evaluation/IIIT5k_3000``), or its own name."""
    check_options("lmdb", NoOptions, options)
    fix = f"expected layout: {split}/data.mdb, or --data pointing at the folder {split} itself"
    if data is None:
        raise DataError("dataset 'lmdb' needs files of yours", f"pass --data with a folder; {fix}")
    for root in (data / split, data):
        if (root / "data.mdb").is_file() and root.resolve().name == posixpath.basename(split):
            return LmdbCrops(split, root)
    raise DataError(f"{data / split}: holds no data.mdb", fix)


class LabelFileOptions(DatasetOptions):
    """``labels``: the label file, ``{split}`` standing for the split; ``images``: the folder its file names are relative to."""

    labels: str = "{split}.txt"
    images: str = ""


class LabelFile(FileDataset):
    """Crops with a label file."""

    provides = frozenset({"text"})

    def __init__(
        self, split: str, storage: Storage, images: Sequence[str], texts: Sequence[str], source: str, layout: str
    ) -> None:
        need_files(storage, images, "image", layout)
        self._texts = tuple(texts)
        super().__init__("label-file", split, storage, images, annotations=[source], facts={"empty": "don't-care"})

    def label(self, index: int) -> str:
        """The transcript of a crop."""
        return self._texts[index]

    def text(self, index: int) -> tuple[TextLine, ...]:
        """See ``Dataset``."""
        return whole(self._texts[index], self.size(index))


QUOTED = re.compile(r'^(?P<name>[^,]+),\s*"(?P<text>.*)"$')
"""``word_1.png, "Genaxis Theatre"``: ICDAR's recognition tasks; a backslash stands before quotes and backslashes."""


def read_labels(storage: Storage, source: str) -> Iterator[tuple[str, str]]:
    """File name and transcript of every line.

    One form a file: JSON lines with ``filename`` and ``text`` (Union14M), tabs between both, ICDAR's ``name, "text"``, or
    the first blank between both. A line of the name alone has an empty transcript.

    Raises:
        DataError: a malformed line.
    """
    lines = list(storage.lines(source))
    if source.endswith(".jsonl"):
        for number, line in lines:
            try:
                entry = json.loads(line)
                yield str(entry["filename"]), str(entry["text"])
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{storage.label(source)}:{number}: not an object with filename and text ({error})", "mend the line"
                ) from error
        return
    quoted = [QUOTED.match(line) for _, line in lines]
    if lines and all(quoted):
        for match in quoted:
            assert match is not None
            yield match["name"], re.sub(r"\\(.)", r"\1", match["text"])
        return
    separator = "\t" if any("\t" in line for _, line in lines) else " "
    for _, line in lines:
        name, _, text = line.partition(separator)
        yield name, text.strip("\r\n")


def label_file(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``label-file``: options ``labels={split}.txt``, ``images=FOLDER``."""
    chosen = check_options("label-file", LabelFileOptions, options)
    source, folder = (part.replace("{split}", split) for part in (chosen.labels, chosen.images))
    layout = f"{source} with a line 'name<TAB>transcript' an image, {posixpath.join(folder, 'name')}"
    storage = open_storage(data, "label-file", layout).rooted([source], "label-file", layout)
    rows = list(read_labels(storage, source))
    names = [name for name, _ in rows]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{storage.label(source)}: lists {twice} twice", "remove one of the lines")
    paths = [posixpath.join(folder, name) for name in names]
    return LabelFile(split, storage, paths, [text for _, text in rows], source, layout)
