"""The leaderboards in ``results/`` are what its records give; rewrite them with ``rice-eval results rebuild``."""

from __future__ import annotations

from pathlib import Path

import pytest
from result_factory import make_record, make_statistics

from rice_eval.results.rebuild import FILES, leaderboard_texts, rebuild
from rice_eval.results.store import ResultStore, record_files
from rice_eval.results.validate import validate

RESULTS = Path(__file__).parents[2] / "results"
HAS_RECORDS = (RESULTS / "records").is_dir() and bool(record_files(RESULTS))


@pytest.mark.skipif(not HAS_RECORDS, reason="no records in results/")
def test_committed_records_hold() -> None:
    assert [str(c.problem) for c in validate([RESULTS]) if c.problem is not None] == []


@pytest.mark.skipif(not HAS_RECORDS, reason="no records in results/")
def test_committed_leaderboards_are_current() -> None:
    for name, text in leaderboard_texts(RESULTS).items():
        assert (RESULTS / "leaderboards" / name).read_text(encoding="utf-8") == text, name


def test_rebuild_is_byte_identical(tmp_path: Path) -> None:
    for name in ("a", "b"):
        statistics = make_statistics(seed=len(name))
        ResultStore(tmp_path).save(make_record(name, value=statistics.point()["accuracy"]), statistics)
    first = {p.name: p.read_bytes() for p in rebuild(tmp_path)}
    assert set(first) == set(FILES)
    assert {p.name: p.read_bytes() for p in rebuild(tmp_path)} == first
