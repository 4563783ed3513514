"""Printed numbers: the files' schema, their links, and reproduction against records."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from result_factory import make_record

from rice_eval.cards import catalogue, data_root
from rice_eval.errors import DataError
from rice_eval.results.leaderboard import build
from rice_eval.results.published import COLUMNS, Reference, load_published, references_of, reproduce
from rice_eval.results.store import StoredRecord

FOLDER = data_root() / "results" / "published"


def test_every_file_fits_the_schema_and_holds_one_source() -> None:
    numbers = load_published()
    assert len(numbers) == 864
    by_file: dict[str, set[str]] = {}
    for number in numbers:
        by_file.setdefault(number.file, set()).add(number.source)
    assert len(by_file) == 20
    assert all(len(sources) == 1 for sources in by_file.values())
    assert len({s for sources in by_file.values() for s in sources}) == 20


def test_no_number_is_there_twice() -> None:
    seen: dict[tuple[object, ...], Reference] = {}
    for n in load_published():
        key = (n.encoder, n.arch, n.resolution, n.kind, n.protocol, n.benchmark, n.metric, n.source, n.note)
        assert key not in seen, (key, seen.get(key))
        seen[key] = n


def test_links_name_cards_that_exist() -> None:
    cards = catalogue()
    numbers = load_published()
    linked = {n.checkpoint for n in numbers if n.checkpoint}
    assert "rice-vit-l-14-560" in linked
    assert linked <= set(cards.encoders)
    assert {n.task for n in numbers if n.task} <= set(cards.tasks)


def test_known_numbers() -> None:
    """Figures read in the papers themselves: RICE table 1 (arXiv 2507.20025) and DINOv2 table 10 (arXiv 2304.07193)."""
    numbers = load_published()
    docvqa = [n for n in numbers if n.file == "rice-table-1.csv" and n.benchmark == "DocVQA" and n.encoder == "CLIP"]
    assert [n.value for n in docvqa] == [75.21]
    ade = [
        n
        for n in numbers
        if n.protocol == "dinov2-linear" and n.benchmark == "ADE20K" and n.encoder == "DINOv2" and n.arch == "ViT-g/14"
    ]
    assert [n.value for n in ade] == [49.0]


GOOD = ",".join(COLUMNS) + "\nRICE,ViT-L-14,560,segmentation/linear,Toy,accuracy,71.5,Table 1,\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n", "header"),
        (GOOD + "x,y\n", "line 3"),
        (GOOD.replace("71.5", "much"), "line 2"),
        (GOOD.replace("71.5", "nan"), "finite"),
        (GOOD.replace("Table 1", ""), "'source' is empty"),
        (GOOD.replace("segmentation/linear", "linear"), "kind/id"),
        (GOOD.replace("560", "5.5"), "whole number"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        load_published(tmp_path)
    assert "x.csv" in str(caught.value)


def test_bad_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(GOOD)
    (tmp_path / "links.yaml").write_text("checkpoints: [{encoder: RICE, check: x}]")
    with pytest.raises(DataError, match=r"links\.yaml"):
        load_published(tmp_path)
    with pytest.raises(DataError, match="no published numbers"):
        load_published(tmp_path / "none")


def test_reproduce(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(GOOD)
    (tmp_path / "links.yaml").write_text(
        "checkpoints: [{encoder: RICE, arch: ViT-L-14, resolution: 560, checkpoint: toy-vit}]\n"
        "tasks: [{kind: segmentation, benchmark: Toy, task: segmentation/toy}]\n"
    )
    numbers = load_published(tmp_path)
    (nothing,) = reproduce(numbers, [])
    assert (nothing.verdict, nothing.difference) == ("not run", None)
    cases = {"inside": (70.0, 69.0, 72.0), "outside": (60.0, 59.0, 61.0), "no interval": (70.0, None, None)}
    for verdict, (value, low, high) in cases.items():
        entry = StoredRecord(Path("r.json"), make_record(value=value, low=low, high=high))
        (found,) = reproduce(numbers, [entry])
        assert found.verdict == verdict
        assert found.difference == pytest.approx(value - 71.5)
        (reference,) = references_of(build([entry]).boards[0], numbers)
        assert reference.value == 71.5


def test_columns_are_as_documented() -> None:
    for path in FOLDER.glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            assert tuple(next(csv.reader(file))) == COLUMNS
