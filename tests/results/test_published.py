"""Printed numbers: the files' schema, their links, and reproduction against records."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from result_factory import make_record
from test_outputs import run

from rice_eval.cards import catalogue, data_root
from rice_eval.errors import DataError
from rice_eval.results.leaderboard import build
from rice_eval.results.published import COLUMNS, Reference, load_published, references_of
from rice_eval.results.record import Metric, ProtocolEntry
from rice_eval.results.reproduction import Default, reproduce
from rice_eval.results.store import ResultStore, StoredRecord

FOLDER = data_root() / "results" / "published"


def test_every_file_fits_the_schema_and_holds_one_source() -> None:
    numbers = load_published()
    assert len(numbers) == 914
    by_file: dict[str, set[str]] = {}
    for number in numbers:
        by_file.setdefault(number.file, set()).add(number.source)
    assert len(by_file) == 22
    assert all(len(sources) == 1 for sources in by_file.values())
    assert len({s for sources in by_file.values() for s in sources}) == 22


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


@pytest.fixture
def toy(tmp_path: Path) -> tuple[Reference, ...]:
    (tmp_path / "x.csv").write_text(GOOD.replace("segmentation/linear", "segmentation/printed-linear"))
    (tmp_path / "links.yaml").write_text(
        "checkpoints: [{encoder: RICE, arch: ViT-L-14, resolution: 560, checkpoint: toy-vit}]\n"
        "tasks: [{kind: segmentation, benchmark: Toy, task: segmentation/toy, train_images: 10, test_images: 50}]\n"
        "protocols: [{kind: segmentation, printed: printed-linear, recipes: [{protocol: linear, settings: {steps: 9}}]}]\n"
    )
    return load_published(tmp_path)


def defaults(protocol: str) -> Default | None:
    return (1, {"norm": True, "steps": 1000, "view": "square=64"}) if protocol == "linear" else None


FULL = {"value": 71.0, "low": 70.0, "high": 72.0, "settings": {"steps": 9}}


def test_a_printed_protocol_is_found_under_our_id(toy: tuple[Reference, ...]) -> None:
    (found,) = reproduce(toy, [StoredRecord(Path("r"), make_record(**FULL))], defaults)
    assert (found.verdict, found.why) == ("inside", "")
    assert found.recipe is not None
    assert found.recipe.protocol == "linear"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"encoder.weights": "my_finetune_step_999.pt"}, "my_finetune_step_999.pt"),
        ({"task.n_test": 12}, "12 test images of 50"),
        ({"task.n_train": 9}, "9 training images of 10"),
        ({"skipped": ("a", "b")}, "2 test images skipped"),
        ({"settings": {"steps": 10}}, "setting 'steps' 10, the recipe has 9"),
        ({"settings": {}}, "setting 'steps' None, the recipe has 9"),
        ({"settings": {"steps": 9, "view": "square=512"}}, "setting 'view' 'square=512', the recipe has 'square=64'"),
    ],
)
def test_what_does_not_measure_the_printed_number_gets_no_verdict(
    toy: tuple[Reference, ...], changes: dict[str, object], why: str
) -> None:
    top = {k: v for k, v in changes.items() if "." not in k}
    record = make_record(**{**FULL, **top})  # type: ignore[arg-type]
    for name, value in changes.items():
        part, dot, field = name.partition(".")
        if dot:
            record = record.model_copy(update={part: getattr(record, part).model_copy(update={field: value})})
    (found,) = reproduce(toy, [StoredRecord(Path("r"), record)], defaults)
    assert found.verdict == "not comparable"
    assert why in found.why


def test_other_splits_options_and_versions_are_told(toy: tuple[Reference, ...]) -> None:
    card = (
        catalogue()
        .tasks["segmentation/ade20k"]
        .model_copy(update={"train": "train", "test": "test", "options": {"a": 1}})
    )
    entry = StoredRecord(Path("r"), make_record(**FULL))
    (found,) = reproduce(toy, [entry], lambda _: (2, {}), {"segmentation/toy": card})
    assert found.verdict == "not comparable"
    assert "test split val, the task has test" in found.why
    assert "options none, the task has {'a': 1}" in found.why
    assert "version 1 of the protocol, now 2" in found.why


def test_any_metric_of_a_record_counts(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(GOOD.replace("accuracy", "AP"))
    (tmp_path / "links.yaml").write_text(
        "checkpoints: [{encoder: RICE, arch: ViT-L-14, resolution: 560, checkpoint: toy-vit}]\n"
        "tasks: [{kind: segmentation, benchmark: Toy, task: segmentation/toy, metrics: {AP: mask_ap}}]\n"
    )
    record = make_record(metrics={"accuracy": Metric(value=1.0), "mask_ap": Metric(value=71.0, low=70.0, high=72.0)})
    (found,) = reproduce(load_published(tmp_path), [StoredRecord(Path("r"), record)])
    assert found.verdict == "inside"
    assert found.difference == pytest.approx(-0.5)


def test_linked_protocols_exist_and_their_settings_fit() -> None:
    """Every printed protocol of a kind that this package scores is one of its protocols, or stands alone on purpose."""
    from rice_eval.registry import protocols

    ours = {"segmentation", "detection", "region"}
    recipes = {
        (n.kind, n.protocol, r) for n in load_published() if n.kind in ours for r in [x.protocol for x in n.recipes]
    }
    assert {protocol for _, _, protocol in recipes} <= set(protocols.names())
    for number in load_published():
        for recipe in number.recipes:
            if number.kind in ours:
                kind = protocols.get(recipe.protocol)
                assert set(recipe.settings) <= set(kind.__dataclass_fields__)
                assert recipe.comparable or recipe.note
    found = {(n.kind, n.protocol): {r.protocol for r in n.recipes} for n in load_published()}
    assert found["detection", "frozen-cascade-mask-rcnn"] == {"rice-detection", "cascade-mask-rcnn-frozen"}
    assert found["region", "zero-shot"] == {"cloc-region"}
    assert found["segmentation", "hummingbird-knn30"] == {"hummingbird-knn"}
    assert found["segmentation", "dinov2-linear"] == {"dinov2-linear"}


def test_command_reproduce_on_a_public_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A full run of DINOv2 ViT-S/14 under dinov2-linear's own settings counts; a fine-tuned file on 12 images does not."""
    from rice_eval.protocols.online_recipes import Dinov2Linear

    settings = Dinov2Linear().settings()
    card = catalogue().tasks["segmentation/ade20k"]
    base = make_record(
        "dinov2-vit-s-14", "segmentation/ade20k", value=44.0, low=43.0, high=45.0, metric="miou",
        protocol=ProtocolEntry(id="dinov2-linear", hash=Dinov2Linear().hash, settings=settings),
    )  # fmt: skip
    task = base.task.model_copy(
        update={
            "train_split": card.train,
            "test_split": card.test,
            "n_train": 20210,
            "n_test": 2000,
            "dataset": "ade20k",
        }
    )
    full = base.model_copy(update={"task": task})
    tuned = base.model_copy(
        update={
            "task": task.model_copy(update={"n_test": 12}),
            "encoder": base.encoder.model_copy(update={"weights": "my_finetune_step_999.pt", "sha256": "b" * 64}),
        }
    )
    for record in (full, tuned):
        ResultStore(tmp_path).save(record, None)
    assert run("reproduce", tmp_path, "-e", "dinov2-vit-s-14", "--json") == 0
    rows = [r for r in json.loads(capsys.readouterr().out) if r["verdict"] != "not run"]
    assert [(r["protocol"], r["verdict"]) for r in sorted(rows, key=lambda r: str(r["verdict"]))] == [
        ("dinov2-linear", "inside"), ("dinov2-linear", "not comparable"),
    ]  # fmt: skip
    why = next(r["why"] for r in rows if r["verdict"] == "not comparable")
    assert "my_finetune_step_999.pt" in why
    assert "12 test images of 2000" in why
    assert run("reproduce", tmp_path) == 0
    assert "not comparable" in capsys.readouterr().out


def test_columns_are_as_documented() -> None:
    for path in FOLDER.glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            assert tuple(next(csv.reader(file))) == COLUMNS
