"""``rice-eval data check``: what it finds in a copy, and how it says so."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rice_eval.datasets.check import check
from rice_eval.errors import NotFoundError, UsageError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The generic layout with three images a split and a class that val never has."""
    for split in ("train", "val"):
        for number in range(3):
            for kind, values in (("images", None), ("masks", number % 2)):
                path = tmp_path / kind / split / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.full((5, 4, 3), 90) if values is None else np.full((5, 4), values)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    (tmp_path / "names.txt").write_text("road\nsky\nrare\n")
    return tmp_path


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "rice_eval.cli.main", "data", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_a_clean_copy_has_notes_alone(root: Path) -> None:
    findings = check("folder", root, splits=["train", "val"], full=True)
    assert [(f.level, f.split, f.what) for f in findings] == [
        ("note", "train", "1 of 3 classes have no pixel: rare"),
        ("note", "val", "1 of 3 classes have no pixel: rare"),
    ]


def test_every_fault_is_found_and_named(root: Path) -> None:
    Image.new("L", (9, 9)).save(root / "masks" / "val" / "0.png")
    Image.new("L", (4, 5), 77).save(root / "masks" / "val" / "1.png")
    photo = root / "images" / "val" / "2.png"
    photo.write_bytes(photo.read_bytes()[:50])
    (root / "masks" / "train" / "1.png").unlink()
    problems = [f for f in check("folder", root, splits=["train", "val"]) if f.level == "problem"]
    assert [(f.split, f.image) for f in problems] == [("train", ""), ("val", "0"), ("val", "1"), ("val", "2")]
    for finding, says in zip(problems, ("1 has no mask", "9x9 pixels", "value 77", "2.png: can't be decoded")):
        assert says in finding.what
        assert finding.fix


def test_the_command_line(root: Path) -> None:
    splits = ("--split", "train", "--split", "val")
    clean = cli("check", "folder", "--data", str(root), *splits, "--json")
    assert clean.returncode == 0, clean.stderr
    assert json.loads(clean.stdout)["clean"] is True
    Image.new("L", (4, 5), 77).save(root / "masks" / "val" / "1.png")
    found = cli("check", "folder", "--data", str(root), *splits, "--full")
    assert found.returncode == 2
    assert "problem: val/1: " in found.stdout
    assert "value 77" in found.stdout
    assert "Traceback" not in found.stderr
    missing = cli("check", "ade20k", "--data", str(root / "nowhere"))
    assert missing.returncode == 2
    assert "no such folder or archive; expected layout: images/training/*.jpg" in missing.stdout
    unknown = cli("check", "ade2k", "--data", str(root))
    assert unknown.returncode == 2
    assert "did you mean 'ade20k'" in unknown.stderr
    assert len(unknown.stderr.strip().splitlines()) == 1


def test_names_and_splits_are_checked(root: Path) -> None:
    with pytest.raises(NotFoundError, match="did you mean 'folder'"):
        check("foldr", root)
    with pytest.raises(UsageError, match="name them with --split"):
        check("folder", root)


def test_boxes_of_no_area_and_over_the_border_are_notes(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        boxes = [[0, 0, 2, 2], [1, 1, 0, 2], [2, 2, 9, 2]]
        content: dict[str, Any] = {
            "images": [{"id": 1, "file_name": "1.jpg", "height": 5, "width": 4}],
            "categories": [{"id": 1, "name": "cat"}],
            "annotations": [{"id": k, "image_id": 1, "category_id": 1, "bbox": b} for k, b in enumerate(boxes)],
        }
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        (tmp_path / split).mkdir()
        Image.new("RGB", (4, 5)).save(tmp_path / split / "1.jpg")
    findings = check("coco", tmp_path)
    assert [f.what for f in findings if f.split == "val2017"] == [
        "the box of annotation 1 has no area",
        "the box of annotation 2 reaches over the border",
    ]
    assert {f.level for f in findings} == {"note"}


def test_splits_of_two_releases(tmp_path: Path, coco_mini: Path) -> None:
    shutil.copytree(coco_mini / "annotations", tmp_path / "annotations")
    for split in ("train2017", "val2017"):
        (tmp_path / split).symlink_to(coco_mini / split)
    assert not [f for f in check("coco-panoptic", tmp_path, {"classes": "super"}) if f.level == "problem"]
    path = tmp_path / "annotations" / "panoptic_val2017.json"
    path.write_text(path.read_text().replace('"name": "person"', '"name": "people"'))
    problems = [f for f in check("coco-panoptic", tmp_path) if f.level == "problem"]
    assert [f.what for f in problems] == ["the splits have different classes"]


def test_roboflow_without_a_set_goes_through_all_hundred(tmp_path: Path) -> None:
    findings = check("roboflow100", tmp_path, splits=["test"])
    assert len(findings) == 100
    assert findings[0].split.endswith("/test")


def test_make_scenes(tmp_path: Path) -> None:
    made = cli("make", "scenes", "--out", str(tmp_path / "s"), "--n-train", "2", "--n-val", "1", "--size", "96")
    assert made.returncode == 0, made.stderr
    found = cli("check", "scenes", "--data", str(tmp_path / "s"), "--json", "--full")
    assert json.loads(found.stdout)["clean"] is True, found.stdout
    again = cli("make", "scenes", "--out", str(tmp_path / "s"), "--n-train", "2", "--n-val", "1", "--size", "96")
    assert again.returncode == 2
    assert "not an empty folder" in again.stderr
