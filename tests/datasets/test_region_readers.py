"""Readers of regions with text, on tiny copies of every layout."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rice_eval.datasets import load_dataset
from rice_eval.errors import DataError

H, W = 20, 40


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (W, H), (7, 99, 180)).save(path)


def write_refcoco(root: Path, folder: str = "refcoco", images: str = "train2014") -> Path:
    names = {7: "COCO_train2014_000000000007.jpg", 9: "COCO_train2014_000000000009.jpg"}
    content = {
        "images": [{"id": key, "file_name": name, "height": H, "width": W} for key, name in names.items()],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {"id": 100, "image_id": 9, "category_id": 18, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2, 4, 2, 4, 6]]},
            {"id": 101, "image_id": 7, "category_id": 1, "bbox": [5, 5, 9, 9], "segmentation": [[5, 5, 14, 5, 14, 14]]},
            {"id": 102, "image_id": 9, "category_id": 1, "bbox": [0, 0, 8, 8], "segmentation": [[0, 0, 8, 0, 8, 8]]},
        ],
    }
    refs = [
        {"ref_id": 0, "ann_id": 102, "image_id": 9, "category_id": 1, "split": "val", "file_name": "COCO_train2014_000000000009_102.jpg",
         "sentences": [{"sent": "left man", "sent_id": 5, "raw": "Left man", "tokens": ["left", "man"]},
                       {"sent": "the man", "sent_id": 6, "raw": "the man", "tokens": ["the", "man"]}]},
        {"ref_id": 1, "ann_id": 100, "image_id": 9, "category_id": 18, "split": "val", "sentences": [{"sent": "dog", "sent_id": 7}]},
        {"ref_id": 2, "ann_id": 101, "image_id": 7, "category_id": 1, "split": "testA", "sentences": [{"sent": "her", "sent_id": 8}]},
    ]  # fmt: skip
    (root / folder).mkdir(parents=True)
    (root / folder / "instances.json").write_text(json.dumps(content))
    (root / folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    for name in names.values():
        photo(root / images / name)
    return root


@pytest.mark.parametrize("images", ["train2014", "images/train2014", "images/mscoco/images/train2014"])
def test_refcoco(tmp_path: Path, images: str) -> None:
    pytest.importorskip("pycocotools")
    data: Any = load_dataset("refcoco", "val", write_refcoco(tmp_path, images=images))
    assert [data.image_id(i) for i in range(len(data))] == ["COCO_train2014_000000000009"]
    found = data.instances(0)
    assert found.names == ("left man", "the man", "dog")
    assert found.boxes.tolist() == [[0, 0, 8, 8], [0, 0, 8, 8], [1, 2, 4, 6]]
    assert [data.things[k] for k in found.labels] == ["person", "person", "dog"]
    assert found.ids.tolist() == [5, 6, 7]
    assert len(found.masks) == 3
    assert data.proposals(0).ids.tolist() == [100, 102]
    assert data.image(0).shape == (H, W, 3)
    again = pickle.loads(pickle.dumps(data))
    assert again.instances(0).names == found.names
    other = load_dataset("refcoco", "testA", tmp_path, {"masks": False})
    assert other.instances(0).names == ("her",)
    assert other.fingerprint != data.fingerprint


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 3",)


def test_refcoco_faults(tmp_path: Path) -> None:
    root = write_refcoco(tmp_path)
    with pytest.raises(DataError, match="its splits: testA, val"):
        load_dataset("refcoco", "testB", root)
    with pytest.raises(DataError, match=r"refcoco\+/refs\(unc\).p, which is not there"):
        load_dataset("refcoco", "val", root, {"set": "refcoco+"})
    refs = root / "refcoco" / "refs(unc).p"
    whole = refs.read_bytes()
    for broken in (whole[:50], pickle.dumps([Bomb()]), pickle.dumps({"a": 1}), b""):
        refs.write_bytes(broken)
        with pytest.raises(DataError, match="not a plain pickle of references"):
            load_dataset("refcoco", "val", root)
    content = pickle.loads(whole)
    content[0]["ann_id"] = 999
    refs.write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match="refers to object 999"):
        load_dataset("refcoco", "val", root, {"masks": False})


def test_grit(tmp_path: Path) -> None:
    caption = "a dog on the grass"
    chunks = [[0, 5, 0.25, 0.5, 0.75, 1.0, 0.9], [9, 18, 0, 0.5, 1, 1, 0.4]]
    lines = [
        {
            "key": "000000001",
            "caption": caption,
            "noun_chunks": chunks,
            "ref_exps": [[0, 18, 0.25, 0.5, 0.75, 1.0, 0.9]],
        },
        {"image": "sub/two.jpg", "caption": "nothing", "noun_chunks": [], "ref_exps": []},
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    photo(tmp_path / "pictures" / "000000001.jpg")
    photo(tmp_path / "pictures" / "sub" / "two.jpg")
    data = load_dataset("grit", "train", tmp_path, {"images": "pictures", "phrases": "noun_chunks"})
    assert data.instances(0).names == ("a dog", "the grass")
    assert np.allclose(data.instances(0).boxes, [[10, 10, 30, 20], [0, 10, 40, 20]])
    assert data.instances(1).boxes.shape == (0, 4)
    sure = load_dataset("grit", "train", tmp_path, {"images": "pictures", "phrases": "noun_chunks", "min_score": "0.5"})
    assert sure.instances(0).names == ("a dog",)
    assert sure.fingerprint != data.fingerprint
    assert load_dataset("grit", "train", tmp_path, {"images": "pictures"}).instances(0).names == (caption,)
    (tmp_path / "train.jsonl").write_text(
        json.dumps({"key": "000000001", "caption": "x", "ref_exps": [[0, 1, 0.5, 0, 0.1, 1, 1]]})
    )
    with pytest.raises(DataError, match="train.jsonl:1: no box"):
        load_dataset("grit", "train", tmp_path, {"images": "pictures"})


def test_visual_genome(tmp_path: Path) -> None:
    region = {"region_id": 4, "image_id": 2, "x": 1, "y": 2, "width": 3, "height": 4, "phrase": "a red car"}
    content = [{"id": 2, "regions": [region]}, {"id": 1, "regions": []}]
    (tmp_path / "region_descriptions.json").write_text(json.dumps(content))
    photo(tmp_path / "VG_100K" / "1.jpg")
    photo(tmp_path / "VG_100K_2" / "2.jpg")
    data = load_dataset("visual-genome", "all", tmp_path)
    assert [data.image_id(i) for i in range(2)] == ["1", "2"]
    assert data.instances(1).names == ("a red car",)
    assert data.instances(1).boxes.tolist() == [[1, 2, 4, 6]]
    (tmp_path / "VG_100K_2" / "2.jpg").unlink()
    with pytest.raises(DataError, match="VG_100K_2/2.jpg: no such image"):
        load_dataset("visual-genome", "all", tmp_path)


XML = """<annotation><size><width>40</width><height>20</height></size>
<object><name>11</name><name>12</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object>
<object><name>11</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>6</xmax><ymax>6</ymax></bndbox></object>
<object><name>13</name><scene>1</scene><nobndbox>1</nobndbox></object></annotation>"""


def test_flickr30k_entities(tmp_path: Path) -> None:
    photo(tmp_path / "flickr30k-images" / "36979.jpg")
    for folder, text in (
        ("Annotations", XML),
        ("Sentences", "[/EN#11/people Two men] in [/EN#13/scene a park] .\n[/EN#12/people/other A man] waits .\n"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"36979.{'xml' if folder == 'Annotations' else 'txt'}").write_text(text)
    (tmp_path / "test.txt").write_text("36979\n")
    found = load_dataset("flickr30k-entities", "test", tmp_path).instances(0)
    assert found.names == ("Two men", "Two men", "A man")
    assert found.boxes.tolist() == [[0, 1, 30, 20], [4, 4, 6, 6], [0, 1, 30, 20]]
    (tmp_path / "Annotations" / "36979.xml").write_text(XML[:90])
    with pytest.raises(DataError, match="36979.xml: malformed"):
        load_dataset("flickr30k-entities", "test", tmp_path)
