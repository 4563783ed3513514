"""AP and AR against pycocotools itself, and LVIS's numbers against the lvis package."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rice_eval.metrics.coco import ApStatistics, Found, Truth, ap_statistics
from rice_eval.metrics.statistics import statistics_from_arrays

pycocotools = pytest.importorskip("pycocotools", reason="pycocotools is the reference")
from pycocotools import mask as mask_utils  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402

SIDE = 200


def blob(box):
    """A filled ellipse in a box, as RLE: a mask whose IoU differs from its box's."""
    ys, xs = np.mgrid[:SIDE, :SIDE] + 0.5
    cx, cy = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    rx, ry = max((box[2] - box[0]) / 2, 0.6), max((box[3] - box[1]) / 2, 0.6)
    inside = ((xs - cx) / rx) ** 2 + ((ys - cy) / ry) ** 2 <= 1
    return mask_utils.encode(np.asfortranarray(inside.astype(np.uint8)))


def random_set(seed, images=8, classes=4, most=12, crowds=True, ties=True, masks=False):
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(images):
        n, m = int(rng.integers(0, 8)), int(rng.integers(0, most))

        def boxes(k):
            start = rng.integers(0, 150, (k, 2))
            return np.concatenate([start, start + rng.integers(1, 140, (k, 2))], 1).astype(float)

        t = boxes(n)
        labels = rng.integers(0, classes, n)
        f, f_labels = boxes(m), rng.integers(0, classes, m)
        if n and m:
            near = rng.random(m) < 0.7
            pick = rng.integers(0, n, m)
            moved = t[pick] + rng.integers(-9, 10, (m, 4)) * (rng.random((m, 1)) < 0.8)
            moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
            f[near], f_labels[near] = moved[near], labels[pick][near]
        scores = rng.random(m)
        if ties:
            scores = np.round(scores, 1)
        crowd = (rng.random(n) < 0.2) if crowds else np.zeros(n, bool)
        t_masks = [blob(b) for b in t] if masks else None
        area = (
            np.array([float(mask_utils.area(r)) for r in t_masks])
            if masks
            else (t[:, 2] - t[:, 0]) * (t[:, 3] - t[:, 1]) * rng.uniform(0.5, 1, n)
        )
        truth.append(Truth(t, labels, crowd, area.reshape(-1), t_masks))
        found.append(Found(f, scores, f_labels, [blob(b) for b in f] if masks else None))
    return truth, found


def reference(truth, found, classes, kind):
    """pycocotools' twelve numbers and its precision table."""
    anns, dets = [], []
    for i, (t, f) in enumerate(zip(truth, found), 1):
        for j in range(len(t.labels)):
            x1, y1, x2, y2 = t.boxes[j]
            ann = {
                "id": len(anns) + 1,
                "image_id": i,
                "category_id": int(t.labels[j]) + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
            }
            ann |= {"area": float(t.area[j]), "iscrowd": int(t.crowd[j])}
            if t.masks is not None:
                ann["segmentation"] = t.masks[j]
            anns.append(ann)
        for j in range(len(f.labels)):
            x1, y1, x2, y2 = f.boxes[j]
            det = {"image_id": i, "category_id": int(f.labels[j]) + 1, "score": float(f.scores[j])}
            det |= {"segmentation": f.masks[j]} if kind == "segm" else {"bbox": [x1, y1, x2 - x1, y2 - y1]}
            dets.append(det)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i, "height": SIDE, "width": SIDE} for i in range(1, len(truth) + 1)],
            "categories": [{"id": k + 1, "name": str(k)} for k in range(classes)],
            "annotations": anns,
            "info": {},
        }
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(dets), kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats, run.eval["precision"]


def ours(truth, found, classes, kind="bbox"):
    return ap_statistics([f"{i:03d}" for i in range(len(truth))], truth, found, [str(k) for k in range(classes)], kind)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(8))
def test_twelve_numbers_equal_pycocotools(seed, kind):
    truth, found = random_set(seed, masks=kind == "segm", crowds=seed % 2 == 0, ties=seed % 3 != 0)
    stats, _ = reference(truth, found, 4, kind)
    np.testing.assert_allclose(list(ours(truth, found, 4, kind).summary().values()), stats, rtol=0, atol=1e-12)


def test_over_a_hundred_detections_empty_classes_and_empty_images():
    truth, found = random_set(3, images=5, classes=2, most=400)
    truth.append(Truth(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool), np.zeros(0)))
    found.append(found[0])
    truth.append(truth[0])
    found.append(Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int)))
    stats, precision = reference(truth, found, 5, "bbox")
    mine = ours(truth, found, 5)
    np.testing.assert_allclose(list(mine.summary().values()), stats, rtol=0, atol=1e-12)
    table = precision[:, :, :, 0, 2].mean(1).T  # (K, T)
    got = mine._precision(np.ones((1, len(mine))), 0, 100)[0]
    np.testing.assert_allclose(np.where(np.isnan(got), -1, got), table, rtol=0, atol=1e-12)


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_whole_weights_are_repeated_images(seed):
    truth, found = random_set(seed, images=4, ties=False)
    weights = np.random.default_rng(seed).integers(0, 3, 4)
    index = np.repeat(np.arange(4), weights)
    mine = ours(truth, found, 4).values(weights[None].astype(float))["ap"][0]
    if not len(index) or not sum(len(truth[i].labels) for i in index):
        assert np.isnan(mine) or mine >= 0
        return
    again = ours([truth[i] for i in index], [found[i] for i in index], 4).point()["ap"]
    # A repeated detection only adds a point below the envelope, so the curve is the same.
    assert mine == pytest.approx(again, nan_ok=True, abs=1e-9)


def test_statistics_survive_their_arrays():
    truth, found = random_set(5)
    mine = ours(truth, found, 4)
    again = statistics_from_arrays("ap", mine.arrays())
    assert isinstance(again, ApStatistics)
    assert again.summary() == mine.summary()


def test_nothing_found_and_nothing_wanted():
    none = Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
    truth, _ = random_set(1, images=2)
    assert ours(truth, [none, none], 4).point()["ap"] == 0.0
    empty = Truth(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool), np.zeros(0))
    assert np.isnan(ours([empty], [none], 4).point()["ap"])


def test_bad_input_is_refused():
    truth, _ = random_set(1, images=1)
    bad = Found(np.zeros((1, 4)), np.array([np.nan]), np.zeros(1, int))
    with pytest.raises(ValueError, match="NaN"):
        ours(truth, [bad], 4)
    with pytest.raises(ValueError, match="outside the 1 classes"):
        ours(truth, [Found(np.zeros((1, 4)), np.ones(1), np.ones(1, int))], 1)


@pytest.mark.parametrize("flat", [0.0, 0.3], ids=["solid", "some without area"])
@pytest.mark.parametrize("seed", range(4))
def test_lvis_numbers_equal_the_lvis_package(seed, flat, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "float", float, raising=False)  # the package was written for an older numpy
    lvis = pytest.importorskip("lvis", reason="the lvis package is the reference")
    import json

    rng = np.random.default_rng(seed)
    classes = 6
    truth, found = random_set(seed, images=10, classes=classes, crowds=False)
    for t, f in zip(truth, found):
        for boxes in (t.boxes, f.boxes):
            thin = rng.random(len(boxes)) < flat
            boxes[thin, 2] = boxes[thin, 0]
        t.area[t.boxes[:, 2] == t.boxes[:, 0]] = 0.0
    frequency = ["r", "c", "f", "f", "c", "r"]
    images, anns, dets, federated = [], [], [], []
    for i, (t, f) in enumerate(zip(truth, found), 1):
        absent = sorted(set(range(classes)) - set(t.labels.tolist()))
        negative = frozenset(k for k in absent if rng.random() < 0.5)
        partly = frozenset(k for k in range(classes) if k not in negative and rng.random() < 0.3)
        images.append(
            {
                "id": i,
                "height": SIDE,
                "width": SIDE,
                "neg_category_ids": [k + 1 for k in negative],
                "not_exhaustive_category_ids": [k + 1 for k in partly],
                "coco_url": "",
            }
        )
        federated.append(Truth(t.boxes, t.labels, t.crowd, t.area, None, negative, partly))
        for j in range(len(t.labels)):
            x1, y1, x2, y2 = t.boxes[j].tolist()
            poly = [[x1, y1, x2, y1, x2, y2, x1, y2]]
            anns.append(
                {
                    "id": len(anns) + 1,
                    "image_id": i,
                    "category_id": int(t.labels[j]) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(t.area[j]),
                    "segmentation": poly,
                }
            )
        for j in range(len(f.labels)):
            x1, y1, x2, y2 = f.boxes[j].tolist()
            dets.append(
                {
                    "image_id": i,
                    "category_id": int(f.labels[j]) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": float(f.scores[j]),
                }
            )
    cats = [
        {"id": k + 1, "name": str(k), "frequency": frequency[k], "image_count": 1, "instance_count": 1}
        for k in range(classes)
    ]
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps({"images": images, "annotations": anns, "categories": cats}))
    with contextlib.redirect_stdout(io.StringIO()):
        run = lvis.LVISEval(lvis.LVIS(str(path)), lvis.LVISResults(lvis.LVIS(str(path)), dets), "bbox")
        run.run()
    mine = ap_statistics(
        [f"{i:03d}" for i in range(10)],
        federated,
        found,
        [str(k) for k in range(classes)],
        rule="lvis",
        frequency=frequency,
    ).summary()
    theirs = run.get_results()
    names = {
        "AP": "AP",
        "AP50": "AP50",
        "AP75": "AP75",
        "APs": "APs",
        "APm": "APm",
        "APl": "APl",
        "APr": "APr",
        "APc": "APc",
        "APf": "APf",
    }
    names |= {"AR@300": "AR@300", "ARs@300": "ARs@300", "ARm@300": "ARm@300", "ARl@300": "ARl@300"}
    for name, other in names.items():
        assert mine[name] == pytest.approx(theirs[other], abs=1e-12), name


def test_joined_sets_score_as_one():
    truth, found = random_set(9, images=9)
    whole = ours(truth, found, 4).summary()
    joined = ours(truth[:4], found[:4], 4).concat(ours(truth[4:], found[4:], 4))
    assert joined.summary() == pytest.approx(whole, abs=1e-12)
    with pytest.raises(ValueError, match="differ"):
        joined.concat(ours(truth, found, 5))


def test_every_metric_of_values_is_that_of_the_summary():
    mine = ours(*random_set(3, images=12), 4)
    point, summary = mine.point(), mine.summary()
    names = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "aps": "APs", "apm": "APm", "apl": "APl", "ar": "AR@100"}
    assert set(point) == set(names)
    for name, other in names.items():
        assert point[name] == pytest.approx(100 * summary[other], abs=1e-9)
