"""What a results folder shows the world: leaderboards as CSV and Markdown, and the page."""

from __future__ import annotations

from pathlib import Path

from rice_eval.report.html import write_report
from rice_eval.results.leaderboard import build
from rice_eval.results.store import iter_records, write_atomic, writing
from rice_eval.results.tables import long_csv, markdown, wide_csv

__all__ = ["publish"]


def publish(results: Path, title: str = "Dense vision encoders") -> dict[str, Path]:
    """Write ``leaderboard.csv``, ``leaderboard-long.csv``, ``leaderboard.md`` and ``report.html`` from the records in ``results``.

    Returns:
        what -> file.
    """
    stored = list(iter_records([results]))
    board = build(stored)
    files = {
        "leaderboard": (results / "leaderboard.csv", wide_csv(board)),
        "long form": (results / "leaderboard-long.csv", long_csv(board)),
        "markdown": (results / "leaderboard.md", markdown(board)),
    }
    for path, text in files.values():
        with writing(path):
            write_atomic(path, text.encode())
    page = write_report([(s.record, s.path) for s in stored], results / "report.html", title)
    return {**{label: path for label, (path, _) in files.items()}, "page": page}
