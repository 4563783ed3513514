"""One way to read files, whether a dataset lies in a folder, a zip, a tar, or a folder of the archives as they are shipped.

Nothing is ever unpacked to disk. A ``Storage`` is picklable: a worker process opens its own handles on first use. Names
are POSIX paths relative to the storage's root (``annotations/instances_val2017.json``).
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from rice_eval.datasets.archives import ARCHIVES, DAMAGE, Folder, Layer, Listing, is_archive, open_archive, open_nested
from rice_eval.errors import DataError

__all__ = ["Storage", "clean", "open_storage", "sums"]


def clean(name: str) -> str:
    """A name relative to the root, with no ``.`` or ``..`` left. Raises DataError where it leaves the root."""
    flat = posixpath.normpath(name.replace("\\", "/"))
    if flat.startswith(("/", "../")) or flat == ".." or (len(flat) > 1 and flat[1] == ":"):
        raise DataError(f"'{name}' lies outside the dataset's folder", "use paths relative to --data")
    return "" if flat == "." else flat


class Storage:
    """Read-only files: one or more layers (folders, archives) laid over each other; the first that has a file wins.

    Args:
        layers: where each layer's files appear ("" for the root) and the layer.
        prefix: the folder, relative to the layers' root, that names are relative to.
    """

    def __init__(self, layers: Sequence[tuple[str, Layer]], prefix: str = "") -> None:
        self._layers = list(layers)
        self.prefix = prefix
        self._listings: dict[str, Listing] = {}
        self._mounted = False

    def __getstate__(self) -> dict[str, Any]:
        # Listings are only needed where a dataset is set up; workers open files by name.
        return {**self.__dict__, "_listings": {}}

    @property
    def root(self) -> str:
        """What to call the whole in messages."""
        return self._layers[0][1].label(self.prefix).rstrip("/:")

    def label(self, name: str) -> str:
        """What to call a file in messages: where it lies if it exists, else where it would lie."""
        full = self._full(name)
        for layer, below in self._candidates(full) if len(self._layers) > 1 else ():
            if layer.has(below):
                return layer.label(below)
        return self._layers[0][1].label(full)

    def enter(self, folder: str) -> Storage:
        """The same files, with names relative to ``folder``."""
        return Storage(self._layers, clean(posixpath.join(self.prefix, folder)))

    def mount_archive(self, name: str, at: str = "") -> bool:
        """Show the files of an archive that is itself a file here, under ``at``. False where there is no such file."""
        for layer, below in self._candidates(self._full(name)):
            inside = open_nested(layer, below)
            if inside is not None:
                self._layers.append((self._full(at), inside))
                self._listings.clear()
                return True
        return False

    def mount_all(self) -> bool:
        """Mount every archive that lies at the top. False where there is none, or where they are mounted already."""
        if self._mounted:
            return False
        self._mounted = True
        return sum(self.mount_archive(name) for name in self.files("", ARCHIVES)) > 0

    def files(self, folder: str = "", suffix: str | tuple[str, ...] = "") -> tuple[str, ...]:
        """Names of the files in a folder (not below it), sorted, relative to that folder."""
        return tuple(sorted(name for name in self._listing(folder)[0] if name.lower().endswith(suffix)))

    def folders(self, folder: str = "") -> tuple[str, ...]:
        """Names of the folders in a folder, sorted."""
        return self._listing(folder)[1]

    def walk(self, folder: str = "", suffix: str | tuple[str, ...] = "") -> tuple[str, ...]:
        """Names of the files in and below a folder, sorted, relative to that folder."""
        found = list(self.files(folder, suffix))
        for below in self.folders(folder):
            found += [f"{below}/{name}" for name in self.walk(posixpath.join(folder, below), suffix)]
        return tuple(sorted(found))

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        folder, _, base = clean(name).rpartition("/")
        return base in self._listing(folder)[0]

    def is_folder(self, name: str) -> bool:
        """Whether there is a folder of that name, with something in it."""
        return any(self._listing(name))

    def has(self, name: str | tuple[str, ...]) -> bool:
        """Whether there is a file or a folder of that name (of any of the names) that can be listed."""
        try:
            return any(self.exists(n) or self.is_folder(n) for n in ([name] if isinstance(name, str) else name))
        except DataError:
            return False

    def size(self, name: str) -> int:
        """Bytes of a file (uncompressed). Raises DataError where there is none."""
        folder, _, base = clean(name).rpartition("/")
        try:
            return self._listing(folder)[0][base]
        except KeyError:
            raise self._missing(name) from None

    def open(self, name: str) -> IO[bytes]:
        """A seekable binary stream. Raises DataError naming the file where it is missing or damaged."""
        for layer, below in self._candidates(self._full(name)):
            try:
                stream = layer.open(below)
            except DAMAGE as error:
                raise self._damaged(name, error) from error
            if stream is not None:
                return stream
        raise self._missing(name)

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises DataError naming the file where it is missing or damaged."""
        with self.open(name) as stream:
            try:
                return stream.read()
            except DAMAGE as error:
                raise self._damaged(name, error) from error

    def text(self, name: str) -> str:
        """A file's text in UTF-8 (a byte-order mark is dropped). Raises DataError where it is not UTF-8."""
        try:
            return self.read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.label(name)}: not UTF-8 ({error})", "convert the file to UTF-8") from error

    def lines(self, name: str) -> Iterator[tuple[int, str]]:
        """Number (from 1) and text of every line that is not blank; line feeds alone end lines (with or without a return)."""
        for number, line in enumerate(self.text(name).split("\n"), 1):
            if line.strip():
                yield number, line.rstrip("\r")

    def json(self, name: str) -> Any:
        """A parsed JSON file. Raises DataError with the line where it is malformed."""
        try:
            return json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.label(name)}: not valid JSON ({error})", "fetch the file again") from error

    def crc(self, name: str) -> int:
        """CRC-32 of a file's bytes: from the directory of a zip, else computed."""
        for layer, below in self._candidates(self._full(name)):
            try:
                found = layer.crc(below)
            except DAMAGE as error:
                raise self._damaged(name, error) from error
            if found is not None:
                return found
        raise self._missing(name)

    def rooted(self, required: Sequence[str | tuple[str, ...]], dataset: str, layout: str) -> Storage:
        """The storage entered at the folder, at most three levels down, that holds all of ``required``.

        Each is a file or folder, or several of which one is enough.

        So a user may point at a dataset's folder, at the folder that holds it, at an archive that wraps it in one, or at a
        folder of the archives as shipped, which are mounted where the files are not found without them.

        Raises:
            DataError: no folder holds them all; the message names the first that is missing and the layout.
        """
        best, most = self, -1
        for mounted in (False, True):
            if mounted and not self.mount_all():
                break
            for folder in self._shallow():
                inside = self.enter(folder)
                missing = [name for name in required if not inside.has(name)]
                if not missing:
                    return inside
                if len(required) - len(missing) > most:
                    best, most = inside, len(required) - len(missing)
        absent = next(name for name in required if not best.has(name))
        absent = absent if isinstance(absent, str) else " or ".join(absent)
        raise DataError(f"{best.root}: {dataset} needs {absent}, which is not there", f"expected layout: {layout}")

    def _shallow(self) -> Iterator[str]:
        level = [""]
        for depth in range(4):
            yield from level
            if depth < 3:
                level = [posixpath.join(folder, below) for folder in level for below in self._visible(folder)]

    def _visible(self, folder: str) -> tuple[str, ...]:
        try:
            return self.folders(folder)
        except DataError:  # A folder that may not be listed, met while searching, is not the one that was meant.
            return ()

    def _full(self, name: str) -> str:
        return clean(posixpath.join(self.prefix, clean(name)))

    def _candidates(self, full: str) -> Iterator[tuple[Layer, str]]:
        for at, layer in self._layers:
            if at == "" or full == at or full.startswith(at + "/"):
                yield layer, full[len(at) :].lstrip("/")

    def _listing(self, folder: str) -> Listing:
        full = self._full(folder)
        if full not in self._listings:
            files: dict[str, int] = {}
            folders: set[str] = set()
            for layer, below in self._candidates(full):
                more, names = layer.scan(below)
                files = {**more, **files}
                folders.update(names)
            for at, _ in self._layers:
                if at.startswith(full + "/" if full else "") and at != full:
                    folders.add(at[len(full) :].lstrip("/").split("/")[0])
            self._listings[full] = (files, tuple(sorted(folders)))
        return self._listings[full]

    def _missing(self, name: str) -> DataError:
        return DataError(f"{self.label(name)}: no such file", "check --data against the dataset's layout")

    def _damaged(self, name: str, error: Exception) -> DataError:
        return DataError(f"{self.label(name)}: can't be read ({error})", "fetch the file again")


def open_storage(path: Path | None, dataset: str, layout: str) -> Storage:
    """The files of a user's ``--data``: a folder, a zip or a tar, or a folder that holds the archives as shipped.

    Args:
        path: what the user gave.
        dataset: the dataset's name, for messages.
        layout: the expected layout in one line, for messages.

    Raises:
        DataError: nothing was given, it does not exist, or the archive is damaged.
    """
    fix = f"expected layout: {layout}"
    if path is None:
        raise DataError(f"dataset '{dataset}' needs files of yours", f"pass --data with a folder, zip or tar; {fix}")
    if path.is_dir():
        return Storage([("", Folder(path))])
    if not path.exists():
        raise DataError(f"{path}: no such folder or archive", fix)
    if not is_archive(path.name):
        raise DataError(f"{path}: neither a folder nor one of {', '.join(ARCHIVES)}", fix)
    return Storage([("", open_archive(path))])


def sums(storage: Storage, names: Iterable[str], by_content: bool) -> list[tuple[str, bytes]]:
    """Parts of a fingerprint: a file's name with ``size:crc32`` where ``by_content``, else with its size alone.

    The same whether the files lie in a folder or in an archive. Label maps go by content, images by size: reading every
    image of a large set would take longer than the run.
    """
    listed = list(names)
    parts = [str(storage.size(name)) for name in listed]
    if by_content:
        with ThreadPoolExecutor(8) as pool:
            parts = [f"{size}:{crc:08x}" for size, crc in zip(parts, pool.map(storage.crc, listed))]
    return [(name, part.encode()) for name, part in zip(listed, parts)]
