"""Reading records: schema, version and hash are checked, older versions are migrated, statistics are loaded beside them."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rice_eval.cards import first_problem
from rice_eval.errors import RecordError
from rice_eval.metrics.statistics import Statistics, statistics_from_arrays
from rice_eval.results.arrays import unpack
from rice_eval.results.record import SCHEMA_VERSION, Record, field_digests, seal, settings_hash, text_sha256

__all__ = [
    "MIGRATIONS",
    "StoredRecord",
    "check_protocol",
    "iter_records",
    "load_record",
    "load_statistics",
    "migrate",
    "paused_collector",
    "read_records",
    "record_files",
]

Plain = dict[str, Any]

MIGRATIONS: dict[int, Callable[[Plain], Plain]] = {}
"""Schema version v -> function that turns the plain JSON of a record of version v into one of version v + 1."""

_RERUN = "run the evaluation again, or restore the file"


@dataclass(frozen=True)
class StoredRecord:
    """A record and the file it came from."""

    path: Path
    record: Record

    def statistics(self) -> Statistics:
        """Its per-image statistics; RecordError where there are none."""
        return load_statistics(self.record, self.path)


_SEAL = re.compile(rb'\n "sha256": "([0-9a-f]{64})"')  # one blank of indent: only the top level's


def load_record(path: Path | str) -> Record:
    """Read one record and check it: version, schema, hash.

    An older schema version is migrated in memory.

    Raises:
        RecordError: names the file and the field that is unknown, missing, edited or of a newer version.
    """
    path = Path(path)
    data = _read(path)
    match = _SEAL.search(data)
    if match is not None:
        # The common case, fast: the bytes are as the store wrote them.
        start, end = match.span(1)
        if hashlib.sha256(data[:start] + data[end:]).hexdigest().encode() == match[1]:
            try:
                record = Record.model_validate_json(data, strict=True)
            except ValidationError:
                pass  # an older or newer version, or a file sealed by something else: say what is wrong below
            else:
                check_protocol(record, path)
                return record
    return _load_slowly(path, data)


def _read(path: Path) -> bytes:
    try:
        # Not blocking: a named pipe nobody writes to would keep us here for ever.
        with open(path, "rb", buffering=0, opener=_open) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.readall()
    except OSError as error:
        raise RecordError(f"{path}: can't be read ({error.strerror})", "check the path and its permissions") from error
    raise RecordError(f"{path}: is no regular file", "move it out of the folder of records")


_NONBLOCK = getattr(os, "O_NONBLOCK", 0)


def _open(name: str, flags: int) -> int:
    return os.open(name, flags | _NONBLOCK)


def _load_slowly(path: Path, data: bytes) -> Record:
    """Any file: an edited one, one laid out anew by an editor, an older version, or none of ours."""
    try:
        content = json.loads(data, object_pairs_hook=_refuse_twins)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}: is not JSON ({error})", _RERUN) from error
    if not isinstance(content, dict) or "schema_version" not in content:
        raise RecordError(
            f"{path}: is not a record: it has no field 'schema_version'", "move it out of the folder of records"
        )
    version = content["schema_version"]
    if not isinstance(version, int) or isinstance(version, bool):
        raise RecordError(f"{path}: field 'schema_version' is {version!r}, not a whole number", _RERUN)
    odd = _not_finite(content)
    if odd is not None:
        raise RecordError(f"{path}: field '{odd[0]}' is {odd[1]}, which JSON does not know", _RERUN)
    if version > SCHEMA_VERSION:
        raise RecordError(
            f"{path}: field 'schema_version' is {version}, newer than the {SCHEMA_VERSION} this version of rice-eval knows",
            "upgrade rice-eval",
        )
    if version < SCHEMA_VERSION:
        _check_hash(content, path)
        content = migrate(content, path)
    try:
        # Strict JSON mode: "45.1" is not a number here, while a list still is a tuple.
        record = Record.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise RecordError(
            f"{path}: {first_problem(error)}", f"fields of a record: {', '.join(Record.model_fields)}"
        ) from error
    _check_hash(content, path)
    check_protocol(record, path)
    return record


def _refuse_twins(pairs: list[tuple[str, Any]]) -> Plain:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field '{twin}' is there twice")
    return content


def _not_finite(value: Any, name: str = "") -> tuple[str, float] | None:
    """The first NaN or infinity in plain JSON values, and where it is."""
    if isinstance(value, float):
        return None if math.isfinite(value) else (name, value)
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        odd = _not_finite(part, f"{name}.{key}" if name else str(key))
        if odd is not None:
            return odd
    return None


_HASHES: dict[tuple[str, int, str], str] = {}
_HASHES_KEPT = 1000  # protocols are few and records many


def check_protocol(record: Record, path: Path) -> None:
    protocol = record.protocol
    known = (protocol.id, protocol.version, repr(protocol.settings))
    expected = _HASHES.get(known)
    if expected is None:
        expected = settings_hash(protocol.id, protocol.version, protocol.settings)
        if len(_HASHES) < _HASHES_KEPT:
            _HASHES[known] = expected
    if protocol.hash != expected:
        raise RecordError(
            f"{path}: field 'protocol.hash' is {protocol.hash}, but the protocol's id, version and settings give {expected}",
            _RERUN,
        )


def _check_hash(content: Plain, path: Path) -> None:
    try:
        if text_sha256(content) == content.get("sha256"):
            return
        now = field_digests(content)
    except (ValueError, AttributeError, TypeError) as error:  # lone surrogates, infinities, fields of the wrong kind
        raise RecordError(f"{path}: its hash can't be checked ({error})", _RERUN) from error
    stored = content.get("digests")
    stored = stored if isinstance(stored, dict) else {}
    edited = sorted(name for name in {*stored, *now} if stored.get(name) != now.get(name))
    if edited and text_sha256({**content, "digests": now}) == content.get("sha256"):
        edited = [f"digests.{name}" for name in edited]  # with the digests that its fields give the hash is right
    if not edited:
        raise RecordError(f"{path}: field 'sha256' was edited: it does not match the record", _RERUN)
    names = ", ".join(f"'{name}'" for name in edited[:5]) + (", …" if len(edited) > 5 else "")
    raise RecordError(f"{path}: field {names} was edited after the run: the record's hash does not match", _RERUN)


def migrate(content: Plain, path: Path) -> Plain:
    """The plain JSON of an older record, brought to the current version and sealed anew.

    Raises:
        RecordError: there is no way from its version.
    """
    for version in range(content["schema_version"], SCHEMA_VERSION):
        if version not in MIGRATIONS:
            raise RecordError(
                f"{path}: field 'schema_version' is {version}, which nothing migrates", "run the evaluation again"
            )
        content = {**MIGRATIONS[version](content), "schema_version": version + 1}
    digests, digest = seal(content)
    return {**content, "digests": digests, "sha256": digest}


def load_statistics(record: Record, path: Path | str) -> Statistics:
    """The per-image statistics beside the record at ``path``.

    Raises:
        RecordError: there are none, or the file is missing, damaged, or of an unknown kind.
    """
    path = Path(path)
    entry = record.statistics
    if entry is None:
        raise RecordError(f"{path}: the record has no per-image statistics", "run the evaluation again")
    file = path.with_name(Path(entry.file).name)
    data = _read(file)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise RecordError(f"{file}: was changed or damaged: its sha256 is not the record's 'statistics.sha256'", _RERUN)
    try:
        statistics = statistics_from_arrays(entry.kind, unpack(data))
    except KeyError as error:
        raise RecordError(
            f"{path}: field 'statistics.kind': {error}", "install the package that defines this kind of statistics"
        ) from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RecordError(f"{file}: is no statistics file ({error})", _RERUN) from error
    if len(statistics) != entry.images:
        raise RecordError(
            f"{path}: field 'statistics.images' is {entry.images}, but {file.name} holds {len(statistics)}", _RERUN
        )
    return statistics


def iter_records(roots: Iterable[Path | str]) -> Iterator[StoredRecord]:
    """Every record under the roots, checked, in the order of their paths.

    Args:
        roots: record files, results folders (only their ``records/`` is searched), or plain folders of records.

    Raises:
        RecordError: a root that does not exist or holds no record; any record that does not pass ``load_record``.
    """
    seen: set[Path] = set()
    for root in map(Path, roots):
        files = record_files(root)
        if not files:
            raise RecordError(f"{root}: holds no records", "point at a results folder, or run rice-eval run first")
        for path in files:
            if path not in seen:
                seen.add(path)
                yield StoredRecord(path, load_record(path))


def read_records(roots: Iterable[Path | str]) -> list[StoredRecord]:
    """All of ``iter_records`` at once; much faster than collecting it where there are tens of thousands."""
    with paused_collector():
        return list(iter_records(roots))


@contextmanager
def paused_collector() -> Iterator[None]:
    """No cyclic garbage collection inside: records hold no cycles, and walking tens of thousands of them over and over costs
    more than reading them."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def record_files(root: Path) -> list[Path]:
    """Paths of the records under ``root``, sorted; RecordError where ``root`` does not exist."""
    if root.exists() and not root.is_dir():
        return [root]
    if not root.is_dir():
        raise RecordError(f"{root}: does not exist", "point at a results folder or a record file")
    folder = root / "records" if (root / "records").is_dir() else root
    found: list[str] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [os.path.join(parent, n) for n in names if n.endswith(".json") and not n.startswith(".")]
    return [Path(name) for name in sorted(found)]  # sorted as text: comparing paths costs more than reading them
