"""Checks of whole folders: every record against its schema, its hash and its own statistics; migration of older files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rice_eval.errors import RecordError
from rice_eval.results.record import SCHEMA_VERSION, Record, record_text
from rice_eval.results.store import load_record, load_statistics, record_files, write_atomic

__all__ = ["Checked", "migrate_files", "record_schema", "schema_text", "validate"]

_TOLERANCE = 1e-6
"""Relative difference between a record's metric and its statistics': far above a sum's rounding, far below a digit shown."""


@dataclass(frozen=True)
class Checked:
    """A record file and what is wrong with it; None where nothing is."""

    path: Path
    problem: RecordError | None


def validate(roots: Iterable[Path]) -> Iterator[Checked]:
    """Check every record under the roots: ``load_record``, its statistics file, and every metric against the statistics.

    Raises:
        RecordError: a root that does not exist or holds no record.
    """
    for root in roots:
        files = record_files(root)
        if not files:
            raise RecordError(f"{root}: holds no records", "point at a results folder")
        for path in files:
            try:
                check_file(path)
            except RecordError as error:
                yield Checked(path, error)
            else:
                yield Checked(path, None)


def check_file(path: Path) -> Record:
    """The record at ``path`` if all of it holds together; RecordError otherwise."""
    record = load_record(path)
    if record.statistics is None:
        return record
    statistics = load_statistics(record, path)
    point = statistics.point()
    for name, metric in record.metrics.items():
        if name not in point:
            continue
        if not math.isclose(point[name], metric.value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
            raise RecordError(
                f"{path}: field 'metrics.{name}.value' is {metric.value:.6f}, but its statistics give {point[name]:.6f}",
                "run the evaluation again",
            )
    if record.metric not in point:
        raise RecordError(
            f"{path}: field 'metric' is '{record.metric}', which its statistics don't give", "run the evaluation again"
        )
    return record


def migrate_files(roots: Iterable[Path]) -> list[Path]:
    """Rewrite every record of an older schema version in the current one; returns the paths rewritten.

    Raises:
        RecordError: a record that can't be read or migrated; files before it are rewritten already.
    """
    changed = []
    for root in roots:
        for path in record_files(root):
            record = load_record(path)
            if json.loads(path.read_bytes())["schema_version"] != SCHEMA_VERSION:
                write_atomic(path, record_text(record.model_dump(mode="json")).encode())
                changed.append(path)
    return changed


def record_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a record."""
    schema = Record.model_json_schema()
    # These have defaults in Python, where a record is made before it is sealed; a file without them is refused.
    schema["required"] = sorted({*schema["required"], "schema_version", "digests", "sha256"})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def schema_text() -> str:
    """``record_schema`` as the text of ``docs/record.schema.json``."""
    return json.dumps(record_schema(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
