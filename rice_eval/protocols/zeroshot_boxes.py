"""Protocols ``zero-shot-boxes`` and ``refer-boxes``: given or proposed boxes against texts, with nothing trained."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rice_eval.errors import DataError
from rice_eval.metrics.coco import Found
from rice_eval.metrics.coco_match import box_iou
from rice_eval.metrics.referring import box_accuracy
from rice_eval.protocols.base import Context, Outcome
from rice_eval.protocols.detection import BoxScorer, image_truth
from rice_eval.protocols.proposals import CandidateProtocol
from rice_eval.protocols.regions_text import embed_texts
from rice_eval.protocols.zeroshot import class_embeddings

__all__ = ["ReferBoxes", "ZeroShotBoxes"]


@dataclass(frozen=True)
class ZeroShotBoxes(CandidateProtocol):
    """COCO AP of boxes that text embeddings name: how well a region's feature says what is in it, ranked over the whole set.

    A box's scores are the softmax over the classes of ``scale`` times the cosines. Annotated boxes keep every class's score and go
    through no suppression: box errors are out of the question, so that AP measures naming alone. Proposals' own scores enter by the
    geometric mean that ``objectness`` weighs (RegionCLIP, arXiv 2112.09106, takes one half), and boxes are suppressed inside a class.

    Attributes:
        templates: sentences with ``{}`` for the name; a class is the mean of its sentences' embeddings. The name alone is CLOC's rule.
        scale: of the cosines; 100 is where CLIP's training caps it (arXiv 2103.00020, section 2.5).
        objectness: exponent of the proposals' scores, 0 to 1; the class's score has the rest. Annotated boxes have none.
        nms_iou: of the suppression of proposals.
    """

    id: ClassVar[str] = "zero-shot-boxes"
    kind: ClassVar[str] = "detection"
    metric: ClassVar[str] = "ap"

    templates: tuple[str, ...] = ("{}",)
    scale: float = 100.0
    objectness: float = 0.5
    nms_iou: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.templates or not all("{}" in t for t in self.templates):
            raise ValueError("templates are sentences with {} in the name's place, at least one")
        if self.scale <= 0 or not 0 <= self.objectness <= 1 or not 0 < self.nms_iou <= 1:
            raise ValueError("scale is above zero, objectness in [0, 1], nms_iou in (0, 1]")

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``; the training split is not looked at."""
        start = time.perf_counter()
        texts = class_embeddings(context.encoder(), context.test.things, self.templates).cpu()
        embedded = time.perf_counter() - start
        placed = self.place(context)
        start = time.perf_counter()
        scorer = BoxScorer(context.test, placed.indices, context.panels, context.keep_predictions)
        for index, boxes, rows, x in zip(placed.indices, placed.candidates, placed.rows, placed.features):
            score = torch.zeros(0, len(texts), dtype=torch.float64)
            if len(rows):
                score = (self.scale * (x @ texts.T).double()).softmax(dim=1)
            box = torch.from_numpy(boxes.boxes[rows])
            if self.proposals:
                own = torch.from_numpy(boxes.scores[rows])[:, None]
                score = score ** (1 - self.objectness) * own**self.objectness
            found = self._ranked(box, score, scorer.most)
            scorer.add(index, image_truth(context.test, index), found)
        return Outcome(
            statistics=scorer.statistics(),
            chosen={"how": self.how, "boxes": sum(len(r) for r in placed.rows)},
            layers=self.layers(context.facts),
            seconds={"texts": embedded, "pool": placed.seconds, "predict": time.perf_counter() - start},
            panels=tuple(scorer.panels),
            warnings=(*scorer.warnings(), *placed.warnings()),
            predictions=scorer.predictions,
            analysis=scorer.analysis(),
            forwards=placed.forwards,
        )

    def _ranked(self, boxes: Tensor, scores: Tensor, most: int) -> Found:
        """The ``most`` best of all pairs of box ``(n, 4)`` and class, from ``(n, C)`` scores."""
        from torchvision.ops import batched_nms

        if not len(boxes):
            return Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
        flat = scores.flatten()
        order = flat.argsort(descending=True, stable=True)
        row, label = order // scores.shape[1], order % scores.shape[1]
        if self.proposals:
            # More pairs than any rule looks at, few enough for one suppression.
            row, label, order = row[:_PAIRS], label[:_PAIRS], order[:_PAIRS]
            keep = batched_nms(boxes[row].float(), flat[order].float(), label, self.nms_iou)
            row, label, order = row[keep], label[keep], order[keep]
        row, label, order = row[:most], label[:most], order[:most]
        return Found(boxes[row].numpy(), flat[order].numpy(), label.numpy())


_PAIRS = 5000
IOU = 0.5
"""RefCOCO's threshold of a right box."""


@dataclass(frozen=True)
class ReferBoxes(CandidateProtocol):
    """Referring expressions by ranking: of an image's boxes the one whose feature is nearest to the sentence; right at IoU 0.5.

    RefCOCO's images come with every annotated object, the usual candidates where no detector is asked for; a file of proposals stands
    in for them. An image without candidates is answered by nothing, and wrong. ``chance`` in ``chosen`` is the accuracy of a random choice.

    Attributes:
        template: with ``{}`` for the sentence.
    """

    id: ClassVar[str] = "refer-boxes"
    kind: ClassVar[str] = "regions"
    metric: ClassVar[str] = "accuracy"

    template: str = "{}"

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{}" not in self.template:
            raise ValueError("template has no {} for the sentence")

    def run(self, context: Context) -> Outcome:
        """See ``Protocol.run``; the training split is not looked at.

        Raises:
            DataError: a set without sentences.
        """
        placed = self.place(context)
        start = time.perf_counter()
        asked = [context.test.instances(i) for i in placed.indices]
        if any(len(a.labels) and a.names is None for a in asked) or not any(len(a.labels) for a in asked):
            raise DataError(
                f"dataset '{context.test.name}' has no sentences for its boxes",
                "choose a set with referring expressions",
            )
        sentences = list(dict.fromkeys(n for a in asked for n in a.names or ()))
        embedded = embed_texts(context, [self.template.replace("{}", s) for s in sentences])
        place = {sentence: k for k, sentence in enumerate(sentences)}
        image: list[int] = []
        found, truth = [], []
        chances: list[float] = []
        for k, (boxes, rows, x, a) in enumerate(zip(placed.candidates, placed.rows, placed.features, asked)):
            for name, box in zip(a.names or (), a.boxes):
                image.append(k)
                truth.append(box)
                if not len(rows):
                    found.append(np.full(4, np.nan))
                    chances.append(0.0)
                    continue
                best = int((x @ embedded[place[name]]).argmax())
                found.append(boxes.boxes[rows[best]])
                overlaps = box_iou(boxes.boxes[rows], box[None], np.zeros(1, bool))[:, 0]
                chances.append(100 * float((overlaps >= IOU).mean()))
        statistics = box_accuracy(placed.ids, np.array(image), np.stack(found), np.stack(truth), IOU)
        chosen: dict[str, Any] = {
            "how": self.how,
            "expressions": len(image),
            "chance": round(float(np.mean(chances)), 2),
        }
        return Outcome(
            statistics=statistics,
            chosen=chosen,
            layers=self.layers(context.facts),
            seconds={"pool": placed.seconds, "predict": time.perf_counter() - start},
            warnings=placed.warnings(),
            forwards=placed.forwards,
        )
