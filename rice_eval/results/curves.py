"""Curves of text tasks: a metric against the height of a character, the turn, the length or the contrast of lines."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from rice_eval.errors import RecordError, UsageError
from rice_eval.metrics.statistics import RatioStatistics
from rice_eval.metrics.text_statistics import TextStatistics
from rice_eval.results.bootstrap import in_range, intervals
from rice_eval.results.record import Record
from rice_eval.results.store import StoredRecord

__all__ = [
    "KINDS",
    "Point",
    "curve_metric",
    "curves",
    "curves_csv",
    "curves_json",
    "edges",
    "group_intervals",
    "reference_curves",
    "spans",
]

KINDS = {"height": "px", "turn": "deg", "length": "characters", "contrast": "of 255"}
"""Kinds of groups that have a place on a line, and their units."""

_GROUP = re.compile(r"(?P<kind>[a-z]+) (?P<sign><|>=)?(?P<low>\d+(?:\.\d+)?)(?:-(?P<high>\d+(?:\.\d+)?))?(?: .*)?")


@dataclass(frozen=True)
class Point:
    """A value of one group of lines.

    Attributes:
        key: the record's comparability key: rows of different keys must not be set beside each other. Empty, as ``view`` and
            ``seeds``, for a reference system, which belongs to every key of its task and protocol.
        record: the record's identity, so that weights of one encoder's name stay apart; empty for a reference system.
        task, protocol, view, encoder, seeds: what was run.
        reference: whether the row is of an OCR system and not of an encoder.
        metric: its name; ``value``, ``low`` and ``high`` are in its unit, the interval over test images.
        group: the group's name.
        start, end: the group's edges; equal where it is one number, ``end`` None where it has no upper one.
    """

    key: str
    record: str
    task: str
    protocol: str
    view: str
    encoder: str
    seeds: str
    reference: bool
    metric: str
    group: str
    start: float
    end: float | None
    value: float
    low: float | None
    high: float | None


def edges(group: str, kind: str) -> tuple[float, float | None] | None:
    """``start`` and ``end`` of a group's name (``height 8-12 px``); None where it is of another kind or has no number."""
    match = _GROUP.fullmatch(group)
    if match is None or match["kind"] != kind:
        return None
    low = float(match["low"])
    if match["sign"] == "<":
        return 0.0, low
    if match["sign"] == ">=":
        return low, None
    return low, float(match["high"] or low)


def curve_metric(record: Record) -> str | None:
    """The metric a record's curve shows unless another is asked for: the headline, else recall, else its first with groups."""
    names = [*dict.fromkeys((record.metric, "recall", *record.per_class))]
    return next((name for name in names if record.per_class.get(name)), None)


def group_intervals(
    statistics: TextStatistics, metrics: Sequence[str], resamples: int = 2000
) -> dict[str, dict[str, tuple[float, float]]]:
    """Intervals over images of every group that has one: metric -> group -> (low, high)."""
    out: dict[str, dict[str, tuple[float, float]]] = {}
    for metric in metrics:
        found = intervals(_met(statistics.by_group(metric)), resamples=resamples)
        out[metric] = {
            group: in_range(metric, low, high) for group, (low, high) in found.items() if low == low and high == high
        }
    return out


def spans(
    stored: StoredRecord, metrics: Sequence[str], resamples: int = 2000
) -> dict[str, dict[str, tuple[float, float]]]:
    """``group_intervals`` of a record; empty where no per-image statistics lie beside it.

    Raises:
        RecordError: the statistics are damaged.
    """
    entry = stored.record.statistics
    if entry is None or entry.kind != TextStatistics.kind or not stored.path.with_name(entry.file).exists():
        return {}
    statistics = stored.statistics()
    assert isinstance(statistics, TextStatistics)
    return group_intervals(statistics, metrics, resamples)


def _met(statistics: RatioStatistics) -> RatioStatistics:
    """Without the groups that no image has: they would only be undefined."""
    keep = np.flatnonzero((statistics.denominators > 0).any(axis=0))
    return RatioStatistics(
        statistics.image_ids,
        statistics.numerators[:, keep],
        statistics.denominators[:, keep],
        tuple(statistics.metrics[k] for k in keep),
    )


def curves(stored: Iterable[StoredRecord], kind: str = "height", metric: str | None = None) -> list[Point]:
    """Points of every record that has groups of the kind, in the order of task, protocol, encoder and place.

    Args:
        stored: records.
        kind: one of ``KINDS``.
        metric: a metric that has groups; ``curve_metric`` by default. Records that lack it have no points.

    Raises:
        UsageError: an unknown kind.
    """
    _check_kind(kind)
    points = []
    for entry in stored:
        record = entry.record
        name = metric or curve_metric(record)
        places = {g: e for g in record.per_class.get(name or "", {}) if (e := edges(g, kind)) is not None}
        if name is None or not places:
            continue
        bounds = spans(entry, [name]).get(name, {})
        key = record.comparability_key
        for group, (start, end) in places.items():
            value = record.per_class[name][group]
            if value is not None:
                points.append(
                    Point(
                        key,
                        record.identity_of(key),
                        record.task.name,
                        record.protocol.id,
                        record.view,
                        record.encoder.name,
                        "+".join(map(str, record.seeds)),
                        False,
                        name,
                        group,
                        start,
                        end,
                        value,
                        *bounds.get(group, (None, None)),
                    )
                )
    return sorted(points, key=_place)


def reference_curves(roots: Iterable[Path], kind: str = "height", metric: str | None = None) -> list[Point]:
    """The same of the OCR systems whose rows lie in ``references`` below results folders.

    Args:
        roots: results folders.
        kind: one of ``KINDS``.
        metric: as in ``curves``; 1-NED, else recall, by default.

    Raises:
        RecordError: a file that is no reference row.
    """
    _check_kind(kind)
    points = []
    for path in sorted(p for root in roots for p in (root / "references").glob("*.json")):
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            groups, intervals_of = row["groups"], row.get("group_intervals", {})
            name = metric or next((m for m in ("one_minus_ned", "recall") if groups.get(m)), None)
            for group, value in groups.get(name, {}).items():
                place = edges(group, kind)
                if place is not None and value is not None:
                    low, high = intervals_of.get(name, {}).get(group, (None, None))
                    points.append(
                        Point(
                            "",
                            "",
                            row["task"],
                            row["protocol"],
                            "",
                            row["system"],
                            "",
                            True,
                            str(name),
                            group,
                            *place,
                            value,
                            low,
                            high,
                        )
                    )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecordError(f"{path}: is no reference row ({error})", "run rice-eval ocr-reference again") from error
    return sorted(points, key=_place)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise UsageError(f"no groups of kind '{kind}'", f"choose {', '.join(KINDS)}")


def _place(point: Point) -> tuple[str, str, str, str, bool, str, str, float]:
    return point.task, point.protocol, point.view, point.key, point.reference, point.encoder, point.record, point.start


def curves_csv(points: Sequence[Point]) -> str:
    """One row a point; floats as Python's shortest repr."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([f.name for f in fields(Point)])
    for point in points:
        writer.writerow(["" if v is None else v for v in asdict(point).values()])
    return buffer.getvalue()


def curves_json(points: Sequence[Point]) -> str:
    """One JSON object a line, a point each."""
    return "".join(json.dumps(asdict(point), ensure_ascii=False) + "\n" for point in points)
