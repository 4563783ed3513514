"""Detection readers: against pycocotools on real annotations, and on tiny copies of every layout."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rice_eval.datasets import load_dataset
from rice_eval.datasets.roboflow import categories, survey
from rice_eval.errors import DataError, MissingExtraError, UsageError

H, W = 20, 30


def photo(path: Path, size: tuple[int, int] = (W, H)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (40, 90, 160)).save(path)


def content(**changes: Any) -> dict[str, Any]:
    """Three images (the second has no object), categories out of order, a crowd in run lengths."""
    crowd = {"size": [H, W], "counts": [100, 50, H * W - 150]}
    base: dict[str, Any] = {
        "images": [
            {"id": 30, "file_name": "c.jpg", "height": H, "width": W},
            {"id": 10, "file_name": "a.jpg", "height": H, "width": W},
            {"id": 20, "file_name": "b.jpg", "height": H, "width": W},
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 30, "category_id": 7, "bbox": [1, 2, 10, 8], "area": 80.0, "iscrowd": 0,
             "segmentation": [[1, 2, 11, 2, 11, 10, 1, 10], [15.5, 3, 20, 3, 20, 9]]},
            {"id": 2, "image_id": 10, "category_id": 3, "bbox": [5, 0, 3, 20], "area": 50, "iscrowd": 1,
             "segmentation": crowd},
            {"id": 3, "image_id": 30, "category_id": 3, "bbox": [0.5, 0.5, 0, 4], "iscrowd": 0,
             "segmentation": [[1, 1, 2, 1, 2, 2]]},
        ],
    }  # fmt: skip
    return {**base, **changes}


def write_coco(root: Path, split: str = "val2017", **changes: Any) -> Path:
    (root / "annotations").mkdir(parents=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content(**changes)))
    for name in "abc":
        photo(root / split / f"{name}.jpg")
    return root


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_equals_pycocotools_on_real_annotations(coco_mini: Path, split: str) -> None:
    reference = pytest.importorskip("pycocotools.coco")
    data: Any = load_dataset("coco", split, coco_mini)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = reference.COCO(str(coco_mini / "annotations" / f"instances_{split}.json"))
    assert data.image_keys == tuple(sorted(truth.imgs))
    assert data.category_ids == tuple(sorted(truth.cats))
    assert len(data.things) == 80
    seen = 0
    for index, key in enumerate(data.image_keys):
        ours = data.instances(index)
        theirs = truth.loadAnns(truth.getAnnIds(imgIds=key))
        assert ours.ids.tolist() == [a["id"] for a in theirs]
        assert [data.things[k] for k in ours.labels] == [truth.cats[a["category_id"]]["name"] for a in theirs]
        assert np.array_equal(ours.area, [a["area"] for a in theirs])
        for box, mask, entry in zip(ours.boxes, ours.masks, theirs):
            x, y, w, h = entry["bbox"]
            assert box.tolist() == [x, y, x + w, y + h]
            assert mask == truth.annToRLE(entry)
        seen += len(theirs)
    assert seen == {"train2017": 746, "val2017": 553}[split]
    assert data.image(3).shape[:2] == data.size(3)


def test_order_crowds_and_empty_images(tmp_path: Path) -> None:
    coco_mask = pytest.importorskip("pycocotools.mask")
    data = load_dataset("coco", "val2017", write_coco(tmp_path))
    assert data.things == ("cat", "dog")
    assert [data.image_id(i) for i in range(3)] == ["a", "b", "c"]
    first, none, last = (data.instances(i) for i in range(3))
    assert first.crowd.tolist() == [True]
    assert first.masks is not None
    assert coco_mask.area(first.masks[0]) == 50
    assert none.boxes.shape == (0, 4)
    assert none.masks == ()
    assert last.boxes.tolist() == [[1, 2, 11, 10], [0.5, 0.5, 0.5, 4.5]]
    assert last.labels.tolist() == [1, 0]
    assert last.area.tolist() == [80.0, 0.0]  # stated; of the box where it is not
    assert last.ids.tolist() == [1, 3]
    again = pickle.loads(pickle.dumps(data))
    assert again.instances(2).masks == last.masks


def test_boxes_alone_need_no_pycocotools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_coco(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pycocotools"):
        load_dataset("coco", "val2017", root)
    assert load_dataset("coco", "val2017", root, {"masks": "false"}).instances(2).masks is None


def test_images_in_their_zip(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    want = load_dataset("coco", "val2017", root)
    fingerprint, image = want.fingerprint, want.image(1)
    with zipfile.ZipFile(root / "val2017.zip", "w") as archive:
        for path in sorted((root / "val2017").iterdir()):
            archive.write(path, f"val2017/{path.name}")
            path.unlink()
    (root / "val2017").rmdir()
    data = load_dataset("coco", "val2017", root)
    assert data.fingerprint == fingerprint
    assert np.array_equal(data.image(1), image)


def _changed(index: int, **change: Any) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = content()["annotations"]
    entries[index].update(change)
    return entries


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"annotations": _changed(0, image_id=99)}, "annotation 1 is of image 99, which the file does not list"),
        ({"annotations": _changed(0, category_id=99)}, "annotation 1 is of category 99"),
        ({"annotations": _changed(0, bbox=[1, 2, -3, 4])}, "annotation 1 has the box"),
        ({"annotations": _changed(0, bbox=[1, 2, float("nan"), 4])}, "annotation 1 has the box"),
        ({"annotations": _changed(0, bbox=[1, 2, 3])}, "annotation 1 has the box"),
        ({"annotations": _changed(0, id=2)}, "two annotations share an id"),
        ({"annotations": _changed(0, segmentation=[])}, "1 of 3 annotations have no segmentation"),
        ({"annotations": [{"id": 1}]}, "not a COCO annotation file"),
        ({"categories": [{"id": 3, "name": "x"}, {"id": 3, "name": "y"}]}, "two categories share an id|category 7"),
        ({"annotations": _changed(0, id=10**30)}, "not a COCO annotation file"),
        ({"annotations": _changed(0, area=float("nan"))}, "annotation 1 has the area nan"),
        ({"annotations": _changed(0, area=-1)}, "annotation 1 has the area -1"),
        ({"images": [{**image, "width": -5} for image in content()["images"]]}, "has -5x"),
        ({"images": []}, "image 30|no image"),
        ({"images": None}, "not a COCO annotation file"),
        ({"images": [{"id": 10, "height": 3, "width": 3}]}, "no file_name"),
    ],
)
def test_malformed_annotations_are_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    root = write_coco(tmp_path, **changes)
    with pytest.raises(DataError, match=says) as caught:
        load_dataset("coco", "val2017", root)
    assert "\n" not in str(caught.value)


def test_malformed_masks_are_named(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    root = write_coco(tmp_path / "a", annotations=_changed(0, segmentation=[[1, 2, 3, 4]]))
    with pytest.raises(DataError, match="annotation 1: a polygon of fewer than three points"):
        load_dataset("coco", "val2017", root).instances(2)
    root = write_coco(tmp_path / "b", annotations=_changed(1, segmentation={"size": [3, 3], "counts": [9]}))
    with pytest.raises(DataError, match=r"annotation 2: its mask is \[3, 3\]"):
        load_dataset("coco", "val2017", root).instances(0)


# Before they were refused these hung, crashed the interpreter, or ended in a stack trace of pycocotools.
@pytest.mark.parametrize(
    ("segmentation", "says"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "a polygon of fewer than three points"),
        ([[float("nan"), 2, 3, 4, 5, 6]], "no place in a picture"),
        ([[-1e9, -1e9, 1e9, 0, 5, 1e9]], "no place in a picture"),
        ({"size": [H, W]}, "counts are NoneType"),
        ({"size": [H, W], "counts": [10, 20, 5]}, f"sum to 35, its image has {H * W} pixels"),
        ({"size": [H, W], "counts": [10, -20, H * W + 10]}, "a whole number of zero or more"),
        ({"size": [H, W], "counts": "hello"}, "cut off"),
        ({"size": [H, W], "counts": "hello wörld"}, "the byte"),
    ],
)
def test_masks_that_pycocotools_would_choke_on(tmp_path: Path, segmentation: Any, says: str) -> None:
    pytest.importorskip("pycocotools")
    root = write_coco(tmp_path, annotations=_changed(0, segmentation=segmentation))
    with pytest.raises(DataError, match=f"annotation 1: .*{says}") as caught:
        load_dataset("coco", "val2017", root).instances(2)
    assert "\n" not in str(caught.value)


def test_an_area_of_null_is_that_of_the_box(tmp_path: Path) -> None:
    data = load_dataset("coco", "val2017", write_coco(tmp_path, annotations=_changed(0, area=None)), {"masks": False})
    found = data.instances(2)
    row = found.ids.tolist().index(1)
    assert found.area[row] == np.prod(found.boxes[row, 2:] - found.boxes[row, :2])


def test_an_exif_rotated_photo_is_an_error_by_line(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (W, H)).save(root / "val2017" / "a.jpg", exif=exif)
    with pytest.raises(DataError, match="20x30 pixels upright, but the annotations say 30x20"):
        load_dataset("coco", "val2017", root).image(0)


def test_coco_format(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    for split in ("train", "val"):
        (tmp_path / "labels" / f"{split}.json").write_text(json.dumps(content()))
        for name in "abc":
            photo(tmp_path / "pictures" / split / f"{name}.jpg")
    options = {"train_json": "labels/train.json", "val_json": "labels/val.json", "images": "pictures/{split}"}
    data = load_dataset("coco-format", "val", tmp_path, options)
    assert len(data) == 3
    assert data.instances(2).labels.tolist() == [1, 0]
    with pytest.raises(UsageError, match="no annotation file for split 'test'"):
        load_dataset("coco-format", "test", tmp_path, options)
    with pytest.raises(DataError, match="no such file"):
        load_dataset("coco-format", "val", tmp_path, {"val_json": "none.json"})
    with pytest.raises(DataError, match="no such image"):
        load_dataset("coco-format", "val", tmp_path, {**options, "images": "elsewhere"})


def write_lvis(root: Path, **drop: str) -> Path:
    entries = content()
    for image, folder in zip(entries["images"], ("train2017", "val2017", "val2017")):
        image["coco_url"] = f"http://images.cocodataset.org/{folder}/{image.pop('file_name')}"
        image["neg_category_ids"], image["not_exhaustive_category_ids"] = [7], [3]
        photo(root / image["coco_url"].split("org/")[1])
    for category, frequency in zip(entries["categories"], "rf"):
        category["frequency"] = frequency
    for key in drop.values():
        for image in entries["images"]:
            image.pop(key)
    root.mkdir(exist_ok=True)
    (root / "lvis_v1_val.json").write_text(json.dumps(entries))
    return root


def test_lvis(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    data: Any = load_dataset("lvis", "val", write_lvis(tmp_path / "a"))
    assert data.things == ("cat", "dog")
    assert data.frequency == ("f", "r")
    assert data.federated(0).negative == (1,)
    assert data.federated(0).not_exhaustive == (0,)
    assert data.image(2).shape == (H, W, 3)
    for key, says in (("neg_category_ids", "not an LVIS v1"), ("coco_url", "no coco_url")):
        with pytest.raises(DataError, match=says):
            load_dataset("lvis", "val", write_lvis(tmp_path / key, drop=key))


XML = """<annotation><size><width>30</width><height>20</height><depth>3</depth></size>
<object><name>dog</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object>
<object><name>person</name><difficult>1</difficult><bndbox><xmax>9</xmax><ymax>8</ymax><xmin>5</xmin><ymin>4</ymin></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>
</annotation>"""


def write_voc(root: Path, xml: str = XML) -> Path:
    base = root / "VOCdevkit" / "VOC2007"
    photo(base / "JPEGImages" / "000005.jpg")
    (base / "Annotations").mkdir()
    (base / "Annotations" / "000005.xml").write_text(xml)
    (base / "ImageSets" / "Main").mkdir(parents=True)
    (base / "ImageSets" / "Main" / "trainval.txt").write_text("000005\n")
    return root


def test_voc_detection(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "a")
    for place in (root, root / "VOCdevkit", root / "VOCdevkit" / "VOC2007"):
        data = load_dataset("voc-detection", "trainval", place)
        found = data.instances(0)
        assert found.boxes.tolist() == [[0, 1, 30, 20], [4, 3, 9, 8]]
        assert [data.things[k] for k in found.labels] == ["dog", "person"]
        assert found.crowd.tolist() == [False, True]
    with pytest.raises(DataError, match="VOC2012/ImageSets/Main/trainval.txt"):
        load_dataset("voc-detection", "trainval", root, {"year": "2012"})
    for number, (old, new, says) in enumerate(
        (("dog", "dragon", "named 'dragon'"), ("</annotation>", "", "not a VOC annotation"), ("<xmax>30", "<xmax>0", "corners"),
         ("<xmin>1</xmin>", "", "corners"), ("<xmax>30", "<xmax>inf", "corners"))
    ):  # fmt: skip
        broken = write_voc(tmp_path / str(number), XML.replace(old, new, 1))
        with pytest.raises(DataError, match=says):
            load_dataset("voc-detection", "trainval", broken).instances(0)


def write_roboflow(root: Path, name: str) -> None:
    entries = content()
    for category in entries["categories"]:
        category["supercategory"] = "things"
    entries["categories"].append({"id": 0, "name": "things", "supercategory": "none"})
    for entry in entries["annotations"]:
        entry["segmentation"] = []
    for split in ("train", "valid", "test"):
        for letter in "abc":
            photo(root / name / split / f"{letter}.jpg")
        (root / name / split / "_annotations.coco.json").write_text(json.dumps(entries))


def test_roboflow_sets_and_a_broken_one_among_them(tmp_path: Path) -> None:
    table = categories()
    assert {name: len(sets) for name, sets in table.items()} == {
        "aerial": 7, "videogames": 7, "microscopic": 11, "underwater": 5, "documents": 8, "electromagnetic": 12, "real world": 50,
    }  # fmt: skip
    for name in ("aerial-cows", "cloud-types", "uno-deck"):
        write_roboflow(tmp_path, name)
    data = load_dataset("roboflow100", "test", tmp_path, {"set": "aerial-cows"})
    assert data.things == ("cat", "dog")
    assert data.instances(2).labels.tolist() == [1, 0]
    target = tmp_path / "cloud-types" / "valid" / "_annotations.coco.json"
    target.write_text(target.read_text()[:200])
    found = survey(tmp_path)
    assert found.usable == {"aerial": ("aerial-cows",), "real world": ("uno-deck",)}
    assert "not valid JSON" in str(found.broken["cloud-types"])
    assert len(found.broken) == 98
    with pytest.raises(UsageError, match="did you mean 'aerial-cows'"):
        load_dataset("roboflow100", "test", tmp_path, {"set": "aerial-cow"})
    with pytest.raises(UsageError, match="name one with the option set"):
        load_dataset("roboflow100", "test", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="none of the 100 sets"):
        survey(tmp_path / "empty")
