"""The bank on disk: one folder an entry, a manifest that alone says what is finished, a lock a shard.

A shard is written to a temporary name, synced and renamed, and only then entered in the manifest with its checksum; what is not in the
manifest does not exist. The file system is the only state: any number of processes, on any number of machines that share
it, may fill one entry. Locks are advisory file locks, which the kernel frees when their owner dies.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from stat import S_ISDIR
from typing import NamedTuple

from filelock import FileLock, Timeout

from rice_eval.bank.key import BankKey
from rice_eval.bank.manifest import Manifest, ShardFacts
from rice_eval.errors import BankError, NotFoundError

__all__ = [
    "BANK_VARIABLE",
    "MANIFEST",
    "Bank",
    "Entry",
    "Pruned",
    "default_bank_root",
    "disk_error",
    "folder_bytes",
    "wait_a_little",
]

BANK_VARIABLE = "RICE_EVAL_BANK"
MANIFEST = "manifest.json"


def default_bank_root() -> Path:
    """``$RICE_EVAL_BANK``, else ``bank`` in the user's cache folder."""
    given = os.environ.get(BANK_VARIABLE)
    if given:
        return Path(given).expanduser()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("rice-eval")) / "bank"


def disk_error(error: OSError, path: Path) -> BankError:
    """One line for a file system that refuses; what was finished before stays."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return BankError(
            f"no room for the bank at {path} ({os.strerror(error.errno)})",
            "free some (rice-eval bank prune --max-size) or give another folder with --bank, then run again: "
            "finished shards stay",
        )
    return BankError(f"the bank at {path} can't be written ({error.strerror or error})", "check the folder's rights")


class Entry:
    """One folder of the bank: shards ``00000.safetensors``, ``manifest.json``, and ``locks/`` while someone writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def shard(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{number:05d}.safetensors"

    def manifest(self) -> Manifest | None:
        """The manifest, or None where there is none that can be read, or another entry's (then nothing in the folder counts)."""
        try:
            found = Manifest.from_json((self.folder / MANIFEST).read_text())
        except (OSError, ValueError, BankError):
            return None
        return found if found.key.digest == self.folder.name else None

    def create(self, manifest: Manifest) -> Manifest:
        """Make the entry if it is not there; returns the manifest on disk, whose ``shard_images`` counts."""
        with self._manifest_lock():
            there = self.manifest()
            if there is not None and there.key == manifest.key and there.images == manifest.images:
                return there
            self._write(manifest)
            return manifest

    def claim(self, number: int) -> FileLock | None:
        """The lock of a shard, or None while another process has it.

        The holder of the lock is the shard's only writer, so temporary files of the shard are left by the dead and removed.
        """
        lock = self._lock(f"{number:05d}.lock")
        try:
            lock.acquire(blocking=False)
        except (Timeout, FileNotFoundError):  # not found: someone tidies up at this moment
            return None
        except OSError as error:
            raise disk_error(error, self.folder) from error
        for stale in self.folder.glob(f"{number:05d}-*.tmp"):
            with suppress(OSError):
                stale.unlink()
        return lock

    @contextmanager
    def writing(self, number: int) -> Iterator[Path]:
        """A temporary path for a shard; it becomes the shard on success and is removed on any failure."""
        temporary = self.folder / f"{number:05d}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
        try:
            yield temporary
            os.replace(temporary, self.shard(number))
            _sync_folder(self.folder)
        except OSError as error:
            raise disk_error(error, self.folder) from error
        finally:
            with suppress(OSError):
                temporary.unlink()

    def add(self, number: int, facts: ShardFacts) -> None:
        """Enter a renamed shard in the manifest."""
        with self._manifest_lock():
            now = self.manifest()
            if now is None:
                raise BankError(f"{self.folder / MANIFEST}: gone or damaged while shards were written", "run again")
            self._write(replace(now, shards={**now.shards, number: facts}))

    def drop(self, number: int) -> None:
        """Take a damaged shard out of the manifest, so that it counts as missing; not if another process mended it."""
        with self._manifest_lock():
            now = self.manifest()
            if now is not None and number in now.shards and self.check(number, now.shards[number]) is not None:
                self._write(replace(now, shards={n: s for n, s in now.shards.items() if n != number}))

    def tidy(self) -> None:
        """Remove locks and temporary files of a finished entry, its own process's or those of the dead.

        Safe beside other processes: whoever has a lock looks at the shard again.
        """
        manifest = self.manifest()
        if manifest is None or not manifest.complete or not (self.folder / "locks").is_dir():
            return
        with suppress(OSError, BankError):
            for number in range(manifest.count):
                lock = self.claim(number)
                if lock is None:
                    return
                lock.release()
            with self._manifest_lock():
                (self.folder / f"{MANIFEST}.tmp").unlink(missing_ok=True)
                shutil.rmtree(self.folder / "locks", ignore_errors=True)

    def touch(self) -> None:
        """Remember that the entry was used now (for ``prune``)."""
        with suppress(OSError):
            os.utime(self.folder / MANIFEST)

    def used(self) -> float:
        """When the entry was used last, in seconds since the epoch."""
        try:
            return (self.folder / MANIFEST).stat().st_mtime
        except OSError:
            return 0.0

    def busy(self) -> bool:
        """Whether a process is writing to the entry; never on a disk that can only be read."""
        for path in sorted((self.folder / "locks").glob("*.lock")):
            lock = FileLock(path, thread_local=False)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                return True
            except FileNotFoundError:  # someone tidies up at this moment
                continue
            except OSError as error:
                if error.errno == errno.EROFS:
                    return False
                raise disk_error(error, self.folder) from error
            lock.release()
        return False

    def check(self, number: int, facts: ShardFacts, *, checksum: bool = True) -> str | None:
        """What is wrong with a shard on disk, in words; None where it is sound."""
        path = self.shard(number)
        try:
            stat = path.stat()
            if stat.st_size != facts.bytes:
                return f"it has {stat.st_size} bytes instead of {facts.bytes}"
            stamp = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, facts.sha256)
            if checksum and stamp not in _SOUND:
                if _sha256(path) != facts.sha256:
                    return "its checksum differs"
                _SOUND.add(stamp)
        except FileNotFoundError:
            return "it is missing"
        except OSError as error:
            return f"it can't be read ({error.strerror})"
        return None

    def trust(self, number: int, facts: ShardFacts) -> None:
        """Remember that this process hashed the shard while writing it."""
        path = self.shard(number)
        with suppress(OSError):
            stat = path.stat()
            _SOUND.add((str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, facts.sha256))

    def _lock(self, name: str) -> FileLock:
        locks = self.folder / "locks"
        try:
            locks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, self.folder) from error
        # The writer thread releases what the main thread acquired.
        return FileLock(locks / name, thread_local=False)

    @contextmanager
    def _manifest_lock(self) -> Iterator[None]:
        for attempt in range(100):
            lock = self._lock("manifest.lock")
            try:
                lock.acquire(poll_interval=0.01)
                break
            except FileNotFoundError as error:  # someone tidies up at this moment
                if attempt == 99:
                    raise disk_error(error, self.folder) from error
            except OSError as error:
                raise disk_error(error, self.folder) from error
        try:
            yield
        finally:
            lock.release()

    def _write(self, manifest: Manifest) -> None:
        temporary = self.folder / f"{MANIFEST}.tmp"
        try:
            with temporary.open("w") as handle:
                handle.write(manifest.to_json())
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, self.folder / MANIFEST)
            _sync_folder(self.folder)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise disk_error(error, self.folder) from error


_KEY = re.compile("[0-9a-f]{64}")

# Shards whose checksum this process has seen to be right: (path, inode, size, mtime, sha256).
_SOUND: set[tuple[str, int, int, int, str]] = set()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; file systems that can't sync folders do it by themselves."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Pruned(NamedTuple):
    """An entry that was deleted, or would be: its key, what it holds (None where its manifest is damaged), its bytes."""

    key: str
    manifest: Manifest | None
    bytes: int


class Bank:
    """A folder of entries.

    Args:
        root: the folder; made when first written to.
        shard_images: images a shard of entries made from here on; None chooses by the size of an image's tokens.
    """

    def __init__(self, root: Path, shard_images: int | None = None) -> None:
        self.root = Path(root)
        self.shard_images = shard_images

    def entry(self, key: BankKey) -> Entry:
        """The folder of a key, whether it is there or not."""
        return Entry(self.root / key.digest[:2] / key.digest)

    def folders(self) -> list[Entry]:
        """Every folder where an entry lies or lay, whether its manifest can be read or not, in the order of their keys."""
        return [Entry(f) for f in sorted(self.root.glob("??/*")) if _KEY.fullmatch(f.name) and f.is_dir()]

    def entries(self) -> list[tuple[Entry, Manifest]]:
        """Every entry with a readable manifest, in the order of their keys."""
        out = []
        for path in sorted(self.root.glob(f"??/*/{MANIFEST}")):
            entry = Entry(path.parent)
            manifest = entry.manifest()
            if manifest is not None:
                out.append((entry, manifest))
        return out

    def strays(self) -> list[tuple[str, str]]:
        """What does not belong in the bank: ``(folder's name, what is wrong)`` of damaged manifests and left-over files."""
        out = []
        for folder in sorted(self.root.glob("??/*")):
            entry = Entry(folder)
            manifest = entry.manifest()
            if manifest is None:
                if not entry.busy():
                    out.append((folder.name, "its manifest is missing or damaged"))
                continue
            if entry.busy():
                continue
            known = {MANIFEST, "locks", "sums", *(entry.shard(n).name for n in manifest.shards)}
            out += [(folder.name, f"{p.name} is left over") for p in sorted(folder.iterdir()) if p.name not in known]
        return out

    def best(self, key: BankKey, images: int) -> Entry:
        """The entry that serves ``key`` with least work: one with all of its layers and most shards, else the key's own."""
        own = self.entry(key)
        manifest = own.manifest()
        if manifest is not None and manifest.complete:
            return own
        others = [(e, m) for e, m in self.entries() if m.images == images and m.shards and m.key.serves(key)]
        if not others:
            return own

        def merit(pair: tuple[Entry, Manifest]) -> tuple[float, bool, int]:
            entry, found = pair
            return len(found.shards) / max(1, found.count), entry.folder == own.folder, -len(found.key.layers)

        return max(others, key=merit)[0]

    def find(self, prefix: str) -> tuple[Entry, Manifest]:
        """The one entry whose key starts with ``prefix``.

        Raises:
            NotFoundError: none or several.
        """
        found = [(e, m) for e, m in self.entries() if e.folder.name.startswith(prefix.lower())]
        if len(found) != 1:
            count, starts = (f"{len(found)} entries", "start") if found else ("no entry", "starts")
            raise NotFoundError(f"{count} of the bank at {self.root} {starts} with '{prefix}'", "see rice-eval bank ls")
        return found[0]

    def remove(self, entry: Entry) -> None:
        """Delete an entry. Readers that have it mapped keep what they mapped.

        Raises:
            BankError: another process is writing to it.
        """
        if entry.busy():
            raise BankError(f"{entry.folder}: another process is writing to it", "wait for it to finish")
        grave = self.root / f".removed-{entry.folder.name[:12]}-{uuid.uuid4().hex[:8]}"
        try:
            os.replace(entry.folder, grave)
        except OSError as error:
            raise disk_error(error, entry.folder) from error
        shutil.rmtree(grave, ignore_errors=True)
        with suppress(OSError):
            entry.folder.parent.rmdir()

    def prune(self, max_bytes: int, *, dry_run: bool = False) -> list[Pruned]:
        """Delete entries until the rest fits: those with a damaged manifest first, then the least recently used.

        Entries that are being written are passed over, and so are links to folders that lie elsewhere: deleting a link would make no room.

        Returns:
            what was deleted, or would be.
        """
        if not dry_run:
            for grave in self.root.glob(".removed-*"):
                shutil.rmtree(grave, ignore_errors=True)
        here = [
            (e, e.manifest()) for e in self.folders() if not (e.folder.is_symlink() or e.folder.parent.is_symlink())
        ]
        here.sort(key=lambda pair: (pair[1] is not None, pair[0].used(), pair[0].folder.name))
        total = sum(folder_bytes(e.folder) for e, _ in here)
        out = []
        for entry, manifest in here:
            if total <= max_bytes:
                break
            if entry.busy():
                continue
            size = folder_bytes(entry.folder)
            if not dry_run:
                self.remove(entry)
            total -= size
            out.append(Pruned(entry.folder.name, manifest, size))
        return out


def folder_bytes(folder: Path) -> int:
    """Bytes of all files under a folder; of a link, not of what it points to."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            stat = path.lstat()
            total += 0 if S_ISDIR(stat.st_mode) else stat.st_size
    return total


def wait_a_little(tries: int) -> None:
    """Sleep before looking again at what another process does: 50 ms at first, a second at most."""
    time.sleep(min(1.0, 0.05 * 1.5**tries))
