"""Folders, zips and tars as read-only trees of files; ``storage.py`` lays them over each other.

Nothing is unpacked to disk. Every kind is picklable and opens its handles anew in each process.
"""

from __future__ import annotations

import io
import os
import posixpath
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from rice_eval.errors import DataError

__all__ = ["ARCHIVES", "IN_MEMORY", "Folder", "Layer", "Tar", "Zip", "is_archive", "open_archive"]

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
IN_MEMORY = 1 << 28
"""Largest archive (bytes) that is held in memory where it can't be read in place: a compressed tar, or a compressed zip
inside another archive."""
DAMAGE = (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, tarfile.TarError, zlib.error)
"""What the standard library raises on a damaged, encrypted or unsupported archive."""

Listing = tuple[dict[str, int], tuple[str, ...]]
"""Of one folder: files with their sizes in bytes, and names of sub-folders."""


class Layer(Protocol):
    """A read-only tree of files. Names are normalised POSIX paths with no leading slash."""

    def has(self, name: str) -> bool:
        """Whether there is a file or folder of that name, without listing anything."""

    def scan(self, folder: str) -> Listing:
        """Contents of one folder; ({}, ()) where there is none."""

    def open(self, name: str) -> IO[bytes] | None:
        """A seekable stream of one file, None where there is none."""

    def crc(self, name: str) -> int | None:
        """CRC-32 of one file's bytes, None where there is none."""

    def label(self, name: str) -> str:
        """What to call a file in messages."""


def is_archive(name: str) -> bool:
    """Whether a file's name says that it is an archive that can be read here."""
    return name.lower().endswith(ARCHIVES)


def open_archive(path: Path) -> Layer:
    """The tree inside a zip or tar on disk. Raises DataError where it is damaged or can't be read in place."""
    return Zip(path, File(path, 0, None)) if path.suffix.lower() == ".zip" else Tar(path)


def open_nested(layer: Layer, name: str) -> Layer | None:
    """The tree inside a zip that is itself a file of ``layer``; None where there is no such file.

    Stored members are read in place; compressed ones are expanded in memory, up to ``IN_MEMORY``.
    """
    label = Path(layer.label(name))
    if isinstance(layer, Folder):
        return open_archive(label) if label.is_file() else None
    if isinstance(layer, Zip) and (span := layer.span(name)) is not None:
        return Zip(label, span)
    if (stream := layer.open(name)) is None:
        return None
    with stream:
        data = stream.read(IN_MEMORY + 1)
    if len(data) > IN_MEMORY:
        raise DataError(
            f"{label}: too large to be read inside another archive", "take it out of the outer archive once"
        )
    return Zip(label, Memory(data))


def stream_crc(stream: IO[bytes]) -> int:
    """CRC-32 of a stream's bytes; closes it."""
    total = 0
    with stream:
        while block := stream.read(1 << 20):
            total = zlib.crc32(block, total)
    return total


@dataclass(frozen=True)
class Folder:
    """A folder on disk."""

    root: Path

    def has(self, name: str) -> bool:
        """See ``Layer``."""
        return os.path.exists(self.root / name)

    def scan(self, folder: str) -> Listing:
        """See ``Layer``."""
        files: dict[str, int] = {}
        folders = []
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        folders.append(entry.name)
                    elif entry.is_file():
                        files[entry.name] = entry.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return {}, ()
        except OSError as error:
            raise DataError(
                f"{self.root / folder}: can't be listed ({error.strerror})", "mend its permissions"
            ) from error
        return files, tuple(folders)

    def open(self, name: str) -> IO[bytes] | None:
        """See ``Layer``."""
        try:
            return (self.root / name).open("rb")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def crc(self, name: str) -> int | None:
        """See ``Layer``."""
        stream = self.open(name)
        return None if stream is None else stream_crc(stream)

    def label(self, name: str) -> str:
        """See ``Layer``."""
        return str(self.root / name)


@dataclass(frozen=True)
class File:
    """A stretch of a file on disk (the whole of it by default) as a source of bytes."""

    path: Path
    offset: int
    size: int | None

    def open(self) -> IO[bytes]:
        """A new stream."""
        handle = self.path.open("rb")
        if self.size is None:
            return handle
        return io.BufferedReader(_Window(handle, self.offset, self.size))  # type: ignore[return-value, unused-ignore]


@dataclass(frozen=True)
class Memory:
    """Bytes held in memory as a source."""

    data: bytes

    def open(self) -> IO[bytes]:
        """A new stream."""
        return io.BytesIO(self.data)


class _Window(io.RawIOBase):
    """A stretch of a file as a seekable stream."""

    def __init__(self, handle: IO[bytes], offset: int, size: int) -> None:
        self._handle, self._offset, self._size, self._at = handle, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, to: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + to)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._handle.seek(self._offset + self._at)
        part = self._handle.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def close(self) -> None:
        self._handle.close()
        super().close()


class _Tree:
    """Names inside an archive as folders of files with their sizes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders: dict[str, tuple[dict[str, int], set[str]]] = {"": ({}, set())}
        self._process = -1

    def _plant(self, name: str, size: int) -> None:
        parts = posixpath.normpath(name).split("/")
        # Resource forks of macOS travel in many shipped zips; they are no part of any dataset.
        if parts[0] in ("..", "", "__MACOSX") or parts[-1].startswith("._"):
            return
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            if folder not in self._folders:
                self._folders[folder] = ({}, set())
                self._folders["/".join(parts[: depth - 1])][1].add(parts[depth - 1])
        self._folders["/".join(parts[:-1])][0][parts[-1]] = size

    def has(self, name: str) -> bool:
        """See ``Layer``."""
        folder, _, base = name.rpartition("/")
        return name in self._folders or base in self._folders.get(folder, ({}, set()))[0]

    def scan(self, folder: str) -> Listing:
        """See ``Layer``."""
        files, folders = self._folders.get(folder, ({}, set()))
        return files, tuple(folders)

    def label(self, name: str) -> str:
        """See ``Layer``."""
        return f"{self.root}:{name}"


class Zip(_Tree):
    """A zip on disk, or inside another archive."""

    def __init__(self, root: Path, source: File | Memory) -> None:
        super().__init__(root)
        self._source = source
        self._handle: zipfile.ZipFile | None = None
        for info in self._zip().infolist():
            if not info.is_dir():
                self._plant(info.filename, info.file_size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_process": -1}

    def _zip(self) -> zipfile.ZipFile:
        # A forked child shares the parent's file position: it needs a handle of its own too.
        if self._handle is None or self._process != os.getpid():
            try:
                self._handle = zipfile.ZipFile(self._source.open())
            except DAMAGE as error:
                raise DataError(f"{self.root}: can't be read as a zip ({error})", "fetch the archive again") from error
            self._process = os.getpid()
        return self._handle

    def _info(self, name: str) -> zipfile.ZipInfo | None:
        known = self._zip().NameToInfo
        return known.get(name) or known.get("./" + name)

    def open(self, name: str) -> IO[bytes] | None:
        """See ``Layer``."""
        info = self._info(name)
        return None if info is None or info.is_dir() else self._zip().open(info)

    def crc(self, name: str) -> int | None:
        """See ``Layer``; from the zip's directory, so that nothing is read."""
        info = self._info(name)
        return None if info is None else info.CRC

    def span(self, name: str) -> File | None:
        """Where a stored (not compressed) member lies on disk, None where it has no such place."""
        info = self._info(name)
        if info is None or info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            return None
        if not isinstance(self._source, File):
            return None
        with self._source.open() as handle:
            # Local header: 30 fixed bytes, of which 26..30 are the lengths of name and extra field.
            handle.seek(info.header_offset)
            head = handle.read(30)
        skip = 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        return File(self._source.path, self._source.offset + info.header_offset + skip, info.file_size)


class Tar(_Tree):
    """A tar on disk: uncompressed ones are read in place by offset, compressed ones from memory where they are small."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._spans: dict[str, tuple[int, int]] = {}
        self._data: bytes | None = None
        self._fd = -1
        try:
            if tarfile.is_tarfile(root) and not _compressed(root):
                with tarfile.open(root, "r:") as archive:
                    self._index(archive, root.stat().st_size)
            else:
                self._expand()
        except DAMAGE as error:
            raise DataError(f"{root}: can't be read as a tar ({error})", "fetch the archive again") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fd": -1, "_process": -1}

    def _expand(self) -> None:
        import bz2
        import gzip
        import lzma

        if self.root.stat().st_size > IN_MEMORY:
            raise DataError(
                f"{self.root}: a compressed tar of over {IN_MEMORY >> 20} MiB can't be read in place",
                "decompress it once to a plain .tar (gunzip, bunzip2 or unxz), or unpack it",
            )
        expand = {"gzip": gzip.decompress, "bzip2": bz2.decompress, "xz": lzma.decompress}
        kind = _compressed(self.root)
        if kind not in expand:
            raise tarfile.TarError("no tar header")
        try:
            self._data = expand[kind](self.root.read_bytes())
        except lzma.LZMAError as error:
            raise tarfile.TarError(str(error)) from error
        with tarfile.open(fileobj=io.BytesIO(self._data), mode="r:") as archive:
            self._index(archive, len(self._data))

    def _index(self, archive: tarfile.TarFile, length: int) -> None:
        for member in archive:
            name = posixpath.normpath(member.name)
            span: tuple[int, int] | None = None
            if member.islnk() or member.issym():
                beside = "" if member.islnk() else posixpath.dirname(name)
                span = self._spans.get(posixpath.normpath(posixpath.join(beside, member.linkname)))
            elif member.isfile() and not member.issparse():
                span = (member.offset_data, member.size)
            if span is None:
                continue
            if sum(span) > length:
                raise DataError(f"{self.root}: truncated inside {name}", "fetch the archive again")
            self._spans[name] = span
            self._plant(name, span[1])
        # The library takes a cut-off tail for the end; a whole tar ends with blocks of zeros.
        assert archive.fileobj is not None
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"{self.root}: cut off, it has no end marker", "fetch the archive again")

    def open(self, name: str) -> IO[bytes] | None:
        """See ``Layer``."""
        if name not in self._spans:
            return None
        offset, size = self._spans[name]
        if self._data is not None:
            return io.BytesIO(self._data[offset : offset + size])
        if self._fd < 0 or self._process != os.getpid():
            self._fd, self._process = os.open(self.root, os.O_RDONLY), os.getpid()
        # pread has no file position, so that threads can share the descriptor.
        parts: list[bytes] = []
        while size and (part := os.pread(self._fd, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        if size:
            raise OSError("truncated")
        return io.BytesIO(b"".join(parts))

    def crc(self, name: str) -> int | None:
        """See ``Layer``."""
        stream = self.open(name)
        return None if stream is None else stream_crc(stream)


def _compressed(path: Path) -> str:
    """The compression that a file's first bytes name, "" for none."""
    magic = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
    with path.open("rb") as handle:
        head = handle.read(6)
    return next((kind for start, kind in magic.items() if head.startswith(start)), "")
