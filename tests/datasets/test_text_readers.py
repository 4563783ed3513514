"""Readers of pages with text and of word crops, on real receipts and on tiny copies of every layout."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rice_eval.datasets import load_dataset
from rice_eval.datasets.check import check, check_split
from rice_eval.datasets.recognition import whole
from rice_eval.datasets.text import text_line
from rice_eval.datasets.text_crops import TextCrops
from rice_eval.errors import DataError
from rice_eval.protocols.ocr_lines import remarks

SQUARE = [[1, 2], [9, 2], [9, 5], [1, 5]]


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), (7, 99, 180)).save(path)


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")


def test_real_receipts(receipts: Path) -> None:
    data: Any = load_dataset("sroie", "val", receipts)
    assert len(data) == 20
    for index in range(len(data)):
        rows = (receipts / "val" / "box" / f"{data.image_id(index)}.csv").read_text().splitlines()
        rows = [row for row in rows if row.strip()]
        lines = data.text(index)
        assert [line.text for line in lines] == [row.split(",", 8)[8].strip() for row in rows]
        height, width = data.image(index).shape[:2]
        assert data.size(index) == (height, width)
        for line, row in zip(lines, rows):
            assert not line.ignore
            assert line.polygon.tolist() == np.array(row.split(",")[:8], float).reshape(4, 2).tolist()
            assert (line.polygon >= 0).all()
            assert (line.polygon <= [width, height]).all()
        assert set(data.fields(index)) <= {"company", "date", "address", "total"}
    assert not [f for f in check("sroie", receipts) if f.level == "problem"]


def write_sroie(root: Path) -> Path:
    for name in ("000", "001"):
        photo(root / "val" / "img" / f"{name}.jpg")
        put(
            root / "val" / "box" / f"{name}.csv",
            "1,2,9,2,9,5,1,5,TOTAL, RM 9.50\r\n\r\n1,2,9,2,9,5,1,5,Straße \u2028x\n",
        )
        put(root / "val" / "key" / f"{name}.json", json.dumps({"total": "9.50"}))
    return root


def test_flat_polygons_and_blank_transcripts_are_notes(tmp_path: Path) -> None:
    root = write_sroie(tmp_path)
    box = next((root / "val" / "box").glob("*.csv"))
    box.write_text("0,0,9,0,9,5,0,5,fine\n2,2,9,2,9,2,2,2,flat\n")
    found = [f for f in check("sroie", root, splits=["val"]) if f.image == box.stem]
    assert [(f.what, f.level) for f in found] == [("the polygon of text line 2 has no area", "note")]
    assert whole("  ", (10, 30))[0].ignore
    assert not whole(" a", (10, 30))[0].ignore


def test_sroie_commas_blank_lines_and_fields(tmp_path: Path) -> None:
    data: Any = load_dataset("sroie", "val", write_sroie(tmp_path))
    assert [line.text for line in data.text(0)] == ["TOTAL, RM 9.50", "Straße \u2028x"]
    assert data.fields(1) == {"total": "9.50"}
    before = data.fingerprint
    put(tmp_path / "val" / "key" / "001.json", json.dumps({"total": "9.51"}))
    assert load_dataset("sroie", "val", tmp_path).fingerprint != before


@pytest.mark.parametrize("row", ["1,2,9,2,9,5,1,TOTAL", "a,2,9,2,9,5,1,5,TOTAL", "nan,2,9,2,9,5,1,5,x"])
def test_a_malformed_line_is_named(tmp_path: Path, row: str) -> None:
    root = write_sroie(tmp_path)
    put(root / "val" / "box" / "001.csv", f"1,2,9,2,9,5,1,5,ok\n{row}\n")
    with pytest.raises(DataError, match=r"001.csv:2: "):
        load_dataset("sroie", "val", root).text(1)


def test_what_is_missing_or_not_utf8(tmp_path: Path) -> None:
    root = write_sroie(tmp_path)
    (root / "val" / "box" / "001.csv").write_bytes("1,2,9,2,9,5,1,5,Caf\xe9".encode("latin-1"))
    with pytest.raises(DataError, match=r"001.csv: not UTF-8"):
        load_dataset("sroie", "val", root).text(1)
    (root / "val" / "box" / "001.csv").unlink()
    with pytest.raises(DataError, match="001 has no box file"):
        load_dataset("sroie", "val", root)
    (root / "val" / "img" / "001.jpg").unlink()
    (root / "val" / "img" / "000.jpg").unlink()
    with pytest.raises(DataError, match="val/img, which is not there"):
        load_dataset("sroie", "val", root)


def write_icdar(root: Path, zipped: bool) -> Path:
    pairs = {
        "ch4_training_images": ("img_1.jpg", None),
        "ch4_training_localization_transcription_gt": (
            "gt_img_1.txt", "\ufeff1,2,9,2,9,5,1,5,Genaxis, Ltd\r\n1,2,1,5,9,5,9,2,###\r\n1,2,9,2,9,5,1,5,\r\n",
        ),
        "ch4_test_images": ("img_1.jpg", None),
        "Challenge4_Test_Task1_GT": ("gt_img_1.txt", "\ufeff1,2,9,2,9,5,1,5,other\r\n"),
    }  # fmt: skip
    for folder, (name, text) in pairs.items():
        path = root / folder / name
        if text is None:
            photo(path)
        else:
            put(path, text)
        if zipped:
            with zipfile.ZipFile(root / f"{folder}.zip", "w") as archive:
                archive.write(path, name)
            path.unlink()
            path.parent.rmdir()
    return root


@pytest.mark.parametrize("zipped", [False, True])
def test_icdar2015(tmp_path: Path, zipped: bool) -> None:
    root = write_icdar(tmp_path, zipped)
    data = load_dataset("icdar2015", "train", root)
    lines = data.text(0)
    assert [(line.text, line.ignore) for line in lines] == [("Genaxis, Ltd", False), ("###", True), ("", True)]
    assert lines[1].polygon.tolist() == SQUARE  # turned clockwise, same first point
    assert load_dataset("icdar2015", "test", root).text(0)[0].text == "other"
    assert data.image(0).shape == (8, 12, 3)


TOTAL = """x: [[115 503 494 115]], y: [[322 346 426 404]], ornt: [u'm'], transcriptions: [u'nauGHTY']
x: [[  1   2   3
    4   5]], y: [[ 9  8
  7  6 12]], ornt: [u'c'], transcriptions: [u"it's [x]"]
x: [[1 9 9 1]], y: [[2 2 5 5]], ornt: [u'#'], transcriptions: [u'#']
x: [[1 9 9 1]], y: [[2 2 5 5]], ornt: [], transcriptions: []
"""


def test_totaltext_txt(tmp_path: Path) -> None:
    photo(tmp_path / "Images" / "Train" / "img11.jpg")
    truth = tmp_path / "Groundtruth" / "Polygon" / "Train" / "poly_gt_img11.txt"
    put(truth, TOTAL)
    lines = load_dataset("totaltext", "train", tmp_path).text(0)
    assert [(line.text, line.ignore) for line in lines] == [
        ("nauGHTY", False), ("it's [x]", False), ("#", True), ("", True),
    ]  # fmt: skip
    assert [len(line.polygon) for line in lines] == [4, 5, 4, 4]
    for broken in (TOTAL.replace("y: [[322", "y: [[322 1"), TOTAL.replace("ornt", "orient", 1), TOTAL[:60]):
        put(truth, broken)
        with pytest.raises(DataError, match=r"poly_gt_img11.txt: record \d"):
            load_dataset("totaltext", "train", tmp_path).text(0)


def test_totaltext_mat(tmp_path: Path) -> None:
    io = pytest.importorskip("scipy.io")
    photo(tmp_path / "Images" / "Test" / "img1.jpg")
    truth = tmp_path / "Groundtruth" / "Polygon" / "Test" / "poly_gt_img1.mat"
    truth.parent.mkdir(parents=True)
    rows = np.empty((3, 6), dtype=object)
    for row, (text, ornt) in enumerate((("ASRAMA", "c"), ("#", "#"), ("", "h"))):
        cells = ["x:", np.array([[1, 9, 9, 1]], np.uint16), "y:", np.array([[2, 2, 5, 5]], np.uint16), text, ornt]
        for column, cell in enumerate(cells):
            rows[row, column] = cell
    io.savemat(truth, {"polygt": rows})
    lines = load_dataset("totaltext", "test", tmp_path).text(0)
    assert [(line.text, line.ignore) for line in lines] == [("ASRAMA", False), ("#", True), ("", True)]
    assert lines[0].polygon.tolist() == SQUARE
    truth.write_bytes(truth.read_bytes()[:150])
    with pytest.raises(DataError, match="not a ground truth of Total-Text"):
        load_dataset("totaltext", "test", tmp_path).text(0)


def test_funsd(tmp_path: Path) -> None:
    word = {"box": [1, 2, 9, 5], "text": "Date:"}
    empty = {"box": [1, 2, 9, 5], "text": ""}
    form = [{"box": [1, 2, 9, 5], "text": "Date:", "label": "question", "words": [word, empty], "linking": [], "id": 0}]
    photo(tmp_path / "dataset" / "testing_data" / "images" / "82092117.png")
    truth = tmp_path / "dataset" / "testing_data" / "annotations" / "82092117.json"
    put(truth, json.dumps({"form": form}))
    words, entities = (load_dataset("funsd", "test", tmp_path, {"level": k}) for k in ("words", "entities"))
    assert [(line.text, line.ignore) for line in words.text(0)] == [("Date:", False), ("", True)]
    assert [line.polygon.tolist() for line in entities.text(0)] == [SQUARE]
    assert words.fingerprint != entities.fingerprint
    for broken, says in (({"forms": []}, "no list 'form'"), ({"form": [{"words": [{"box": [1]}]}]}, "malformed entry")):
        put(truth, json.dumps(broken))
        with pytest.raises(DataError, match=says):
            words.text(0)


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=3, max_size=9))
def test_polygons_are_turned_clockwise_and_keep_their_first_point(points: list[tuple[int, int]]) -> None:
    got = text_line(points, "x", False, "here").polygon
    x, y = got.T
    assert (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() >= 0
    assert tuple(got[0]) == points[0]
    assert sorted(map(tuple, got.tolist())) == sorted(points)


# Crops.


def encoded(value: int) -> bytes:
    out = BytesIO()
    Image.new("RGB", (30, 10), (value, 0, 0)).save(out, "PNG")
    return out.getvalue()


def write_lmdb(root: Path, entries: dict[str, bytes]) -> Path:
    lmdb = pytest.importorskip("lmdb")
    root.mkdir(parents=True)
    environment = lmdb.open(str(root), map_size=1 << 20)
    with environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key.encode(), value)
    environment.close()
    return root


def crops() -> dict[str, bytes]:
    return {
        "num-samples": b"5",
        "image-000000001": encoded(1), "label-000000001": b"Hello",
        "image-000000002": b"no image", "label-000000002": b"corrupt",
        "image-000000003": encoded(3), "label-000000003": b"",
        "image-000000004": encoded(4), "label-000000004": "naïve Ω".encode(),
        "image-000000005": encoded(5), "label-000000005": b"\xff\xfe",
    }  # fmt: skip


def test_lmdb_counts_what_is_wrong_and_drops_nothing(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "evaluation" / "IIIT5k", crops())
    data: Any = load_dataset("lmdb", "evaluation/IIIT5k", tmp_path)
    same = load_dataset("lmdb", "IIIT5k", tmp_path / "evaluation" / "IIIT5k")
    assert same.fingerprint == data.fingerprint
    assert len(data) == 5
    line = data.text(0)[0]
    assert (line.text, line.ignore, line.polygon.tolist()) == ("Hello", False, [[0, 0], [30, 0], [30, 10], [0, 10]])
    assert data.text(2)[0].ignore
    assert data.label(3) == "naïve Ω"
    assert data.image(3)[0, 0].tolist() == [4, 0, 0]
    with pytest.raises(DataError, match="image-000000002: can't be decoded"):
        data.image(1)
    with pytest.raises(DataError, match="label-000000005 is not UTF-8"):
        data.text(4)
    assert data.faults() == {"image": ("000000002",), "label": ("000000005",), "empty": ("000000003",)}
    again = pickle.loads(pickle.dumps(data))
    assert np.array_equal(again.image(0), data.image(0))
    found = check("lmdb", tmp_path, splits=["evaluation/IIIT5k"], full=True)
    assert {(f.image, f.level) for f in found} == {
        ("000000002", "problem"), ("000000003", "note"), ("000000005", "problem"),
    }  # fmt: skip


def test_lmdb_faults_of_the_file(tmp_path: Path) -> None:
    short = crops()
    del short["label-000000004"]
    root = write_lmdb(tmp_path / "short", short)
    with pytest.raises(DataError, match="has no label-000000004, though num-samples is 5"):
        load_dataset("lmdb", "short", tmp_path).text(3)
    write_lmdb(tmp_path / "none", {"a": b"b"})
    with pytest.raises(DataError, match="no num-samples"):
        load_dataset("lmdb", "none", tmp_path)
    with pytest.raises(DataError, match="holds no data.mdb"):
        load_dataset("lmdb", "elsewhere", tmp_path)
    with pytest.raises(DataError, match="holds no data.mdb"):
        load_dataset("lmdb", "other", root)  # the folder itself, under another name: no two splits of one file
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "data.mdb").write_bytes(b"not an LMDB" * 1000)
    with pytest.raises(DataError, match="can't be opened as an LMDB"):
        load_dataset("lmdb", "broken", tmp_path)


def test_a_folder_of_lmdbs_is_one_split(tmp_path: Path) -> None:
    """MJSynth as everyone ships it: three LMDBs below ``training/MJ``."""
    other = {"num-samples": b"1", "image-000000001": encoded(9), "label-000000001": b"second"}
    write_lmdb(tmp_path / "training" / "MJ" / "MJ_train", crops())
    write_lmdb(tmp_path / "training" / "MJ" / "MJ_valid", other)
    data: Any = load_dataset("lmdb", "training/MJ", tmp_path)
    assert len(data) == 6
    assert [data.image_id(i) for i in (0, 4, 5)] == ["MJ_train/000000001", "MJ_train/000000005", "MJ_valid/000000001"]
    assert data.label(5) == "second"
    assert data.image(5)[0, 0].tolist() == [9, 0, 0]
    assert data.faults()["image"] == ("MJ_train/000000002",)
    alone = load_dataset("lmdb", "training/MJ/MJ_valid", tmp_path)
    assert (len(alone), alone.image_id(0)) == (1, "000000001")
    assert alone.fingerprint != data.fingerprint
    with pytest.raises(DataError, match="MJ_train:image-000000002"):
        data.image(1)


def test_lmdb_fingerprint_changes_with_a_label(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "a" / "set", crops())
    write_lmdb(tmp_path / "b" / "set", {**crops(), "label-000000001": b"Hallo"})
    write_lmdb(tmp_path / "c" / "set", {**crops(), "image-000000002": b"no image!"})
    assert len({load_dataset("lmdb", "set", tmp_path / key).fingerprint for key in "abc"}) == 3


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("val.txt", "w/1.png\tHello world\nw/2.png\t\nw/3.png\tπ,\"x\"\n"),
        ("val.txt", "w/1.png Hello world\nw/2.png\nw/3.png π,\"x\"\n"),
        ("val.txt", '\ufeffw/1.png, "Hello world"\r\nw/2.png, ""\r\nw/3.png, "π,\\"x\\""\r\n'),
        ("val.jsonl", '{"filename": "w/1.png", "text": "Hello world"}\n{"filename": "w/2.png", "text": ""}\n'
                      '{"filename": "w/3.png", "text": "π,\\"x\\""}\n'),
    ],
)  # fmt: skip
def test_label_files(tmp_path: Path, name: str, body: str) -> None:
    put(tmp_path / name, body)
    for number in (1, 2, 3):
        photo(tmp_path / "pictures" / "w" / f"{number}.png")
    options = {"labels": f"{{split}}{Path(name).suffix}", "images": "pictures"}
    data = load_dataset("label-file", "val", tmp_path, options)
    assert [data.text(i)[0].text for i in range(3)] == ["Hello world", "", 'π,"x"']
    assert [data.text(i)[0].ignore for i in range(3)] == [False, True, False]
    (tmp_path / "pictures" / "w" / "2.png").unlink()
    with pytest.raises(DataError, match=r"2.png: no such image \(1 of 3 missing\)"):
        load_dataset("label-file", "val", tmp_path, options)


def union14m(root: Path, benchmark_prefix: str, train_prefix: str, suffix: str) -> None:
    """Two crops of a benchmark and one a difficulty, in the folders and forms that Union14M unpacks to."""

    def table(rows: list[tuple[str, str]]) -> str:
        if suffix == "jsonl":
            return "".join(json.dumps({"filename": name, "text": text}) + "\n" for name, text in rows)
        entries = [{"img_path": name, "instances": [{"text": text}]} for name, text in rows]
        return json.dumps({"metainfo": {"task_name": "textrecog"}, "data_list": entries})

    bench = root / "Union14M-Benchmarks" / "curve"
    put(
        bench / f"annotation.{suffix}", table([(f"{benchmark_prefix}a.png", "CURVE"), (f"{benchmark_prefix}b.png", "")])
    )
    for name in "ab":
        photo(bench / "imgs" / f"{name}.png")
    folder = "mmocr-0.x" if suffix == "jsonl" else "mmocr1.0"
    for k, level in enumerate(("easy", "medium", "normal", "hard", "challenging")):
        rows = [(f"{train_prefix}art_curve/imgs/{k}.png", level)]
        put(root / "train_annos" / folder / f"train_{level}.{suffix}", table(rows))
        photo(root / "full_images" / "art_curve" / "imgs" / f"{k}.png")


@pytest.mark.parametrize(
    ("benchmark_prefix", "train_prefix", "suffix"),
    [("curve/imgs/", "", "jsonl"), ("imgs/", "full_images/", "json"), ("", "full_images/", "jsonl")],
)
def test_union14m(tmp_path: Path, benchmark_prefix: str, train_prefix: str, suffix: str) -> None:
    root = tmp_path / "Union14M-L"
    union14m(root, benchmark_prefix, train_prefix, suffix)
    data = load_dataset("union14m", "curve", tmp_path)
    assert [data.text(i)[0].text for i in range(2)] == ["CURVE", ""]
    assert [data.text(i)[0].ignore for i in range(2)] == [False, True]
    assert data.fingerprint == load_dataset("union14m", "curve", root).fingerprint
    train = load_dataset("union14m", "train", root)
    assert [train.text(i)[0].text for i in range(5)] == ["easy", "medium", "normal", "hard", "challenging"]
    assert load_dataset("union14m", "train_hard", root).text(0)[0].text == "hard"
    assert train.image(0).shape[2] == 3
    assert {(f.image, f.level) for f in check("union14m", root, splits=["curve"])} == {("b", "note")}
    with pytest.raises(DataError, match="holds no val_annos.jsonl"):
        load_dataset("union14m", "val", root)
    with pytest.raises(DataError, match="artistic"):
        load_dataset("union14m", "artistic", root)
    with pytest.raises(DataError, match="no split 'curved'"):
        load_dataset("union14m", "curved", root)
    (root / "full_images" / "art_curve" / "imgs" / "3.png").unlink()
    with pytest.raises(DataError, match=r"3.png: no such image \(1 of 5 missing\)"):
        load_dataset("union14m", "train", root)
    shutil.rmtree(root / "Union14M-Benchmarks" / "curve" / "imgs")
    with pytest.raises(DataError, match="no such image below"):
        load_dataset("union14m", "curve", root)


def words_table(root: Path, name: str, key: str, folder: str) -> dict[str, Any]:
    """A table of two training images and one of val, with a legible word, an illegible one and one without a polygon."""
    entries = {
        "1": {"id": 1, "set": "train", "width": 12, "height": 8, "file_name": "train/b.jpg"},
        "2": {"id": 2, "set": "train", "width": 12, "height": 8, "file_name": "train/a.jpg"},
        "3": {"id": 3, "set": "val", "width": 12, "height": 8, "file_name": "train/c.jpg"},
    }
    shape = {"bbox": [1.0, 2.0, 10.0, 5.0], key: [1, 2, 11, 2, 12, 6, 1, 7]}
    anns = {
        "7": {"id": 7, "image_id": 1, "utf8_string": "Hi", "legibility": "legible", **shape},
        "8": {
            "id": 8,
            "image_id": 1,
            "utf8_string": "." if key == "points" else "",
            "legibility": "illegible",
            **shape,
        },
        "9": {"id": 9, "image_id": 3, "utf8_string": "ça", "legibility": "legible", **shape, key: []},
    }
    table = {"imgs": entries, "anns": anns, "imgToAnns": {"1": [7, 8], "2": [], "3": [9]}}
    put(root / name, json.dumps(table))
    for letter in "abc":
        photo(root / folder / f"{letter}.jpg")
    return table


def test_coco_text(tmp_path: Path) -> None:
    table = words_table(tmp_path, "cocotext.v2.json", "mask", "train2014")
    data = load_dataset("coco-text", "train", tmp_path)
    assert [data.image_id(i) for i in range(len(data))] == ["b", "a"]
    legible, not_legible = data.text(0)
    assert (legible.text, legible.ignore, legible.polygon.tolist()) == ("Hi", False, [[1, 2], [11, 2], [12, 6], [1, 7]])
    assert not_legible.ignore
    assert data.text(1) == ()
    (word,) = load_dataset("coco-text", "val", tmp_path).text(0)
    assert (word.text, word.polygon.tolist()) == ("ça", [[1, 2], [11, 2], [11, 7], [1, 7]])
    boxes = load_dataset("coco-text", "train", tmp_path, {"outline": "box"})
    assert boxes.text(0)[0].polygon.tolist() == [[1, 2], [11, 2], [11, 7], [1, 7]]
    assert boxes.fingerprint != data.fingerprint
    assert np.array_equal(pickle.loads(pickle.dumps(data)).text(0)[0].polygon, legible.polygon)
    assert [f.level for f in check("coco-text", tmp_path)] == ["note"]
    del table["anns"]["7"]["legibility"]
    put(tmp_path / "cocotext.v2.json", json.dumps(table))
    with pytest.raises(DataError, match="image 1: a malformed entry"):
        load_dataset("coco-text", "train", tmp_path)
    put(tmp_path / "cocotext.v2.json", "{}")
    with pytest.raises(DataError, match="has no tables imgs, anns and imgToAnns"):
        load_dataset("coco-text", "train", tmp_path)


def test_textocr(tmp_path: Path) -> None:
    words_table(tmp_path, "TextOCR_0.1_train.json", "points", "train_images")
    data = load_dataset("textocr", "train", tmp_path)
    assert len(data) == 3
    assert [(t.text, t.ignore) for t in data.text(0)] == [("Hi", False), (".", True)]
    assert data.image(0).shape == (8, 12, 3)
    with pytest.raises(DataError, match="TextOCR_0.1_val.json"):
        load_dataset("textocr", "val", tmp_path)
    (tmp_path / "train_images" / "c.jpg").unlink()
    with pytest.raises(DataError, match=r"c.jpg: no such image \(1 of 3 missing\)"):
        load_dataset("textocr", "train", tmp_path)


def test_malformed_label_files(tmp_path: Path) -> None:
    put(tmp_path / "val.json", '{"data_list": [{"img_path": "1.png", "instances": []}]}')
    with pytest.raises(DataError, match="entry 1 of data_list has no img_path with one text"):
        load_dataset("label-file", "val", tmp_path, {"labels": "val.json"})
    put(tmp_path / "val.jsonl", '{"filename": "1.png"}\n')
    with pytest.raises(DataError, match="val.jsonl:1: not an object with filename and text"):
        load_dataset("label-file", "val", tmp_path, {"labels": "val.jsonl"})
    put(tmp_path / "val.txt", "1.png\ta\n1.png\tb\n")
    with pytest.raises(DataError, match="lists 1.png twice"):
        load_dataset("label-file", "val", tmp_path)


@pytest.mark.parametrize("text", ["null", "7", '"x\\ud83d"'])
def test_transcripts_of_json_are_text(tmp_path: Path, text: str) -> None:
    photo(tmp_path / "1.png")
    put(tmp_path / "val.jsonl", f'{{"filename": "1.png", "text": {text}}}\n')
    with pytest.raises(DataError, match=r"val.jsonl:1: .*transcript"):
        load_dataset("label-file", "val", tmp_path, {"labels": "val.jsonl"})
    put(tmp_path / "val.json", f'{{"data_list": [{{"img_path": "1.png", "instances": [{{"text": {text}}}]}}]}}')
    with pytest.raises(DataError, match=r"entry 1 of data_list .*transcript"):
        load_dataset("label-file", "val", tmp_path, {"labels": "val.json"})


@pytest.mark.parametrize("content", ["{}", "[]", "5", '{"data_list": 5}', '{"data_list": {"a": 1}}'])
def test_a_json_of_labels_without_its_list(tmp_path: Path, content: str) -> None:
    put(tmp_path / "val.json", content)
    with pytest.raises(DataError, match="val.json: has no list data_list"):
        load_dataset("label-file", "val", tmp_path, {"labels": "val.json"})


def test_lmdb_files_that_are_cut_off_or_count_wrong(tmp_path: Path) -> None:
    entries = {key: value * 4000 if key.startswith("label") else value for key, value in crops().items()}
    whole = write_lmdb(tmp_path / "whole", entries) / "data.mdb"
    for share in (2, 3):
        (tmp_path / f"cut{share}").mkdir()
        (tmp_path / f"cut{share}" / "data.mdb").write_bytes(whole.read_bytes()[: whole.stat().st_size // share])
        with pytest.raises(DataError, match=r"data.mdb: cut off, \d+ of \d+ bytes"):
            load_dataset("lmdb", f"cut{share}", tmp_path)
    write_lmdb(tmp_path / "few", {**crops(), "num-samples": b"3"})
    few: Any = load_dataset("lmdb", "few", tmp_path)
    assert (len(few), few.beyond) == (3, (str(tmp_path / "few"),))
    assert not load_dataset("lmdb", "whole", tmp_path).beyond  # type: ignore[attr-defined]
    assert remarks(TextCrops(few, 32), "test")[-1].endswith("few has entries after its num-samples, which are not read")
    found = [f.what for f in check_split(few) if "num-samples" in f.what]
    assert found == [f"{tmp_path / 'few'}: holds entries after its num-samples"]
    write_lmdb(tmp_path / "many", {**crops(), "num-samples": b"1000000000"})
    with pytest.raises(DataError, match="num-samples is 1000000000, but the file has 11 keys"):
        load_dataset("lmdb", "many", tmp_path)


def test_linked_lmdbs_are_parts_too(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "elsewhere" / "a", crops())
    write_lmdb(tmp_path / "training" / "MJ" / "b", crops())
    (tmp_path / "training" / "MJ" / "a").symlink_to(tmp_path / "elsewhere" / "a")
    (tmp_path / "training" / "MJ" / "back").symlink_to(tmp_path / "training")
    ids = {load_dataset("lmdb", "training/MJ", tmp_path).image_id(i) for i in range(10)}
    assert {key.split("/")[0] for key in ids} == {"a", "b"}


def test_two_truths_of_one_image_and_lines_that_returns_part(tmp_path: Path) -> None:
    root = write_sroie(tmp_path)
    put(root / "val" / "box" / "001.csv", "1,2,9,2,9,5,1,5,a\r1,2,9,2,9,5,1,5,b\r")
    with pytest.raises(DataError, match="001.csv:1: .*carriage return"):
        load_dataset("sroie", "val", root).text(1)
    put(root / "val" / "box" / "001.csv", "1,nan,9,2,9,5,1,5,a\n")
    with pytest.raises(DataError, match="001.csv:1: a polygon with a coordinate that is no finite number"):
        load_dataset("sroie", "val", root).text(1)
    put(root / "val" / "box" / "001.txt", "1,2,9,2,9,5,1,5,a\n")
    with pytest.raises(DataError, match="001.csv and 001.txt are both there for one image; remove one of them"):
        load_dataset("sroie", "val", root)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"utf8_string": None, "legibility": "illegible"}, ""),
        ({"utf8_string": 7, "legibility": "legible"}, None),
        (5, None),
    ],
)
def test_coco_text_entries_without_text(tmp_path: Path, entry: Any, expected: str | None) -> None:
    photo(tmp_path / "train2014" / "a.jpg")
    word = {"bbox": [1, 1, 5, 5], **entry} if isinstance(entry, dict) else entry
    image = {"set": "val", "width": 12, "height": 8, "file_name": "a.jpg"}
    put(tmp_path / "cocotext.v2.json", json.dumps({"imgs": {"1": image}, "anns": {"9": word}, "imgToAnns": {"1": [9]}}))
    if expected is None:
        with pytest.raises(DataError, match="image 1: a malformed entry"):
            load_dataset("coco-text", "val", tmp_path)
    else:
        (line,) = load_dataset("coco-text", "val", tmp_path).text(0)
        assert (line.text, line.ignore) == (expected, True)


def test_lines_outside_their_image_are_counted(tmp_path: Path) -> None:
    root = write_sroie(tmp_path)
    rows = [
        "1,2,9,2,9,5,1,5,in",
        "-9,2,-1,2,-1,5,-9,5,left",
        "12,2,19,2,19,5,12,5,right",
        "3,3,3,3,3,3,3,3,dot",
        "8,2,19,2,19,5,8,5,half",
    ]
    put(root / "val" / "box" / "001.csv", "\n".join(rows))
    cut = TextCrops(load_dataset("sroie", "val", root), 32)
    assert (len(cut), cut.outside) == (7, 3)
    assert "test: 3 lines lie outside their image or have no area; what is there is read" in remarks(cut, "test")
