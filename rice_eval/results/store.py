"""The store: a folder of records and of the per-image statistics beside them.

``<root>/records/<task>/<encoder>/<protocol>-<hash8>-<identity8>.json`` and, next to each, ``….<sha8>.npz``. A record is in
the store when its JSON is there: statistics are written first, under a name of their content, so that a process killed at
any point leaves the earlier record as it was.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from rice_eval.errors import RecordError
from rice_eval.metrics.statistics import Statistics
from rice_eval.results.arrays import pack
from rice_eval.results.files import slug, write_atomic, write_output, writing
from rice_eval.results.reading import (
    MIGRATIONS,
    StoredRecord,
    check_protocol,
    iter_records,
    load_record,
    load_statistics,
    migrate,
    paused_collector,
    read_records,
    record_files,
)
from rice_eval.results.record import Record, StatisticsFile, record_text

__all__ = [
    "MIGRATIONS",
    "ResultStore",
    "StoredRecord",
    "iter_records",
    "load_record",
    "load_statistics",
    "migrate",
    "paused_collector",
    "read_records",
    "record_files",
    "slug",
    "write_atomic",
    "write_output",
    "writing",
]

_log = logging.getLogger("rice_eval")


class ResultStore:
    """Records under one root folder, which is made on the first save."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def path_of(self, record: Record) -> Path:
        """Where ``save`` puts this record."""
        task = Path(*(slug(part) for part in record.task.name.split("/")))
        name = f"{slug(record.protocol.id)}-{record.protocol.hash[:8]}-{record.identity[:8]}.json"
        return self.root / "records" / task / slug(record.encoder.name) / name

    def save(self, record: Record, statistics: Statistics | None, files: Mapping[str, bytes] | None = None) -> Path:
        """Write a record and its statistics; a record of the same run (encoder, weights, key, seeds) is replaced.

        Args:
            record: ``statistics``, ``digests`` and ``sha256`` are filled in here.
            statistics: per-image statistics, None where the protocol has none.
            files: kept in the record's ``.files`` folder (name -> bytes), their checksums in the record.

        Returns:
            The record's path.

        Raises:
            RecordError: another run's record, or a file that is no record, is already there under this name; values that
                JSON can't hold; statistics that disagree with the record.
        """
        from filelock import FileLock

        path = self.path_of(record)
        packed = None
        if statistics is not None:
            packed = pack(statistics.arrays())
            digest = hashlib.sha256(packed).hexdigest()
            entry = StatisticsFile(
                file=f"{path.stem}.{digest[:8]}.npz", kind=statistics.kind, sha256=digest, images=len(statistics)
            )
            record = record.model_copy(update={"statistics": entry})
        if files:
            sums = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
            record = record.model_copy(update={"files": sums})
        try:
            sealed = record.sealed()
            text = record_text(sealed.model_dump(mode="json"))
        except ValueError as error:
            raise RecordError(
                f"{path}: a value can't be written as JSON ({error})", "report infinite and NaN values as None"
            ) from error
        check_protocol(sealed, path)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path), FileLock(str(self.root / "records" / ".lock")):
            if path.exists():
                _announce(load_record(path), sealed, path)
            if packed is not None and sealed.statistics is not None:
                write_atomic(path.with_name(sealed.statistics.file), packed)
            for name, data in (files or {}).items():
                path.with_suffix(".files").mkdir(exist_ok=True)
                write_atomic(path.with_suffix(".files") / name, data)
            write_atomic(path, text.encode())
            for stale in path.parent.glob(f"{path.stem}.*.npz"):
                if sealed.statistics is None or stale.name != sealed.statistics.file:
                    stale.unlink()
        return path

    def check_writable(self) -> None:
        """Refuse a folder that no record can be written to, before hours of work; makes nothing.

        Raises:
            RecordError: the root, or what it would be made in, is no folder or can't be written.
        """
        for folder in (self.root / "records", *(self.root, *self.root.absolute().parents)):
            if not os.path.lexists(folder):
                continue
            if not folder.is_dir():
                raise RecordError(f"results folder {self.root}: {folder} is not a folder", "give another one")
            if not os.access(folder, os.W_OK | os.X_OK):
                raise RecordError(
                    f"results folder {self.root}: {folder} can't be written",
                    "check its permissions, or give another one",
                )
            return

    def load(self, path: Path | str) -> Record:
        """See ``load_record``."""
        return load_record(path)

    def load_statistics(self, record: Record, path: Path | str) -> Statistics:
        """See ``load_statistics``."""
        return load_statistics(record, path)

    def __iter__(self) -> Iterator[StoredRecord]:
        return iter_records([self.root])


def _announce(old: Record, new: Record, path: Path) -> None:
    if old.identity != new.identity:
        raise RecordError(
            f"{path}: already holds the record of another run ({old.encoder.name} on {old.task.name})",
            "write to another results folder",
        )
    for name, metric in old.metrics.items():
        if name in new.metrics and new.metrics[name].value != metric.value:
            _log.warning(
                "%s: the same run gave %s = %.6g before and %.6g now; the record is replaced",
                path, name, metric.value, new.metrics[name].value,
            )  # fmt: skip
