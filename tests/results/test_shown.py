"""Records of a run on the terminal: many metrics stand below each other, controls beside what they control."""

from __future__ import annotations

from pathlib import Path

import pytest
from result_factory import make_record

from rice_eval.cli.shown import show_results
from rice_eval.results.record import Metric
from rice_eval.run import Result

KINDS = ("accuracy", *(f"accuracy_{kind}" for kind in ("presence", "counting", "colour", "position", "reading", "box")))


def _result(encoder: str, shift: float) -> Result:
    told = {
        f"{control}{name}": Metric(value=shift + 10 * n, low=0.0, high=99.0)
        for control, shift in (("", shift), ("blind_", 1.0))
        for n, name in enumerate(KINDS)
    }
    record = make_record(encoder, "mllm/toy", metrics=told, seconds={"total": 12.5})
    return Result(record, Path("r.json"))


def _table(text: str) -> dict[str, list[str]]:
    rows = [line.split() for line in text.replace(" [0.0, 99.0]", "").splitlines() if line.strip()]
    return {row[0]: row[1:] for row in rows[3:]}


def test_many_metrics_are_rows_with_controls_beside_them(capsys: pytest.CaptureFixture[str]) -> None:
    many = {f"extra_{n}": Metric(value=n) for n in range(4)}
    results = [_result("one", 20.0), _result("two", 30.0)]
    results = [Result(r.record.model_copy(update={"metrics": {**r.record.metrics, **many}}), r.path) for r in results]
    show_results(results, as_json=False)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) < 140
    rows = _table(text)
    assert rows["accuracy"] == ["30.00", "1.00", "20.00", "1.00"]  # better first
    assert rows["accuracy_box"] == ["90.00", "61.00", "80.00", "61.00"]
    assert rows["extra_3"] == ["3.00", "3.00"]
    assert rows["seconds"] == ["12.5", "12.5"]
    assert "blind_accuracy" not in text


def test_two_records_of_one_name_each_keep_their_line(capsys: pytest.CaptureFixture[str]) -> None:
    many = {f"extra_{n}": Metric(value=n) for n in range(15)}
    results = [_result("same", shift) for shift in (20.0, 30.0)]
    results = [Result(r.record.model_copy(update={"metrics": {**r.record.metrics, **many}}), r.path) for r in results]
    show_results(results, as_json=False)
    text = capsys.readouterr().out
    assert "30.00 [0.0, 99.0]" in text
    assert "20.00 [0.0, 99.0]" in text
