"""COCO panoptic as semantic segmentation, on real photos and on tiny copies of its layout."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rice_eval.datasets import load_dataset
from rice_eval.datasets.base import IGNORE
from rice_eval.errors import DataError, UsageError

CATEGORIES = [
    {"id": 17, "name": "cat", "supercategory": "animal", "isthing": 1},
    {"id": 1, "name": "person", "supercategory": "person", "isthing": 1},
    {"id": 18, "name": "dog", "supercategory": "animal", "isthing": 1},
    {"id": 187, "name": "sky-other-merged", "supercategory": "sky", "isthing": 0},
]
IDS = np.array([[0, 5, 5, 70000], [300, 300, 5, 70000], [1, 1, 1, 1]])


def rgb(ids: Any) -> Image.Image:
    ids = np.asarray(ids)
    return Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8))


def write(root: Path, split: str = "val2017", count: int = 2) -> Path:
    """A tiny copy of the layout: ``count`` images of 4 x 3 pixels with the same four segments."""
    maps = root / "annotations" / f"panoptic_{split}"
    maps.mkdir(parents=True)
    (root / split).mkdir()
    segments = [
        {"id": 5, "category_id": 1, "iscrowd": 0},
        {"id": 70000, "category_id": 187, "iscrowd": 0},
        {"id": 300, "category_id": 17, "iscrowd": 0},
        {"id": 1, "category_id": 18, "iscrowd": 1},
    ]
    names = [f"{i:012d}" for i in range(count)]
    for name in names:
        rgb(IDS).save(maps / f"{name}.png")
        Image.new("RGB", (4, 3), (9, 99, 199)).save(root / split / f"{name}.jpg")
    content = {
        "categories": CATEGORIES,
        "images": [{"id": i, "file_name": f"{n}.jpg", "height": 3, "width": 4} for i, n in enumerate(names)],
        "annotations": [
            {"image_id": i, "file_name": f"{n}.png", "segments_info": segments}
            for i, n in reversed(list(enumerate(names)))
        ],
    }
    (root / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(content))
    return root


def edit(root: Path, change: Any, split: str = "val2017") -> None:
    path = root / "annotations" / f"panoptic_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("split", ["train2017", "val2017"])
@pytest.mark.parametrize("classes", ["all", "super"])
def test_equals_the_semantic_maps_of_real_photos_pixel_for_pixel(coco_mini: Path, split: str, classes: str) -> None:
    data = load_dataset("coco-panoptic", split, coco_mini, {"classes": classes})
    categories = json.loads((coco_mini / "annotations" / f"panoptic_{split}.json").read_text())["categories"]
    key = "name" if classes == "all" else "supercategory"
    table = np.full(256, IGNORE)
    for category in categories:
        table[category["id"]] = data.classes.index(category[key])
    assert len(data) == {"train2017": 100, "val2017": 80}[split]
    assert len(data.classes) == len(data.palette) == len(set(data.palette)) == {"all": 133, "super": 27}[classes]
    for index in range(len(data)):
        want = table[np.asarray(Image.open(coco_mini / "semantic" / split / f"{data.image_id(index)}.png"))]
        got = data.semantic(index)
        assert got.dtype == np.int64
        assert np.array_equal(got, want), data.image_id(index)
        assert got.shape == data.size(index)
    assert data.image(0).shape == (*data.size(0), 3)


def test_segments_void_and_crowd(tmp_path: Path) -> None:
    data = load_dataset("coco-panoptic", "val2017", write(tmp_path))
    assert data.classes == ("person", "cat", "dog", "sky-other-merged")
    assert [data.image_id(i) for i in range(2)] == ["000000000000", "000000000001"]
    assert data.semantic(1).tolist() == [[IGNORE, 0, 0, 3], [1, 1, 0, 3], [2, 2, 2, 2]]


def test_supercategories_follow_category_ids(tmp_path: Path) -> None:
    data = load_dataset("coco-panoptic", "val2017", write(tmp_path), {"classes": "super"})
    assert data.classes == ("person", "animal", "sky")
    assert data.semantic(0).tolist() == [[IGNORE, 0, 0, 2], [1, 1, 0, 2], [1, 1, 1, 1]]


def test_from_the_zips_as_shipped(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain")
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    inner = tmp_path / "panoptic_val2017.zip"
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (plain / "annotations" / "panoptic_val2017").iterdir():
            archive.write(path, f"panoptic_val2017/{path.name}")
            archive.writestr(f"__MACOSX/panoptic_val2017/._{path.name}", b"junk")
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(shipped / "panoptic_annotations_trainval2017.zip", "w", kind) as archive:
            archive.write(plain / "annotations" / "panoptic_val2017.json", "annotations/panoptic_val2017.json")
            archive.write(inner, "annotations/panoptic_val2017.zip")
        with zipfile.ZipFile(shipped / "val2017.zip", "w") as archive:
            for path in (plain / "val2017").iterdir():
                archive.write(path, f"val2017/{path.name}")
        data = load_dataset("coco-panoptic", "val2017", shipped)
        same = load_dataset("coco-panoptic", "val2017", plain)
        assert data.fingerprint == same.fingerprint
        again = pickle.loads(pickle.dumps(data))
        assert np.array_equal(again.semantic(1), same.semantic(1))
        assert np.array_equal(again.image(1), same.image(1))


def test_fingerprint_changes_with_labels_images_and_classes(tmp_path: Path) -> None:
    root = write(tmp_path)
    seen = [load_dataset("coco-panoptic", "val2017", root).fingerprint]
    seen.append(load_dataset("coco-panoptic", "val2017", root, {"classes": "super"}).fingerprint)
    changed = IDS.copy()
    changed[0, 0] = 5
    rgb(changed).save(root / "annotations" / "panoptic_val2017" / "000000000001.png")
    seen.append(load_dataset("coco-panoptic", "val2017", root).fingerprint)
    with (root / "val2017" / "000000000000.jpg").open("ab") as handle:
        handle.write(b"\0")
    seen.append(load_dataset("coco-panoptic", "val2017", root).fingerprint)
    edit(root, lambda c: c["annotations"][0]["segments_info"][0].update(category_id=17))
    seen.append(load_dataset("coco-panoptic", "val2017", root).fingerprint)
    assert len(set(seen)) == len(seen)
    assert load_dataset("coco-panoptic", "val2017", root).fingerprint == seen[-1]


def _fault(root: Path, fault: str) -> None:
    if fault == "annotation file":
        (root / "annotations" / "panoptic_val2017.json").unlink()
    elif fault == "truncated JSON":
        path = root / "annotations" / "panoptic_val2017.json"
        path.write_text(path.read_text()[:-40])
    elif fault == "folder of maps":
        (root / "annotations" / "panoptic_val2017").rename(root / "elsewhere")
    elif fault == "folder of images":
        (root / "val2017").rename(root / "elsewhere")
    elif fault == "one image":
        (root / "val2017" / "000000000001.jpg").unlink()
    elif fault == "one map":
        (root / "annotations" / "panoptic_val2017" / "000000000001.png").unlink()
    elif fault == "missing key":
        edit(root, lambda c: c["annotations"][0].pop("segments_info"))
    elif fault == "unknown category":
        edit(root, lambda c: c["annotations"][0]["segments_info"][0].update(category_id=99))
    elif fault == "unlabelled image":
        edit(root, lambda c: c["annotations"].pop())
    elif fault == "path outside":
        edit(root, lambda c: c["images"][0].update(file_name="../../x.jpg"))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("annotation file", "annotations/panoptic_val2017.json"),
        ("truncated JSON", "not valid JSON"),
        ("folder of maps", "no such folder of PNGs"),
        ("folder of images", "no such folder of images"),
        ("one image", r"000000000001.jpg: no such image \(1 of 2 missing\)"),
        ("one map", r"000000000001.png: no such panoptic map \(1 of 2 missing\)"),
        ("missing key", "segments_info"),
        ("unknown category", "99"),
        ("unlabelled image", "1 of 2 images have no panoptic annotation"),
        ("path outside", "outside the dataset's folder"),
    ],
)
def test_what_is_missing_is_named_in_one_line(tmp_path: Path, fault: str, says: str) -> None:
    root = write(tmp_path)
    _fault(root, fault)
    with pytest.raises(DataError, match=says) as caught:
        load_dataset("coco-panoptic", "val2017", root)
    assert "\n" not in str(caught.value)
    assert caught.value.fix


def test_a_map_of_another_size_an_unlisted_segment_and_a_gray_map_are_errors(tmp_path: Path) -> None:
    root = write(tmp_path)
    data = load_dataset("coco-panoptic", "val2017", root)
    target = root / "annotations" / "panoptic_val2017" / "000000000001.png"
    rgb(IDS[:2]).save(target)
    with pytest.raises(DataError, match="4x2 pixels, but its image has 4x3"):
        data.semantic(1)
    rgb(IDS + 7).save(target)
    with pytest.raises(DataError, match="segment 7 is not in segments_info"):
        data.semantic(1)
    Image.fromarray(IDS.astype(np.uint8)).save(target)
    with pytest.raises(DataError, match="mode L, not an 8-bit RGB map"):
        data.semantic(1)
    target.write_bytes(target.read_bytes()[:30])
    with pytest.raises(DataError, match="can't be decoded"):
        data.semantic(1)


def test_an_image_of_another_size_than_the_annotations_say(tmp_path: Path) -> None:
    root = write(tmp_path)
    Image.new("RGB", (3, 4)).save(root / "val2017" / "000000000000.jpg")
    data = load_dataset("coco-panoptic", "val2017", root)
    with pytest.raises(DataError, match="3x4 pixels upright, but the annotations say 4x3"):
        data.image(0)


def test_unknown_option_no_data_and_a_file_that_is_no_archive(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown field 'clases'"):
        load_dataset("coco-panoptic", "val2017", write(tmp_path), {"clases": "super"})
    with pytest.raises(DataError, match="pass --data"):
        load_dataset("coco-panoptic", "val2017")
    (tmp_path / "x.txt").touch()
    with pytest.raises(DataError, match="neither a folder nor one of"):
        load_dataset("coco-panoptic", "val2017", tmp_path / "x.txt")
    (tmp_path / "x.zip").write_bytes(b"PK\3\4 no zip")
    with pytest.raises(DataError, match="can't be read as a zip"):
        load_dataset("coco-panoptic", "val2017", tmp_path / "x.zip")
