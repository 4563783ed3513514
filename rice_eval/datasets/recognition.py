"""Crops of words or lines with one transcript each: LMDB files, and folders with a label file.

Nothing is left out: an entry with an empty label is don't-care, one whose image or label can't be read raises an error when
it is asked for, and ``faults`` says how many of each there are.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
import posixpath
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from rice_eval.datasets.text import transcript
from rice_eval.errors import DataError, MissingExtraError

__all__ = ["LabelFile", "LmdbCrops", "label_file", "lmdb_crops"]


def whole(text: str, size: tuple[int, int]) -> tuple[TextLine, ...]:
    """The one line of a crop, its polygon the crop's own border; a transcript that is empty or blank is don't-care."""
    height, width = size
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], dtype=np.float64)
    return (TextLine(corners, text, not text.strip()),)


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
                opened = lmdb.open(key[1], readonly=True, lock=False, readahead=False, meminit=False, create=False)
            except lmdb.Error as error:
                raise DataError(f"{root}: can't be opened as an LMDB ({error})", "fetch the file again") from error
            try:
                _check_whole(root, opened)
            except DataError:
                opened.close()
                raise
            _environments[key] = opened
        return _environments[key]


_TOUCH = """
import sys, lmdb
with lmdb.open(sys.argv[1], readonly=True, lock=False, create=False).begin(buffers=True) as transaction:
    for key, value in transaction.cursor():
        bytes(value[:1]), bytes(value[-1:])
"""


def _check_whole(root: Path, environment: Any) -> None:
    """DataError where a file is cut off: reading a page that it lacks would kill this process with a bus error.

    A whole file too may end before its last page, where that one is free: every value of a short one is touched elsewhere.
    """
    need = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    size = (root / "data.mdb").stat().st_size
    if size < need and subprocess.run([sys.executable, "-c", _TOUCH, str(root)], capture_output=True).returncode:
        raise DataError(f"{root / 'data.mdb'}: cut off, {size} of {need} bytes", "fetch the file again")


class LmdbCrops(Dataset):
    """One or more LMDBs in the field's key layout: ``num-samples``, ``image-%09d``, ``label-%09d``, counted from 1.

    Args:
        split: the name of the folder.
        root: the folder that holds ``data.mdb``, or, at any depth, the folders that do (``training/MJ`` holds ``MJ_train``,
            ``MJ_valid`` and ``MJ_test``): their entries follow each other in the order of the folders' names.

    Raises:
        DataError: no LMDB there, or no ``num-samples`` in one.
    """

    name = "lmdb"
    provides = frozenset({"text"})

    def __init__(self, split: str, root: Path) -> None:
        self.split = split
        self.root = root
        self._parts = ((root, ""),) if (root / "data.mdb").is_file() else tuple(_below(root))
        if not self._parts:
            raise DataError(f"{root}: holds no data.mdb", "point at the folder of an LMDB, or of several")
        self._ends = list(itertools.accumulate(self._samples(part) for part, _ in self._parts))

    @staticmethod
    def _samples(root: Path) -> int:
        value = _get(root, "num-samples")
        try:
            if value is None:
                raise ValueError("no num-samples")
            count = int(value)
        except ValueError as error:
            raise DataError(
                f"{root}: not a recognition set ({error})", "its keys are num-samples, image-%09d, label-%09d"
            ) from error
        if count < 1:
            raise DataError(f"{root}: num-samples is {count}", "make the file again")
        keys = int(_environment(root).stat()["entries"])
        if count > keys:
            raise DataError(f"{root}: num-samples is {count}, but the file has {keys} keys", "make the file again")
        return count

    @property
    def beyond(self) -> tuple[str, ...]:
        """Folders of the LMDBs that hold an entry after their ``num-samples``, which is never read."""
        return tuple(
            str(root) for root, _ in self._parts if _get(root, f"image-{self._samples(root) + 1:09d}") is not None
        )

    def __len__(self) -> int:
        return self._ends[-1]

    def _at(self, index: int) -> tuple[Path, str, int]:
        """The LMDB that holds an entry, the LMDB's name below the root, and the entry's number in it, from 1."""
        part = bisect.bisect_right(self._ends, index)
        root, name = self._parts[part]
        return root, name, index + 1 - (self._ends[part - 1] if part else 0)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every label, and every image's number of bytes."""
        parts, index = [], 0
        for (root, _), end in zip(self._parts, self._ends):
            with _reading(root, "an entry") as transaction:
                for number in range(1, end - index + 1):
                    label, image = (transaction.get(f"{kind}-{number:09d}".encode()) for kind in ("label", "image"))
                    size = -1 if image is None else len(image)
                    parts.append((str(index), f"{size}:".encode() + (b"\xff" if label is None else bytes(label))))
                    index += 1
        return files_fingerprint(parts, {"reader": "lmdb", "format": FORMAT, "samples": len(self)})

    def image_id(self, index: int) -> str:
        """The entry's number in its file, from 1, after the file's folder where there are several."""
        _, name, number = self._at(index)
        return f"{name}/{number:09d}" if name else f"{number:09d}"

    def _bytes(self, kind: str, index: int) -> bytes:
        root, _, number = self._at(index)
        key = f"{kind}-{number:09d}"
        value = _get(root, key)
        if value is None:
            raise DataError(f"{root}: has no {key}, though num-samples is {self._samples(root)}", "make the file again")
        return value

    def _label(self, kind: str, index: int) -> str:
        root, _, number = self._at(index)
        return f"{root}:{kind}-{number:09d}"

    def size(self, index: int) -> tuple[int, int]:
        """See ``Dataset``."""
        return upright_size(BytesIO(self._bytes("image", index)), self._label("image", index))

    def image(self, index: int) -> Image:
        """See ``Dataset``."""
        return decode_image(self._bytes("image", index), self._label("image", index))

    def label(self, index: int) -> str:
        """The transcript of an entry. Raises DataError where there is none, or where it is not UTF-8."""
        try:
            return self._bytes("label", index).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self._label('label', index)} is not UTF-8 ({error})", "mend the label") from error

    def text(self, index: int) -> tuple[TextLine, ...]:
        """See ``Dataset``."""
        return whole(self.label(index), self.size(index))

    def faults(self, decode: bool = True) -> dict[str, tuple[str, ...]]:
        """Ids of the entries with a corrupt image (where ``decode``), a missing or unreadable label, an empty label."""
        found: dict[str, list[str]] = {"image": [], "label": [], "empty": []}
        for index in range(len(self)):
            for kind, read in (("label", self.label), ("image", self.image)):
                if kind == "image" and not decode:
                    continue
                try:
                    if kind == "label" and not str(read(index)).strip():
                        found["empty"].append(self.image_id(index))
                    elif kind == "image":
                        read(index)
                except DataError:
                    found[kind].append(self.image_id(index))
        return {kind: tuple(ids) for kind, ids in found.items()}


@contextmanager
def _reading(root: Path, what: str) -> Iterator[Any]:
    """A read transaction whose values are views of the file: a value's length costs no read of it."""
    environment = _environment(root)
    import lmdb

    try:
        with environment.begin(buffers=True) as transaction:
            yield transaction
    except lmdb.Error as error:
        raise DataError(f"{root}: {what} can't be read ({error})", "fetch the file again") from error


def _get(root: Path, key: str) -> bytes | None:
    with _reading(root, key) as transaction:
        value = transaction.get(key.encode())
        return None if value is None else bytes(value)


def _below(root: Path) -> Iterator[tuple[Path, str]]:
    """Folders below ``root`` that hold an LMDB, with their paths relative to it."""
    found, seen = [], set()
    for folder, below, files in os.walk(root, followlinks=True):
        if "data.mdb" in files:
            found.append(Path(folder, "data.mdb"))
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()  # links that lead back up
        seen.add(real)
    for path in sorted(found):
        yield path.parent, path.parent.relative_to(root).as_posix()


def lmdb_crops(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``lmdb``: the split is a path below the data folder (``evaluation/IIIT5k_3000``), or the data folder's own name.

    The folder holds an LMDB, or folders of which each holds one.
    """
    check_options("lmdb", NoOptions, options)
    fix = f"expected layout: {split}/data.mdb, or --data pointing at the folder {split} itself"
    if data is None:
        raise DataError("dataset 'lmdb' needs files of yours", f"pass --data with a folder; {fix}")
    for root in (data / split, data):
        if root.resolve().name == posixpath.basename(split) and ((root / "data.mdb").is_file() or any(_below(root))):
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
        self,
        name: str,
        split: str,
        storage: Storage,
        images: Sequence[str],
        texts: Sequence[str],
        sources: Sequence[str],
        layout: str,
    ) -> None:
        twice = [image for image, count in Counter(images).items() if count > 1]
        if twice:
            raise DataError(
                f"{', '.join(map(storage.label, sources))}: lists {twice[0]} twice", "remove one of the lines"
            )
        need_files(storage, images, "image", layout)
        self._texts = tuple(texts)
        super().__init__(name, split, storage, images, annotations=sources, facts={"empty": "don't-care"})

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

    One form a file: a JSON object as MMOCR 1.x writes it (``data_list`` of ``img_path`` and one of ``instances`` with its
    ``text``), JSON lines with ``filename`` and ``text`` as MMOCR 0.x does, tabs between both, ICDAR's ``name, "text"``, or the
    first blank between both. A line of the name alone has an empty transcript.

    Raises:
        DataError: a malformed line.
    """
    if source.endswith(".json"):
        content = storage.json(source)
        rows = content.get("data_list") if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise DataError(f"{storage.label(source)}: has no list data_list", "write it as MMOCR 1.x does")
        for number, entry in enumerate(rows, 1):
            try:
                (instance,) = entry["instances"]
                yield str(entry["img_path"]), transcript(instance["text"])
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{storage.label(source)}: entry {number} of data_list has no img_path with one text ({error})",
                    "mend the entry",
                ) from error
        return
    lines = list(storage.lines(source))
    if source.endswith(".jsonl"):
        for number, line in lines:
            try:
                entry = json.loads(line)
                yield str(entry["filename"]), transcript(entry["text"])
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
    if not rows:
        raise DataError(f"{storage.label(source)}: lists no image", f"expected layout: {layout}")
    names = [name for name, _ in rows]
    paths = [posixpath.join(folder, name) for name in names]
    return LabelFile("label-file", split, storage, paths, [text for _, text in rows], [source], layout)
