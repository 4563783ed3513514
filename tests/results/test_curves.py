"""Curves of text tasks: values are those of the records, intervals those of the per-image statistics, on screen and in files."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from result_factory import make_record

from rice_eval.cli.main import main
from rice_eval.errors import RecordError, UsageError
from rice_eval.metrics.text_statistics import TextStatistics, TextSums
from rice_eval.results.curves import curves, edges, reference_curves
from rice_eval.results.record import Metric
from rice_eval.results.store import ResultStore, read_records

HEIGHTS = (5, 10, 20)


def statistics(level: float, seed: int) -> TextStatistics:
    """60 pages with a line of each height, read the better the taller it is."""
    rng = np.random.default_rng(seed)
    sums = TextSums(("one_minus_ned", "cer"))
    for page in range(60):
        for height in HEIGHTS:
            score = float(np.clip(level * height / 20 + rng.normal(0, 0.1), 0, 1))
            sums.add(str(page), (score, 10 * (1 - score)), (1, 10), (f"height {height} px", "turn <2 deg", "on photo"))
    return sums.statistics()


@pytest.fixture
def results(tmp_path: Path) -> Path:
    store = ResultStore(tmp_path)
    for name, level in (("strong", 0.9), ("weak", 0.3)):
        found = statistics(level, 1)
        metrics = {k: Metric(value=v, higher_is_better=k != "cer") for k, v in found.point().items()}
        record = make_record(
            name, "ocr/lines", metric="one_minus_ned", metrics=metrics, per_class=found.per_class()
        )  # fmt: skip
        store.save(record, found)
    store.save(make_record("other", "segmentation/toy"), None)
    return tmp_path


@pytest.mark.parametrize(
    ("group", "wanted"),
    [
        ("height 10 px", (10, 10)), ("height <8 px", (0, 8)), ("height >=48 px", (48, None)), ("height 8-12 px", (8, 12)),
        ("turn 2-7 deg", None), ("on photo", None), ("font Arvo", None), ("heights", None),
    ],
)  # fmt: skip
def test_edges_of_groups(group: str, wanted: tuple[float, float | None] | None) -> None:
    assert edges(group, "height") == wanted


def test_points_are_the_records_values_with_intervals(results: Path) -> None:
    stored = read_records([results])
    points = curves(stored)
    assert [(p.encoder, p.start) for p in points] == [(e, h) for e in ("strong", "weak") for h in HEIGHTS]
    by_name = {s.record.encoder.name: s.record for s in stored}
    for p in points:
        assert p.value == by_name[p.encoder].per_class["one_minus_ned"][p.group]
        assert p.low is not None
        assert p.high is not None
        assert p.low < p.value < p.high
        assert p.high - p.low < 10
    assert {p.metric for p in curves(stored, metric="cer")} == {"cer"}
    assert [p.group for p in curves(stored, kind="turn")] == ["turn <2 deg"] * 2
    with pytest.raises(UsageError, match="no groups of kind 'size'"):
        curves(stored, kind="size")


def test_other_keys_and_other_weights_stay_apart(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = statistics(0.5, 2)
    metrics = {k: Metric(value=v, higher_is_better=k != "cer") for k, v in found.point().items()}
    store = ResultStore(results)
    same = {"metric": "one_minus_ned", "metrics": metrics, "per_class": found.per_class()}
    store.save(make_record("strong", "ocr/lines", weights="b" * 64, **same), found)
    store.save(make_record("strong", "ocr/lines", settings={"steps": 9}, **same), found)
    with pytest.raises(SystemExit):
        main(["curve", str(results)])
    out = capsys.readouterr().out
    assert out.count("one_minus_ned by height · key ") == 2
    first, second = sorted((part.count("strong") for part in out.split("one_minus_ned by height")[1:]), reverse=True)
    assert (first, second) == (2, 1)


def test_without_statistics_there_are_no_intervals_and_damage_is_named(results: Path) -> None:
    files = sorted((results / "records" / "ocr").rglob("*.npz"))
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-9])
    stored = read_records([results])
    assert all(p.low is None for p in curves([s for s in stored if s.record.encoder.name == "strong"]))
    with pytest.raises(RecordError, match="was changed or damaged"):
        curves([s for s in stored if s.record.encoder.name == "weak"])


def test_the_command_prints_tables_csv_and_json(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = {
        "reference": True, "system": "reader", "task": "ocr/lines", "protocol": "linear",
        "groups": {"one_minus_ned": {"height 5 px": 95.0, "height 20 px": 99.0}},
        "group_intervals": {"one_minus_ned": {"height 5 px": [90.0, 97.0]}},
    }  # fmt: skip
    (results / "references").mkdir()
    (results / "references" / "row.json").write_text(json.dumps(reference))

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["curve", str(results), *arguments])
        out = capsys.readouterr()
        assert end.value.code == 0, out.err
        return out.out

    table = run()
    assert "key" not in table
    assert "ocr/lines · linear · one_minus_ned by height" in table
    assert "reader (reference)" in table
    rows = list(csv.DictReader(io.StringIO(run("--format", "csv"))))
    assert [(r["encoder"], r["group"]) for r in rows if r["reference"] == "True"] == [
        ("reader", "height 5 px"), ("reader", "height 20 px"),
    ]  # fmt: skip
    assert float(rows[0]["value"]) == pytest.approx(curves(read_records([results]))[0].value)
    strong = next(s.record for s in read_records([results]) if s.record.encoder.name == "strong")
    assert {(r["key"], r["record"]) for r in rows if r["encoder"] == "strong"} == {
        (strong.comparability_key, strong.identity)
    }
    lines = [json.loads(line) for line in run("--format", "json").splitlines()]
    assert [line["start"] for line in lines] == [float(r["start"]) for r in rows]
    run("--format", "csv", "--output", str(results / "out" / "curve.csv"))
    assert (results / "out" / "curve.csv").read_text() == run("--format", "csv")
    (results / "references" / "row.json").write_text("[]")
    with pytest.raises(RecordError, match="is no reference row"):
        reference_curves([results])
    with pytest.raises(SystemExit) as end:
        main(["curve", str(results), "--group", "contrast"])
    assert end.value.code == 2
