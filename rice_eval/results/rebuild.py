"""The leaderboards that are kept beside the records: one command, the same bytes every time."""

from __future__ import annotations

from pathlib import Path

from rice_eval.results.leaderboard import build
from rice_eval.results.store import paused_collector, read_records, write_atomic
from rice_eval.results.tables import latex, long_csv, markdown, wide_csv

__all__ = ["FILES", "leaderboard_texts", "rebuild"]

FILES = {
    "leaderboard.csv": wide_csv,
    "leaderboard-long.csv": long_csv,
    "leaderboard.md": markdown,
    "leaderboard.tex": latex,
}
"""File under ``<results>/leaderboards/`` -> what writes it."""


def leaderboard_texts(results: Path) -> dict[str, str]:
    """File name -> text, from the records under ``results``; RecordError where one of them can't be read."""
    with paused_collector():
        board = build(read_records([results]))
        return {name: write(board) for name, write in FILES.items()}


def rebuild(results: Path) -> list[Path]:
    """Write all of ``FILES``; returns their paths."""
    texts = leaderboard_texts(results)
    folder = results / "leaderboards"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomic(folder / name, text.encode())
    return [folder / name for name in texts]
