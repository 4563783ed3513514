"""The boards of a page: those of the leaderboard, in the order a reader expects, with every metric of each row."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from rice_eval.results.leaderboard import Board, Leaderboard, Row, build
from rice_eval.results.record import Metric, Record
from rice_eval.results.store import StoredRecord

__all__ = ["first_record", "leaderboard_of", "row_metrics", "sorted_boards"]

_KINDS = ("segmentation", "detection", "regions", "ocr", "mllm")


def leaderboard_of(records: Sequence[tuple[Record, Path]]) -> Leaderboard:
    """The leaderboard of records and the files they came from; see ``rice_eval.results.leaderboard.build``."""
    return build(StoredRecord(path, record) for record, path in records)


def first_record(board: Board) -> Record:
    """A record that stands for the board's task and protocol."""
    return board.rows[0].record


def sorted_boards(board: Leaderboard) -> list[Board]:
    """Known kinds in their usual order, then task, protocol, and views by their numbers."""
    return sorted(board.boards, key=_place)


def _place(board: Board) -> tuple[object, ...]:
    record = first_record(board)
    kind = _KINDS.index(record.task.kind) if record.task.kind in _KINDS else len(_KINDS)
    view = [int(part) if part.isdecimal() else 0 for part in re.split(r"(\d+)", record.view)]
    return kind, record.task.kind, board.task, board.protocol, view, record.view, board.key


def row_metrics(board: Board, row: Row) -> dict[str, Metric]:
    """Every metric of a row: the headline as the leaderboard has it, the others as means over seeds.

    Intervals of the others are those of the record; with several seeds they have none.
    """
    if len(row.records) == 1:
        metrics = dict(row.record.metrics)
    else:
        metrics = {}
        for name, metric in row.record.metrics.items():
            values = [s.record.metrics[name].value for s in row.records if name in s.record.metrics]
            metrics[name] = metric.model_copy(
                update={"value": math.fsum(values) / len(values), "low": None, "high": None}
            )
    headline = metrics[board.metric]
    metrics[board.metric] = headline.model_copy(update={"value": row.value, "low": row.low, "high": row.high})
    return metrics
