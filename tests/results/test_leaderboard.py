"""Leaderboards: ranks, seeds, byte identity, text forms, hostile names."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from result_factory import make_record, make_statistics

from rice_eval.errors import RecordError, UsageError
from rice_eval.results import tables
from rice_eval.results.leaderboard import build
from rice_eval.results.published import Reference
from rice_eval.results.ranks import borda, competition_ranks, mean_win_rate, rank_intervals
from rice_eval.results.record import Metric
from rice_eval.results.runs import of_encoder
from rice_eval.results.store import ResultStore, StoredRecord, iter_records, read_records

HOSTILE = [
    "<script>alert(1)</script>",
    "quo\"te's",
    "new\nline",
    "\u202eright-to-left",
    "a|b`c*d_e",
    "\\end{tabular} & % $ # _ ^ ~",
    "=1+1",
]


def stored(*records: object) -> list[StoredRecord]:
    return [StoredRecord(Path(f"{k}.json"), r) for k, r in enumerate(records)]  # type: ignore[arg-type]


def three() -> list[StoredRecord]:
    return stored(
        make_record("a", value=70, low=69, high=71),
        make_record("b", value=72, low=71, high=73),
        make_record("c", value=50, low=49, high=51),
        make_record("a", task="detection/x", metric="ap", value=30, low=29, high=31),
        make_record("b", task="detection/x", metric="ap", value=20, low=19, high=21),
    )


def test_ranks_and_standings() -> None:
    found = build(three())
    assert [b.name for b in found.boards] == ["detection/x", "segmentation/toy"]
    board = found.boards[1]
    assert [(r.encoder, r.rank) for r in board.rows] == [("b", 1), ("a", 2), ("c", 3)]
    assert board.rows[2].ranks == (3, 3)
    assert board.method == "intervals"
    standing = {s.encoder: s for s in found.standings}
    assert standing["a"].mean_win_rate == pytest.approx((100 + 50) / 2)
    assert standing["b"].mean_win_rate == pytest.approx((0 + 100) / 2)
    assert standing["c"].borda == 0
    assert [s.encoder for s in found.standings] == ["a", "b", "c"]


def test_lower_is_better() -> None:
    found = build(
        stored(*(make_record(n, metric="cer", value=v, low=v - 1, high=v + 1) for n, v in (("a", 30.0), ("b", 10.0))))
    )
    assert [r.encoder for r in found.boards[0].rows] == ["b", "a"]


def test_ranks_only_inside_a_key() -> None:
    found = build(
        stored(make_record("a"), make_record("b", settings={"view": "square=512"}), make_record("c", metric="miou"))
    )
    assert len(found.boards) == 3
    assert len({b.name for b in found.boards}) == 3
    assert all(len(b.rows) == 1 and b.rows[0].rank == 1 for b in found.boards)


def test_seeds_are_one_row_and_widen_it() -> None:
    found = build(stored(*(make_record("a", value=70 + s, low=69 + s, high=71 + s, seed=s) for s in range(3))))
    row = found.boards[0].rows[0]
    assert row.value == pytest.approx(71)
    assert row.seed_sd == pytest.approx(1)
    assert row.seeds == (0, 1, 2)
    assert row.low is not None
    assert row.high is not None
    assert row.low < 70
    assert row.high > 72
    assert row.low + row.high == pytest.approx(142)


def test_two_weights_of_one_name_are_two_rows() -> None:
    found = build(stored(make_record("a"), make_record("a", weights="b" * 64, value=60)))
    assert [r.encoder for r in found.boards[0].rows] == ["a@aaaaaaaa", "a@bbbbbbbb"]


def test_the_same_run_twice(tmp_path: Path) -> None:
    assert len(build(stored(make_record(), make_record())).boards[0].rows) == 1
    with pytest.raises(RecordError, match="two records of the same run"):
        build(stored(make_record(), make_record(value=71)))


def test_paired_ranks_read_statistics(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    base = make_statistics(seed=0)
    for name, gain in (("a", 0.0), ("b", 1.0), ("c", 0.0)):
        statistics = type(base)(base.image_ids, np.clip(base.numerators + gain, 0, 10), base.denominators, base.metrics)
        value = statistics.point()["accuracy"]
        # Wide intervals: only the pairing tells b from the others.
        store.save(make_record(name, value=value, low=value - 20, high=value + 20), statistics)
    found = build(iter_records([tmp_path]))
    board = found.boards[0]
    assert board.method == "paired"
    ranks = {r.encoder: (r.rank, r.ranks, r.near_best) for r in board.rows}
    assert ranks["b"] == (1, (1, 1), True)
    assert ranks["a"] == ranks["c"] == (2, (2, 2), False)
    blurred = build(iter_records([tmp_path]), "intervals").boards[0]
    assert blurred.method == "intervals"
    assert all(r.near_best for r in blurred.rows)
    with pytest.raises(RecordError, match="no per-image statistics"):
        build(three(), "paired")
    with pytest.raises(UsageError, match="coin"):
        build(three(), "coin")  # type: ignore[arg-type]


def test_same_bytes_in_any_order(tmp_path: Path) -> None:
    entries = three()
    shuffled = entries[:]
    random.Random(0).shuffle(shuffled)
    for write in (tables.wide_csv, tables.long_csv, tables.markdown, tables.latex, tables.long_json):
        assert write(build(entries)) == write(build(shuffled)) == write(build(entries))
    pytest.importorskip("pyarrow")
    for name, order in (("a", entries), ("b", shuffled)):
        tables.write_parquet(build(order), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_rebuilt_from_disk_is_byte_identical(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    for entry in three():
        store.save(
            entry.record,
            make_statistics(seed=len(entry.record.encoder.name)) if entry.record.metric == "accuracy" else None,
        )
    first = tables.long_csv(build(read_records([tmp_path])))
    assert first == tables.long_csv(build(read_records([tmp_path])))


def test_wide_csv() -> None:
    rows = list(csv.DictReader(io.StringIO(tables.wide_csv(build(three())))))
    assert [r["encoder"] for r in rows] == ["a", "b", "c"]
    assert rows[0]["segmentation/toy"] == "70"
    assert rows[0]["segmentation/toy low"] == "69"
    assert rows[0]["segmentation/toy rank"] == "2"
    assert rows[2]["detection/x"] == ""


def test_markdown_and_latex_mark_best_and_ties() -> None:
    found = build(
        stored(
            make_record("best", value=70, low=68, high=72),
            make_record("near", value=69.9, low=68, high=72),
            make_record("far", value=50, low=49, high=51),
        )
    )
    text = tables.markdown(found)
    assert "**70.00" in text
    assert "≈" in text.split("| near |")[1].split("\n")[0]
    assert "**" not in text.split("| far |")[1].split("\n")[0]
    tex = tables.latex(found)
    assert r"\textbf{70.00" in tex
    assert "near & 69.90" in tex
    assert r"$^\dagger$" in tex.split("near &")[1].split("\n")[0]
    assert tex.startswith(r"\begin{tabular}{lr}")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text(name: str) -> None:
    found = build(stored(make_record(name), make_record("other", task=f"segmentation/{name}")))
    rows = list(csv.DictReader(io.StringIO(tables.wide_csv(found))))
    assert name in [r["encoder"].removeprefix("'") for r in rows]
    text = tables.markdown(found)
    assert "<script>" not in text
    table = [line for line in text.split("\n") if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") in (5, 6) for line in table)
    tex = tables.latex(found)
    assert tex.count(r"\end{tabular}") == 1
    assert json.loads(tables.long_json(found))


def test_references_are_shown_and_never_ranked() -> None:
    reference = Reference(
        "Paper",
        "ViT-L/14",
        518,
        "segmentation",
        "dinov2-linear",
        "Toy",
        "accuracy",
        99.9,
        "Table 1",
        "",
        None,
        "segmentation/toy",
        "x.csv",
    )
    printed = {"segmentation/toy": [reference]}
    found = build(three())
    wide = list(csv.DictReader(io.StringIO(tables.wide_csv(found, printed))))
    assert wide[-1]["reference"] == "Table 1"
    assert wide[-1]["segmentation/toy"] == "99.9"
    assert wide[-1]["segmentation/toy rank"] == ""
    long = tables.long_rows(found, printed)
    assert [r["rank"] for r in long if r["reference"]] == [None]
    assert "printed: Table 1" in tables.markdown(found, printed)
    assert "Table 1" in tables.latex(found, printed)


def test_no_interval_is_no_interval() -> None:
    found = build(stored(make_record("a", low=None, high=None), make_record("b", value=60)))
    assert found.boards[0].rows[0].low is None
    assert "70.00" in tables.markdown(found)


def test_no_interval_may_stand_anywhere() -> None:
    sure = [make_record("a", value=70, low=69.9, high=70.1), make_record("b", value=60, low=59.9, high=60.1)]
    ranks = {r.encoder: r.ranks for r in build(stored(*sure)).boards[0].rows}
    assert ranks == {"a": (1, 1), "b": (2, 2)}
    found = build(stored(*sure, make_record("c", value=50, low=None, high=None)))
    assert {r.encoder: r.ranks for r in found.boards[0].rows} == {"a": (1, 2), "b": (2, 3), "c": (1, 3)}
    assert [r.near_best for r in found.boards[0].rows] == [True, False, True]
    alone = build(stored(*(make_record(n, value=v, low=None, high=None) for n, v in (("a", 1.0), ("b", 2.0)))))
    assert [r.ranks for r in alone.boards[0].rows] == [(1, 2), (1, 2)]


def test_one_image_ranks_nobody(tmp_path: Path) -> None:
    for name, rate in (("a", 0.9), ("b", 0.2)):
        statistics = make_statistics(1, rate)
        ResultStore(tmp_path).save(
            make_record(name, value=statistics.point()["accuracy"], low=None, high=None), statistics
        )
    assert [r.ranks for r in build(iter_records([tmp_path])).boards[0].rows] == [(1, 2), (1, 2)]
    with pytest.raises(RecordError, match="one test image"):
        build(iter_records([tmp_path]), "paired")


def test_labels_never_merge_two_encoders() -> None:
    longer = "12345678" + "9" * 56
    found = build(
        stored(
            make_record("a", weights="12345678" + "0" * 56, value=10),
            make_record("a", weights=longer, value=20),
            make_record("a@12345678", weights="f" * 64, value=90),
            make_record("b", weights="e" * 64, value=50),
        )
    )
    rows = found.boards[0].rows
    assert [(r.value, len(r.records)) for r in rows] == [(90, 1), (50, 1), (20, 1), (10, 1)]
    assert len({r.encoder for r in rows}) == 4
    assert rows[1].encoder == "b"


def test_labels_are_taken_back() -> None:
    entries = stored(make_record("a"), make_record("a", weights="b" * 64, value=60), make_record("c@aaaaaaaa"))
    for label, count in (("a", 2), ("a@bbbbbbbb", 1), ("a@b", 1), ("c@aaaaaaaa", 1), ("a@", 0), ("a@c", 0), ("x", 0)):
        assert len(of_encoder(entries, label)) == count, label


def test_a_run_made_again_counts_once_and_the_newest_is_kept() -> None:
    old, new = make_record(), make_record(created="2026-02-01T00:00:00Z", seconds={"fit": 9.0})
    for entries in (stored(old, new), stored(new, old)):
        (row,) = build(entries).boards[0].rows
        assert (len(row.records), row.record.created) == (1, new.created)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_competition_ranks_against_the_definition(scores: list[int]) -> None:
    ranks = competition_ranks(np.array(scores, dtype=float))
    assert ranks.tolist() == [1 + sum(o > s for o in scores) for s in scores]


@given(
    st.lists(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 3).map(float), min_size=1), min_size=1, max_size=4)
)
def test_win_rate_and_borda_against_the_definition(boards: list[dict[str, float]]) -> None:
    points = borda(boards)
    rates = mean_win_rate(boards)
    for name in {n for b in boards for n in b}:
        beaten = [
            sum((b[name] > v) + (b[name] == v) / 2 for other, v in b.items() if other != name)
            for b in boards
            if name in b
        ]
        assert points[name] == pytest.approx(sum(beaten))
        shares = [100 * s / (len(b) - 1) for s, b in zip(beaten, [b for b in boards if name in b]) if len(b) > 1]
        assert rates.get(name) == (pytest.approx(np.mean(shares)) if shares else None)


def test_rank_intervals_of_known_draws() -> None:
    draws = np.array([[3.0, 2.0, 1.0]] * 50 + [[2.0, 3.0, 1.0]] * 50)
    assert rank_intervals(draws) == [(1, 2), (1, 2), (3, 3)]


def test_a_board_takes_the_metric_direction_from_the_record_where_it_is_unknown() -> None:
    records = [
        make_record(n, metric="latency", metrics={"latency": Metric(value=v, unit="", higher_is_better=False)})
        for n, v in (("a", 2.0), ("b", 1.0))
    ]
    assert [r.encoder for r in build(stored(*records)).boards[0].rows] == ["b", "a"]
