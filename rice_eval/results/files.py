"""Files as results are written to them: safe names, whole files or none, one line where the file system refuses."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rice_eval.errors import RecordError

__all__ = ["slug", "write_atomic", "write_output", "writing"]

_LINKS = 40  # followed at most, as Linux does


def slug(name: str) -> str:
    """A name as a safe file name; where characters had to go, a short hash of the whole keeps names apart."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")[:80]
    if safe and safe == name:
        return safe
    return f"{safe or 'x'}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:6]}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system says while ``path`` is written into one line that names it.

    Raises:
        RecordError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free some space and run the same command again" if full else "give another folder, or mend this one"
        raise RecordError(f"{path}: can't be written ({error.strerror or error})", fix) from error


def write_output(path: Path, data: bytes) -> None:
    """``write_atomic`` to a path that a user gave: its folder is made where it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a temporary file, sync it and rename it: readers see the old bytes or the new ones.

    A link is followed, and the file that it names is replaced. What is no regular file (a device, a named pipe, an open file of
    this process under ``/proc``) is written to as it is, and stays what it is.
    """
    target = _regular(path)
    if target is None:
        with open(path, "ab") as stream:
            stream.write(data)
        return
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o644
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _regular(path: Path) -> Path | None:
    """The regular file that a path names through its links, there or not yet; None for anything else."""
    for _ in range(_LINKS):
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            return path
        if not stat.S_ISLNK(mode):
            return path if stat.S_ISREG(mode) else None
        if os.path.realpath(path.parent).startswith("/proc/"):
            return None  # what such a link reads as need not be a path, and whoever holds the file open would lose it
        path = path.parent / os.readlink(path)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
