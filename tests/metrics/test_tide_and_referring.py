"""The error breakdown on made mistakes, one of each kind; referring boxes and masks against plain pixels."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_coco import random_set

from rice_eval.errors import DataError
from rice_eval.metrics.coco import Found, Truth
from rice_eval.metrics.referring import box_accuracy, mask_overlap, read_mask_predictions
from rice_eval.metrics.tide import ERRORS, breakdown, recall_by_crowding


def truth_of(boxes, labels, crowd=None):
    boxes = np.array(boxes, float).reshape(-1, 4)
    flags = np.zeros(len(labels), bool) if crowd is None else np.array(crowd)
    return Truth(boxes, np.array(labels), flags, (boxes[:, 2:] - boxes[:, :2]).prod(1))


def found_of(boxes, labels):
    boxes = np.array(boxes, float).reshape(-1, 4)
    return Found(boxes, np.linspace(0.9, 0.1, len(labels)), np.array(labels))


A, B, C, D = [0, 0, 40, 40], [100, 0, 140, 40], [0, 100, 40, 140], [100, 100, 140, 140]
FAR = [300, 300, 320, 320]
NEAR_C = [20, 100, 60, 140]  # IoU 1/3 with C


def test_one_mistake_of_each_kind_is_told_apart():
    truth = truth_of([A, B, C, D], [0, 1, 0, 1])
    found = found_of([A, A, B, NEAR_C, FAR, NEAR_C], [0, 0, 0, 0, 0, 1])
    result = breakdown([truth], [found], 2)
    assert result.counts == {
        "classification": 1,  # B found as class 0
        "localisation": 1,  # C found beside it
        "both": 1,  # the same, with the wrong class
        "duplicate": 1,  # A a second time
        "background": 1,
        "missed": 1,  # D
    }
    assert set(result.costs) == set(ERRORS)
    assert all(cost >= -1e-9 for cost in result.costs.values())
    assert result.costs["classification"] == pytest.approx(25.0, abs=1.0)  # class 1 from nothing to half


def test_a_perfect_detector_loses_nothing_and_crowds_are_left_out():
    truth = truth_of([A, B, [200, 200, 260, 260]], [0, 1, 0], [False, False, True])
    found = found_of([A, B, [210, 210, 220, 220]], [0, 1, 0])
    result = breakdown([truth], [found], 2)
    assert result.ap50 == pytest.approx(100)
    assert not any(result.counts.values())
    assert result.costs == pytest.approx(dict.fromkeys(ERRORS, 0.0))


@pytest.mark.parametrize("seed", range(4))
def test_every_detection_and_target_has_one_verdict(seed):
    truth, found = random_set(seed, images=12, crowds=False)
    result = breakdown(truth, found, 4)
    detections = sum(len(f.labels) for f in found)
    right = sum(round(r * c / 100) for r, c in recall_by_crowding(truth, found).values() if c)
    assert right + sum(v for k, v in result.counts.items() if k != "missed") == detections
    assert result.counts["missed"] <= sum(len(t.labels) for t in truth) - right


@pytest.mark.parametrize("seed", range(3))
def test_equals_tidecv(seed):
    tidecv = pytest.importorskip("tidecv", reason="tidecv is the reference")
    truth, found = random_set(seed, images=20, crowds=False, ties=False)
    theirs, dets = tidecv.Data("truth"), tidecv.Data("found")
    for i, (t, f) in enumerate(zip(truth, found)):
        theirs.add_image(i, str(i))
        dets.add_image(i, str(i))
        for box, label in zip(t.boxes, t.labels):
            theirs.add_ground_truth(i, int(label), [*box[:2], *(box[2:] - box[:2])])
        for box, label, score in zip(f.boxes, f.labels, f.scores):
            dets.add_detection(i, int(label), float(score), [*box[:2], *(box[2:] - box[:2])])
    run = tidecv.TIDE().evaluate(theirs, dets, mode=tidecv.TIDE.BOX)
    mine = breakdown(truth, found, 4)
    # A recall that is a whole percent may stand on either side of a threshold: tidecv's are k / 100, pycocotools' and so ours
    # numpy's linspace, and some differ in the last bit. One threshold of a class of four is worth 100 / 101 / 4 at most.
    grid = np.linspace(0, 1, 101)
    counts = np.bincount(np.concatenate([t.labels for t in truth]), minlength=4)
    exact = all(grid[k] == k / 100 for n in counts for k in range(101) if k * n % 100 == 0)
    near = 1e-6 if exact else 0.25
    assert mine.ap50 == pytest.approx(run.ap, abs=near)
    names = {"Cls": "classification", "Loc": "localisation", "Both": "both", "Dupe": "duplicate", "Bkg": "background"}
    for kind, cost in run.fix_main_errors().items():
        if kind.short_name in names:
            assert mine.counts[names[kind.short_name]] == len(run.error_dict[kind])
            assert mine.costs[names[kind.short_name]] == pytest.approx(cost, abs=near)


def test_recall_by_crowding_names_its_buckets():
    crowded = truth_of([A, B, C, D], [0, 0, 0, 0])
    found = recall_by_crowding([crowded, truth_of([A], [0])], [found_of([A, B], [0, 0]), found_of([A], [0])])
    assert found["1-3"] == (100.0, 1)
    assert found["4-7"] == (50.0, 4)
    assert np.isnan(found["16+"][0])


def test_boxes_of_expressions():
    boxes = np.array([A, A, [np.nan] * 4], float)
    mine = box_accuracy(["a", "b"], np.array([0, 1, 1]), boxes, np.array([A, B, C], float))
    assert mine.point()["accuracy"] == pytest.approx(100 / 3)


def test_masks_of_expressions_equal_plain_pixels(tmp_path):
    coco_mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    found = [rng.random((9, 7)) < 0.5 for _ in range(5)] + [np.zeros((9, 7), bool)] * 2
    truth = [rng.random((9, 7)) < 0.5 for _ in range(5)] + [np.zeros((9, 7), bool), rng.random((9, 7)) < 0.5]

    def rle(mask):
        return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) if mask.any() else None

    file = tmp_path / "found.jsonl"
    with file.open("w") as out:
        for k, mask in enumerate(found):
            r = rle(mask)
            entry = None if r is None else {"size": r["size"], "counts": r["counts"].decode()}
            out.write(json.dumps({"image_id": "x", "ref_id": k, "segmentation": entry}) + "\n")
    read = read_mask_predictions(file)
    mine = mask_overlap(["x"], np.zeros(7, int), [read["x", k] for k in range(7)], [rle(t) for t in truth]).point()
    both = [(f & t).sum() for f, t in zip(found, truth)]
    union = [(f | t).sum() for f, t in zip(found, truth)]
    assert mine["ciou"] == pytest.approx(100 * sum(both) / sum(union))
    assert mine["giou"] == pytest.approx(100 * np.mean([b / u if u else 1.0 for b, u in zip(both, union)]))
    short = '{"image_id": "x", "ref_id": 9, "segmentation": {"size": [9, 7], "counts": [10, 20, 5]}}'
    endless = '{"image_id": "x", "ref_id": 1e400, "segmentation": null}'
    wrong = ((endless, ":8: malformed"), ('{"image_id": 1}', ":8: malformed"), (short, ":8: malformed .*sum to 35"))
    for line, match in (*wrong, (file.read_text().splitlines()[0], ":8: .* twice")):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(file.read_text() + line + "\n")
        with pytest.raises(DataError, match=match):
            read_mask_predictions(bad)
    with pytest.raises(DataError, match="can't be read"):
        read_mask_predictions(tmp_path / "none.jsonl")
