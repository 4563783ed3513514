from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rice_eval.cards import TaskCard, catalogue
from rice_eval.errors import DataError, NotFoundError, UsageError
from rice_eval.plan import EncoderRef, Plan, TaskRef, make_plan, task_for_dataset
from rice_eval.protocols.base import configure
from rice_eval.registry import protocols


def plan(weights: Path) -> Plan:
    card = task_for_dataset(catalogue(()), "segmentation", "scenes", {})
    return make_plan([EncoderRef("rice-vit-l-14-560", weights)], [TaskRef(card, None, 8, 4)])


@pytest.mark.parametrize("name", ["step[1].pt", "a*b?.pt", "folder"])
def test_a_checkpoint_may_have_any_name(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"")
    assert plan(tmp_path / name).jobs[0].encoder.weights == tmp_path / name


def test_a_pattern_stands_for_the_parts_of_a_checkpoint(tmp_path: Path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert len(plan(tmp_path / "model-*.safetensors").jobs) == 1


@pytest.mark.parametrize("name", ["none.pt", "none-*.pt", "none/.."])
def test_a_checkpoint_that_is_not_there(tmp_path: Path, name: str):
    with pytest.raises(UsageError, match="no such file or folder"):
        plan(tmp_path / name)


def test_a_path_without_a_name_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    # The folder is there; what is in it is for the loader to say.
    assert len(plan(Path(".")).jobs) == 1


def test_a_card_sets_fields_of_its_protocols_and_flags_go_over_them() -> None:
    card = catalogue().task("ocr/sroie").model_copy(update={"dataset": "scenes-text", "options": {"size": 128}})

    def planned(card: TaskCard, **settings: Any) -> Any:
        task = TaskRef(card, None, 2, 2)
        return (
            make_plan([EncoderRef("rgb-moments")], [task], protocol_ids=["text-mask"], settings=settings)
            .jobs[0]
            .protocol
        )

    assert (planned(card).cell, planned(card).thin) == (3.5, True)
    assert (planned(card, cell="7").cell, planned(card, cell="7").thin) == (7.0, True)
    assert planned(card.model_copy(update={"settings": {}})).cell == 0
    with pytest.raises(NotFoundError, match="text-maks"):
        planned(card.model_copy(update={"settings": {"text-maks": {}}}))
    with pytest.raises(UsageError, match="no field 'cel'"):
        planned(card.model_copy(update={"settings": {"text-mask": {"cel": 3}}}))


def test_every_shipped_card_sets_fields_that_are_there() -> None:
    for card in catalogue().tasks.values():
        for name, fields in card.settings.items():
            configure(protocols.get(name), {"view": card.view, **fields})


def test_splits_of_different_things_are_refused_where_boxes_are_learnt(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    entry = {
        "images": [{"id": 1, "file_name": "a.png", "height": 8, "width": 8}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 1, 4, 4], "iscrowd": 0}],
    }
    names = {"train": ("cat", "dog", "cow"), "same": ("cat", "dog", "cow"), "fewer": ("cat", "dog")}
    names["other"] = ("dog", "cat", "cow")
    for name, things in names.items():
        categories = [{"id": k, "name": thing} for k, thing in enumerate(things, 1)]
        (tmp_path / f"{name}.json").write_text(json.dumps({**entry, "categories": categories}))

    def planned(test: str, kind: str, encoder: str, protocol: str) -> Plan:
        options = {"train_json": "train.json", "val_json": f"{test}.json", "masks": False}
        card = task_for_dataset(catalogue(()), kind, "coco-format", options)
        return make_plan([EncoderRef(encoder)], [TaskRef(card, tmp_path)], protocol_ids=[protocol])

    learnt = [("detection", "rgb-moments", "fcos-linear"), ("regions", "rgb-moments", "region-knn")]
    for kind, encoder, protocol in learnt:
        assert planned("same", kind, encoder, protocol).jobs
        with pytest.raises(DataError, match="class 0 is 'cat' in the one and 'dog' in the other"):
            planned("other", kind, encoder, protocol)
        with pytest.raises(DataError, match="3 and 2; class 2 is 'cow' in the one and None in the other"):
            planned("fewer", kind, encoder, protocol)
    # Nothing is learnt where texts name the boxes.
    text = next(
        name for name, (_, entry) in catalogue().encoders.items() if entry.text and entry.public and entry.patch == 14
    )
    assert planned("other", "detection", text, "zero-shot-boxes").jobs
