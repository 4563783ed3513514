"""Detection's speed claims, each as a ratio measured in one run.

``evaluator``: our AP against pycocotools', from arrays to the twelve numbers, which must agree.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time

import numpy as np

from rice_eval.metrics.coco import Found, Truth, ap_statistics


def made_set(images: int, detections: int, classes: int, seed: int) -> tuple[list[Truth], list[Found]]:
    """A random set with crowds, ties and detections near targets: 7 targets an image, as COCO has."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(images):
        n = int(rng.poisson(7))
        start = rng.uniform(0, 400, (n, 2))
        boxes = np.concatenate([start, start + rng.uniform(4, 240, (n, 2))], 1)
        labels = rng.integers(0, classes, n)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) * 0.7
        truth.append(Truth(boxes, labels, rng.random(n) < 0.02, area))
        start = rng.uniform(0, 400, (detections, 2))
        mine = np.concatenate([start, start + rng.uniform(4, 240, (detections, 2))], 1)
        guess = rng.integers(0, classes, detections)
        if n:
            near = rng.random(detections) < 0.5
            pick = rng.integers(0, n, detections)
            moved = boxes[pick] + rng.normal(0, 8, (detections, 4))
            moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
            mine[near], guess[near] = moved[near], labels[pick][near]
        found.append(Found(mine, np.round(rng.random(detections), 3), guess))
    return truth, found


def evaluator(images: int, detections: int, classes: int, seed: int) -> dict[str, float]:
    """Seconds of both evaluators on one set, their ratio and the largest difference of the twelve numbers."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = made_set(images, detections, classes, seed)
    anns, dets = [], []
    for i, (t, f) in enumerate(zip(truth, found), 1):
        for box, label, crowd, area in zip(t.boxes.tolist(), t.labels.tolist(), t.crowd.tolist(), t.area.tolist()):
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            entry = {"id": len(anns) + 1, "image_id": i, "category_id": label + 1, "bbox": xywh}
            anns.append({**entry, "area": area, "iscrowd": int(crowd)})
        for box, label, score in zip(f.boxes.tolist(), f.labels.tolist(), f.scores.tolist()):
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            dets.append({"image_id": i, "category_id": label + 1, "bbox": xywh, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i, "height": 640, "width": 640} for i in range(1, images + 1)],
            "categories": [{"id": k + 1, "name": str(k)} for k in range(classes)],
            "annotations": anns,
        }
        coco.createIndex()
        results = coco.loadRes(dets)
        start = time.perf_counter()
        run = COCOeval(coco, results, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
        theirs = time.perf_counter() - start
    start = time.perf_counter()
    ids, names = [f"{i:06d}" for i in range(images)], [str(k) for k in range(classes)]
    summary = ap_statistics(ids, truth, found, names).summary()
    ours = time.perf_counter() - start
    worst = max(abs(a - b) for a, b in zip(run.stats, summary.values()))
    return {"pycocotools_s": theirs, "ours_s": ours, "ratio": theirs / ours, "largest_difference": worst}


def main() -> None:
    """Run what is asked for and print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=50)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps({"evaluator": evaluator(args.images, args.detections, args.classes, args.seed)}))


if __name__ == "__main__":
    main()
