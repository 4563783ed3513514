"""Candidate boxes of images, their features in the text space, and files of proposals from any detector."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from rice_eval.datasets.base import Annotation, Dataset, Instances
from rice_eval.datasets.detection import CocoDetection
from rice_eval.datasets.regions import RefCoco
from rice_eval.errors import DataError, PlanError, UsageError
from rice_eval.protocols.base import Context, Protocol
from rice_eval.protocols.detection import federated_of
from rice_eval.protocols.regions import Region, RegionPass, regions_of
from rice_eval.protocols.regions_text import text_space
from rice_eval.protocols.segmentation import check_choice
from rice_eval.views import Frame, View

__all__ = ["CandidateProtocol", "Candidates", "Placed", "candidates_of", "file_digest", "look_up", "read_proposals"]

Boxes = NDArray[np.float64]
Placing = Literal["roialign", "prompter", "crop"]
PLACINGS: tuple[Placing, ...] = ("roialign", "prompter", "crop")


@dataclass(frozen=True)
class Candidates:
    """Boxes of one image: ``boxes (n, 4)`` xyxy in pixels, and their ``scores (n,)`` in (0, 1], ones where nobody scored them."""

    boxes: Boxes
    scores: NDArray[np.float64]

    def as_instances(self) -> Instances:
        """The same as regions without class."""
        n = len(self.boxes)
        sides = (self.boxes[:, 2:] - self.boxes[:, :2]).clip(min=0)
        none = np.zeros(n, np.int64)
        return Instances(self.boxes, none, None, np.zeros(n, bool), sides[:, 0] * sides[:, 1], np.arange(n))


def file_digest(path: str) -> str:
    """sha256 of a file.

    Raises:
        UsageError: it can't be read.
    """
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"proposals={path}: can't be read ({error.strerror})", "check the path") from error


def read_proposals(path: str, dataset: Dataset, most: int) -> dict[str, Candidates]:
    """Proposals from a file in COCO's results format: a list of ``{"image_id", "bbox": [x, y, w, h], "score"}``; classes are not read.

    Args:
        path: the file; that of ``--save-predictions`` is one.
        dataset: whose images it is of; ``image_id`` is the number in its annotation file, or the image's name.
        most: an image, the surest first.

    Returns:
        image name -> candidates; equal boxes of an image are one, with the highest score.

    Raises:
        DataError: a file that is malformed, or of no image of the dataset.
    """
    base, _ = federated_of(dataset, 0)
    names = {dataset.image_id(i): dataset.image_id(i) for i in range(len(dataset))}
    if isinstance(base, CocoDetection):
        names |= {str(key): base.image_id(i) for i, key in enumerate(base.image_keys) if base.image_id(i) in names}
    rows: dict[str, dict[tuple[float, ...], float]] = {}
    try:
        for entry in json.loads(Path(path).read_text(encoding="utf-8")):
            name = names.get(str(entry["image_id"]))
            if name is None:
                continue  # of an image that this split, or this part of it, leaves out
            x, y, w, h = (float(v) for v in entry["bbox"])
            score = float(entry.get("score", 1.0))
            if not (np.isfinite([x, y, w, h]).all() and min(w, h) >= 0 and 0 <= score <= 1):
                raise ValueError(f"box {entry['bbox']}, score {score}")
            mine = rows.setdefault(name, {})
            key = (x, y, x + w, y + h)
            mine[key] = max(score, mine.get(key, 0.0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: not a file of proposals ({type(error).__name__}: {error})",
            "it is a JSON list of objects with image_id, bbox [x, y, width, height] and score from 0 to 1",
        ) from error
    if not rows:
        raise DataError(f"{path}: no proposal is of an image of dataset '{dataset.name}'", "check its image_id")
    out = {}
    for name, mine in rows.items():
        best = sorted(mine.items(), key=lambda item: -item[1])[:most]
        out[name] = Candidates(np.array([b for b, _ in best]).reshape(-1, 4), np.array([s for _, s in best]))
    return out


def candidates_of(dataset: Dataset, index: int) -> Candidates:
    """The image's annotated objects, each box once: RefCOCO's every object, else those of ``instances``; crowds are left out."""
    base, place = federated_of(dataset, index)
    every = base.proposals(place) if isinstance(base, RefCoco) else dataset.instances(index)
    boxes = every.boxes[~every.crowd]
    _, first = np.unique(boxes, axis=0, return_index=True)
    boxes = boxes[np.sort(first)]
    return Candidates(boxes, np.ones(len(boxes)))


class _Pass(RegionPass):
    """``RegionPass`` over candidates in place of the image's instances."""

    boxes: Mapping[str, Candidates] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "boxes": self.boxes}

    def annotate(self, dataset: Dataset, index: int, frames: tuple[Frame, ...]) -> Region:
        """The image's candidates."""
        return regions_of(dataset, index, frames, False, self._crop, look_up(dataset, index, self.boxes).as_instances())


def look_up(dataset: Dataset, index: int, boxes: Mapping[str, Candidates] | None) -> Candidates:
    """Of the file where there is one (none where it holds none of the image), else ``candidates_of``."""
    if boxes is None:
        return candidates_of(dataset, index)
    return boxes.get(dataset.image_id(index), Candidates(np.zeros((0, 4)), np.zeros(0)))


@dataclass(frozen=True)
class Placed:
    """Candidates in the text space.

    Attributes:
        ids, indices: of the images, in the order read.
        candidates: of each image.
        rows: of each image ``(k,)`` the places among its candidates that have a feature; others lie outside the image.
        features: of each image ``(k, E)``, L2-normalised, on the CPU.
        dropped: candidates without area inside the image.
        forwards: cut-outs pushed through the encoder.
        seconds: spent on features.
    """

    ids: tuple[str, ...]
    indices: tuple[int, ...]
    candidates: tuple[Candidates, ...]
    rows: tuple[NDArray[np.int64], ...]
    features: tuple[Tensor, ...]
    dropped: int
    forwards: int
    seconds: float

    def warnings(self) -> tuple[str, ...]:
        """How many candidates were left out, in one line."""
        if not self.dropped:
            return ()
        total = sum(len(c.boxes) for c in self.candidates)
        return (f"{self.dropped} of {total} boxes have no area inside the image and were left out",)


@dataclass(frozen=True)
class CandidateProtocol(Protocol):
    """What protocols of given or proposed boxes share.

    Attributes:
        how: ``roialign`` (pooled tokens through the encoder's linear projection), ``prompter`` (its region head), or ``crop`` (each box
            cut out, squashed to the native square and embedded whole: one forward a box, which every encoder with a text tower can).
        proposals: a file of boxes in COCO's results format; empty for the annotated objects. Its content is part of the hash.
        most: proposals an image, the surest.
    """

    needs: ClassVar[frozenset[Annotation]] = frozenset({"instances"})
    abilities: ClassVar[frozenset[str]] = frozenset({"text"})

    how: Placing = "roialign"
    proposals: str = ""
    most: int = 300

    def __post_init__(self) -> None:
        check_choice("how", self.how, PLACINGS)
        if not self.norm:
            raise ValueError("the text space is reached from normed tokens: norm is true")
        if self.most < 1:
            raise ValueError("most is at least 1")
        if self.proposals:
            file_digest(self.proposals)

    def settings(self) -> dict[str, Any]:
        """Every field; for the file of proposals, what it holds and not where it lies."""
        plain = super().settings()
        return {
            **plain,
            "proposals": f"sha256:{file_digest(self.proposals)}" if self.proposals else "annotated objects",
        }

    def views(self) -> Mapping[str, Sequence[str]]:
        """The test split alone, nothing is trained; no tokens at all where boxes are cut out."""
        return {} if self.how == "crop" else {"test": (self.view,)}

    def place(self, context: Context) -> Placed:
        """Features of the candidates of every test image.

        Raises:
            PlanError: an encoder that can't do what ``how`` asks.
        """
        encoder, facts = context.encoder(), context.facts
        if self.how == "crop" and "image" not in facts.abilities:
            raise PlanError(
                f"protocol '{self.id}': encoder '{encoder.name}' embeds no images, which how=crop needs",
                "give --set how=prompter for an encoder with a region head",
            )
        if self.how == "prompter" and "regions" not in facts.abilities:
            raise PlanError(
                f"protocol '{self.id}': encoder '{encoder.name}' has no region head of its own",
                "give --set how=roialign, or how=crop",
            )
        boxes = read_proposals(self.proposals, context.test, self.most) if self.proposals else None
        layers = self.layers(facts)
        if self.how == "crop":
            advance = context.progress("cut out", len(context.test))
            passed = _Pass(context.test, encoder, "roialign", layers, facts.resolution, advance)
            self._cut(context, passed, boxes, advance)
            key = ("crop", layers[-1])
        else:
            finish = text_space(context, self.id, self.how)
            source = context.tokens("test", self.view)
            advance = context.progress("boxes", len(source.indices))
            passed = _Pass(context.test, encoder, self.how, layers, 0, advance, finish)
            passed.boxes = boxes
            source.consume(passed)
            key = (self.how, layers[-1])
        found = passed.found
        counts = np.bincount(np.array(found.image, dtype=np.int64), minlength=len(found.ids))
        x = found.features(*key)
        spans = list(pairwise(np.concatenate([[0], np.cumsum(counts)]).tolist()))
        which = np.array([k for _, k in found.boxes], dtype=np.int64)
        return Placed(
            tuple(found.ids),
            tuple(found.indices),
            tuple(look_up(context.test, i, boxes) for i in found.indices),
            tuple(which[a:b] for a, b in spans),
            tuple(F.normalize(x[a:b], dim=1) if b > a else x[:0] for a, b in spans),
            found.dropped,
            found.forwards,
            passed.seconds,
        )

    def _cut(self, context: Context, into: _Pass, boxes: Mapping[str, Candidates] | None, advance: Any) -> None:
        """Embed cut-outs image by image: no tokens of whole images are needed."""
        view = View.parse("native")
        for index in range(len(context.test)):
            start = time.perf_counter()
            frames = view.frames(*context.test.size(index))
            given = look_up(context.test, index, boxes).as_instances()
            region = regions_of(context.test, index, frames, False, context.facts.resolution, given)
            into.found.list_regions(context.test.image_id(index), index, region)
            assert region.crops is not None
            with torch.inference_mode():
                features = into.cropped(region.crops)
            into.found.parts.setdefault(("crop", self.layers(context.facts)[-1]), []).append(features)
            into.seconds += time.perf_counter() - start
            advance(1)
