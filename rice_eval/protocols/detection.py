"""What every detection protocol shares: boxes through views and back, batches of frames, scoring, the choice of a head."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rice_eval.adapters.base import EncoderFacts
from rice_eval.bank.source import ImageTokens, TokenReader
from rice_eval.datasets.base import Annotation, Dataset
from rice_eval.datasets.detection import Lvis
from rice_eval.datasets.subset import Subset
from rice_eval.errors import DataError
from rice_eval.metrics.coco import MAX_DETECTIONS, ApStatistics, Found, Truth, ap_statistics
from rice_eval.metrics.detection_analysis import analysis_of
from rice_eval.probes.linear import Moments
from rice_eval.protocols.base import Context, Panel, Protocol
from rice_eval.views import Frame, View

__all__ = [
    "BoxScorer",
    "DetectionProtocol",
    "DetectionTest",
    "FrameBoxes",
    "FrameTargets",
    "Sample",
    "TrainBoxes",
    "TrainSet",
    "federated_of",
    "frame_targets",
    "image_order",
    "image_truth",
    "pyramid_layer",
    "to_image",
]

Boxes = NDArray[np.float64]
Detections = tuple[Tensor, Tensor, Tensor]
"""``(m, 4)`` xyxy boxes, ``(m,)`` scores, ``(m,)`` classes."""


@dataclass(frozen=True)
class FrameTargets:
    """Targets of one frame in its pixels: ``boxes (n, 4)``, ``labels (n,)``, and ``ignored (k, 4)`` that teach nothing.

    ``which (n,)`` are the boxes' places among the image's instances; ``masks`` their run lengths in the image, where asked for.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    ignored: NDArray[np.float32]
    which: NDArray[np.int64]
    masks: tuple[Mapping[str, Any], ...] | None = None


def frame_targets(
    dataset: Dataset, index: int, frames: Sequence[Frame], visible: float, masks: bool = False
) -> tuple[FrameTargets, ...]:
    """The boxes of one image in each of its frames, cut at the edge of what the frame shows.

    Args:
        visible: least share of a box's area that a frame must show; a box that shows less is ignored there.
        masks: whether masks are needed.

    Raises:
        DataError: a label outside the classes, or masks that the dataset does not have.
    """
    truth = dataset.instances(index)
    if len(truth.labels) and (truth.labels.min() < 0 or truth.labels.max() >= len(dataset.things)):
        raise DataError(
            f"dataset '{dataset.name}', image '{dataset.image_id(index)}': a label lies outside the "
            f"{len(dataset.things)} classes",
            "mend the annotations",
        )
    if masks and truth.masks is None:
        raise DataError(
            f"dataset '{dataset.name}', image '{dataset.image_id(index)}': no masks", "give --set masks=false"
        )
    out = []
    for frame in frames:
        moved = frame.boxes(truth.boxes)
        x1, y1, x2, y2 = frame.content
        cut = np.stack(
            [moved[:, 0].clip(x1, x2), moved[:, 1].clip(y1, y2), moved[:, 2].clip(x1, x2), moved[:, 3].clip(y1, y2)], 1
        )
        shown, whole = _areas(cut), _areas(moved)
        # A box without area, or wholly outside, is neither learnt nor ignored: there is nothing of it to see.
        some = shown > 0
        learnt = some & ~truth.crowd & (shown >= visible * whole)
        out.append(
            FrameTargets(
                cut[learnt].astype(np.float32),
                truth.labels[learnt],
                cut[some & ~learnt].astype(np.float32),
                np.flatnonzero(learnt),
                tuple(truth.masks[k] for k in np.flatnonzero(learnt)) if masks and truth.masks is not None else None,
            )
        )
    return tuple(out)


def _areas(boxes: Boxes) -> Boxes:
    sides = (boxes[:, 2:] - boxes[:, :2]).clip(min=0)
    return np.asarray(sides[:, 0] * sides[:, 1], dtype=np.float64)


def to_image(boxes: Tensor, frame: Frame) -> Boxes:
    """``(m, 4)`` xyxy of a frame -> of the original image, cut at its edges."""
    out = frame.boxes_back(boxes.double().cpu().numpy())
    height, width = frame.image_size
    out[:, 0::2] = out[:, 0::2].clip(0, width)
    out[:, 1::2] = out[:, 1::2].clip(0, height)
    return out


def federated_of(dataset: Dataset, index: int) -> tuple[Dataset, int]:
    """The dataset under any ``Subset``, and the image's index there."""
    while isinstance(dataset, Subset):
        subset: Subset = dataset
        dataset, index = subset.base, subset.picked[index]
    return dataset, index


def image_truth(dataset: Dataset, index: int) -> Truth:
    """Targets of the original image, for scoring; LVIS's lists of classes too."""
    found = dataset.instances(index)
    base, place = federated_of(dataset, index)
    negative, partly = None, frozenset[int]()
    if isinstance(base, Lvis):
        listed = base.federated(place)
        negative, partly = frozenset(listed.negative), frozenset(listed.not_exhaustive)
    return Truth(found.boxes, found.labels, found.crowd, found.area, found.masks, negative, partly)


class FrameBoxes:
    """A consumer's ``annotate`` for training: ``FrameTargets`` of every frame."""

    def __init__(self, visible: float, masks: bool = False) -> None:
        self._visible, self._masks = visible, masks

    def annotate(self, dataset: Dataset, index: int, frames: tuple[Frame, ...]) -> tuple[FrameTargets, ...]:
        """F targets."""
        return frame_targets(dataset, index, frames, self._visible, self._masks)

    def __getstate__(self) -> dict[str, Any]:
        # A decoding worker annotates and nothing else.
        return {"_visible": self._visible, "_masks": self._masks}


class TrainBoxes(FrameBoxes):
    """Rides on the training pass: targets of every frame, and feature moments of both parts of the split.

    Args:
        layers: layers read.
        facts: of the encoder.
        held: images held out.
        visible, masks: see ``frame_targets``.
        advance: called with 1 after each image.
    """

    def __init__(
        self,
        layers: Sequence[int],
        facts: EncoderFacts,
        held: Sequence[int],
        visible: float,
        advance: Callable[[int], None],
        masks: bool = False,
    ) -> None:
        super().__init__(visible, masks)
        self.fit_moments = {layer: Moments(facts.widths[layer - 1]) for layer in layers}
        self.held_moments = {layer: Moments(facts.widths[layer - 1]) for layer in layers}
        self.targets: dict[int, tuple[FrameTargets, ...]] = {}
        self._held = frozenset(held)
        self._advance = advance
        self.seconds = 0.0

    def consume(self, tokens: ImageTokens) -> None:
        """Take in one image."""
        start = time.perf_counter()
        self.targets[tokens.index] = tokens.target
        moments = self.held_moments if tokens.index in self._held else self.fit_moments
        for layer, into in moments.items():
            for patches in tokens.patches[layer]:
                into.add(patches)
        self.seconds += time.perf_counter() - start
        self._advance(1)

    @property
    def boxes(self) -> int:
        """Boxes that can be learnt."""
        return sum(len(t.labels) for frames in self.targets.values() for t in frames)


@dataclass(frozen=True)
class Sample:
    """One frame: ``maps`` layer -> ``(N, D)`` tokens, their grids, the frame and its targets."""

    maps: Mapping[int, Tensor]
    grids: Mapping[int, tuple[int, int]]
    frame: Frame
    targets: FrameTargets


@dataclass(frozen=True)
class TrainSet:
    """The training split through one or two views: a reader and the targets of each."""

    readers: tuple[TokenReader, ...]
    targets: tuple[Mapping[int, tuple[FrameTargets, ...]], ...]
    seed: int

    def batches(self, indices: Sequence[int], batch: int, steps: int) -> Iterator[list[Sample]]:
        """``steps`` batches of all frames of ``batch`` images; each image through one of the views, drawn anew."""
        order = image_order(indices, self.seed)
        for step in range(steps):
            views = np.random.default_rng((self.seed, step, 2)).integers(0, len(self.readers), batch)
            samples: list[Sample] = []
            for view in views.tolist():
                index = next(order)
                tokens = self.readers[view][index]
                for k, (frame, target) in enumerate(zip(tokens.frames, self.targets[view][index])):
                    maps = {layer: patches[k] for layer, patches in tokens.patches.items()}
                    grids = {layer: g[k] for layer, g in tokens.grids.items()}
                    samples.append(Sample(maps, grids, frame, target))
            yield samples


def image_order(indices: Sequence[int], seed: int) -> Iterator[int]:
    """The images over and over, each epoch in an order of its own."""
    epoch = 0
    while True:
        shuffle = np.random.default_rng((seed, epoch)).permutation(len(indices))
        yield from (indices[k] for k in shuffle)
        epoch += 1


class BoxScorer:
    """Collects detections image by image, and what the report draws.

    Args:
        dataset: the split.
        indices: its images that count, in order.
        panels: how many images to keep for the report, evenly spread.
        keep: whether every image's detections are kept as predictions.
    """

    def __init__(self, dataset: Dataset, indices: Sequence[int], panels: int = 0, keep: bool = False) -> None:
        self._dataset = dataset
        spread = np.linspace(0, len(indices) - 1, min(panels, len(indices))).round().astype(int)
        self._shown = {indices[k] for k in spread}
        self._ids: list[str] = []
        self.truth: list[Truth] = []
        self.found: list[Found] = []
        self.panels: list[Panel] = []
        self.predictions: dict[str, Any] | None = {} if keep else None
        base, _ = federated_of(dataset, 0)
        self._frequency = base.frequency if isinstance(base, Lvis) else None
        self.rule: Literal["coco", "lvis"] = "coco" if self._frequency is None else "lvis"

    @property
    def most(self) -> int:
        """Detections an image that the rule looks at: 100, or LVIS's 300."""
        return MAX_DETECTIONS[self.rule][-1]

    def add(self, index: int, truth: Truth, found: Found) -> None:
        """Take in one image."""
        name = self._dataset.image_id(index)
        self._ids.append(name)
        self.truth.append(truth)
        self.found.append(found)
        if index in self._shown:
            self.panels.append(Panel(name, index, truth, found))
        if self.predictions is not None:
            self.predictions[name] = found

    def statistics(self, kind: Literal["bbox", "segm"] = "bbox") -> ApStatistics:
        """The statistics of all images so far."""
        return ap_statistics(self._ids, self.truth, self.found, self._dataset.things, kind, self.rule, self._frequency)

    def analysis(self) -> dict[str, Any]:
        """What the report draws of all boxes so far; by COCO's rule, whatever the set's."""
        return analysis_of(self.truth, self.found, self.statistics())

    def warnings(self) -> tuple[str, ...]:
        """Classes that no test image has, in one line."""
        seen = {int(k) for t in self.truth for k in t.labels}
        absent = [name for k, name in enumerate(self._dataset.things) if k not in seen]
        if not absent:
            return ()
        shown = ", ".join(absent[:5]) + (", …" if len(absent) > 5 else "")
        return (f"{len(absent)} of {len(self._dataset.things)} classes do not occur in the test split: {shown}",)


Predict = Callable[[ImageTokens], Found]


class DetectionTest:
    """Reads the test split once, riding on its pass.

    Args:
        predict: tokens of one image to its detections.
        scorer: where they go.
        advance: called with 1 after each image.
    """

    def __init__(self, predict: Predict, scorer: BoxScorer, advance: Callable[[int], None]) -> None:
        self._predict, self._scorer, self._advance = predict, scorer, advance
        self.seconds = 0.0

    def annotate(self, dataset: Dataset, index: int, frames: tuple[Frame, ...]) -> Truth:
        """The image's targets."""
        return image_truth(dataset, index)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def consume(self, tokens: ImageTokens) -> None:
        """Detect and score one image."""
        start = time.perf_counter()
        self._scorer.add(tokens.index, tokens.target, self._predict(tokens))
        self.seconds += time.perf_counter() - start
        self._advance(1)


def pyramid_layer(facts: EncoderFacts, stride: float) -> int:
    """The layer a pyramid stands on: the deepest whose tokens are at most ``stride`` pixels wide; the deepest of the finest if none are.

    ViTDet's pyramid stands on a map of stride 16 (arXiv 2203.16527, section 3). A plain ViT has one stride and gives its last
    layer; the last stage of a hierarchical encoder, of stride 32, is a level too coarse for it.
    """
    widest = max(stride, min(facts.strides))
    return max(n for n, width in enumerate(facts.strides, start=1) if width <= widest)


@dataclass(frozen=True)
class DetectionProtocol(Protocol):
    """Fields and steps that all detection protocols share.

    Attributes:
        flip_view: whether the training images are seen mirrored too, as a second view of the bank; each image of a batch
            then comes through one of the two at random. The test split is seen once, not mirrored.
        visible: least share of a box that a frame must show to be learnt from there; only sliding views cut boxes.
        score_threshold: detections below it are dropped.
        nms_iou: of the suppression inside a class, after all frames are back in the image.
        candidates: (location, class) pairs kept of each level and frame before it.
        steps, batch: optimiser steps, images a step.
        warmup: share of the steps with a rising rate; then half a cosine to 0.
        betas: AdamW's.
        norm_eps: added to the variances that standardise features.
        holdout: share of the training images held out where there is something to choose.
    """

    kind: ClassVar[str] = "detection"
    needs: ClassVar[frozenset[Annotation]] = frozenset({"instances"})
    metric: ClassVar[str] = "ap"
    rereads: ClassVar[bool] = True

    flip_view: bool = False
    visible: float = 0.3
    score_threshold: float = 0.05
    nms_iou: float = 0.6
    candidates: int = 1000
    steps: int = 300
    batch: int = 16
    warmup: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.999)
    norm_eps: float = 1e-6
    holdout: float = 0.1

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.candidates) < 1:
            raise ValueError("steps, batch and candidates are at least 1")
        if not 0 <= self.warmup < 1 or not 0 < self.holdout < 1 or len(self.betas) != 2:
            raise ValueError("warmup is in [0, 1), holdout in (0, 1), betas are two")
        if not 0 < self.nms_iou <= 1 or not 0 <= self.score_threshold < 1 or not 0 <= self.visible <= 1:
            raise ValueError("nms_iou is in (0, 1], score_threshold in [0, 1), visible in [0, 1]")
        if self.flip_view and View.parse(self.view).flip:
            raise ValueError("flip_view adds the mirrored view, and the view is mirrored already")

    def views(self) -> Mapping[str, Sequence[str]]:
        """Views it reads of each split."""
        return {"train": self.train_views, "test": (self.view,)}

    @property
    def train_views(self) -> tuple[str, ...]:
        """The view, and its mirror image where ``flip_view`` asks for it."""
        return (self.view, f"{self.view},flip") if self.flip_view else (self.view,)

    def gather(
        self, context: Context, layers: Sequence[int], held: Sequence[int], masks: bool = False
    ) -> tuple[TrainSet, list[TrainBoxes]]:
        """Pass over the training split, once a view: targets, moments, and readers of the finished bank.

        Raises:
            DataError: no training image has a box.
        """
        passes, readers = [], []
        for view in self.train_views:
            source = context.tokens("train", view)
            boxes = TrainBoxes(
                layers, context.facts, held, self.visible, context.progress("boxes", len(source.indices)), masks
            )
            source.consume(boxes)
            passes.append(boxes)
            readers.append(source.reader())
        if not sum(p.boxes for p in passes):
            raise DataError(f"dataset '{context.train.name}': no training image has a box", "check the split")
        return TrainSet(tuple(readers), tuple(p.targets for p in passes), self.seed), passes
