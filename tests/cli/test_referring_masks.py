"""Command ``referring-masks``: LISA-like predictions against a tiny RefCOCO, and every way they can be wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from rice_eval.cli.main import main

sys.path.insert(0, str(Path(__file__).parent.parent / "datasets"))
coco_mask = pytest.importorskip("pycocotools.mask")


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["referring-masks", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


@pytest.fixture
def copy(tmp_path):
    from test_region_readers import write_refcoco

    return write_refcoco(tmp_path / "data")


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def drawn(y1, y2, x1, x2, size=(20, 40)):
    mask = np.zeros(size, np.uint8, order="F")
    mask[y1:y2, x1:x2] = 1
    rle = coco_mask.encode(mask)
    return {"size": rle["size"], "counts": rle["counts"].decode()}, mask


def rows_of():
    """Answers to the sentences 5, 6 and 7 of image 9: a box, nothing, another box."""
    first, second = drawn(0, 8, 0, 8)[0], drawn(2, 6, 1, 3)[0]
    return [
        {"image_id": "9", "ref_id": 5, "segmentation": first},
        {"image_id": 9, "ref_id": 6, "segmentation": None},
        {"image_id": "COCO_train2014_000000000009", "ref_id": 7, "segmentation": second},
    ]


def test_numbers_equal_plain_pixels(capsys, copy, tmp_path):
    from rice_eval.datasets import load_dataset

    file = write(tmp_path / "found.jsonl", rows_of())
    code, out, err = run(capsys, "--data", copy, "--predictions", file, "--json")
    assert code == 0, err
    found = json.loads(out)
    asked = load_dataset("refcoco", "val", copy).instances(0)
    truth = [coco_mask.decode(dict(m)).astype(bool) for m in asked.masks]
    mine = [drawn(0, 8, 0, 8)[1] > 0, np.zeros((20, 40), bool), drawn(2, 6, 1, 3)[1] > 0]
    both = [(a & b).sum() for a, b in zip(mine, truth)]
    union = [(a | b).sum() for a, b in zip(mine, truth)]
    assert found["metrics"]["ciou"]["value"] == pytest.approx(100 * sum(both) / sum(union))
    assert found["metrics"]["giou"]["value"] == pytest.approx(100 * np.mean(np.divide(both, union)))
    assert (found["expressions"], found["images"]) == (3, 1)
    code, out, _ = run(capsys, "--data", copy, "--predictions", file)
    assert code == 0
    assert "3 expressions in 1 images" in out


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: r[:2], "1 expressions have no prediction, the first is 7"),
        (lambda r: [*r, {"image_id": 9, "ref_id": 99, "segmentation": None}], "has no expression 99"),
        (lambda r: [*r, {"image_id": 7, "ref_id": 8, "segmentation": None}], "image 7 is not in split 'val'"),
        (lambda r: [*r[:2], {**r[2], "segmentation": drawn(0, 2, 0, 2, (4, 4))[0]}], "4, 4.* pixels"),
        (lambda r: [*r[:2], {"image_id": 9}], ":3: malformed"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, copy, tmp_path, change, match):
    import re

    file = write(tmp_path / "found.jsonl", change(rows_of()))
    code, _, err = run(capsys, "--data", copy, "--predictions", file)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert re.search(match, err), err


def test_a_set_read_without_masks_is_refused(capsys, copy, tmp_path):
    file = write(tmp_path / "found.jsonl", rows_of())
    code, _, err = run(capsys, "--data", copy, "--predictions", file, "--option", "masks=false")
    assert code == 2
    assert "without masks" in err
