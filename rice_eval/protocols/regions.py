"""What every region protocol shares: given boxes through a view to features, and the control, the same boxes cut out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pil
from torch import Tensor

from rice_eval.adapters.base import EmbedsImage, Encoder, Tokens
from rice_eval.adapters.regions import How, region_features
from rice_eval.bank.source import ImageTokens
from rice_eval.datasets.base import Annotation, Dataset, Instances
from rice_eval.errors import DataError, MissingExtraError, PlanError
from rice_eval.metrics.regions import RegionStatistics
from rice_eval.protocols.base import Context, Protocol
from rice_eval.protocols.segmentation import check_choice
from rice_eval.views import Frame

__all__ = ["Pooling", "Region", "RegionPass", "RegionProtocol", "RegionSet", "regions_of"]

Pooling = Literal["roialign", "mask", "prompter"]
POOLINGS: tuple[Pooling, ...] = ("roialign", "mask", "prompter")


@dataclass(frozen=True)
class Region:
    """The regions of one image that can be seen.

    Attributes:
        frame: ``(n,)`` the frame that shows most of each box; the first of equals.
        boxes: ``(n, 4)`` xyxy in that frame, 0 to 1 of its sides, cut at the edge of what it shows.
        labels: ``(n,)``.
        names: a phrase each, or empty.
        which: ``(n,)`` their places among the image's instances.
        masks: for each region ``(h, w)`` bool in its frame, where masks are asked for.
        crops: ``(n, S, S, 3)`` uint8, the boxes cut out of the image and squashed to a square, where asked for.
        dropped: regions left out: no area, or wholly outside the image (or under a mask that no pixel of the frame shows).
    """

    frame: NDArray[np.int64]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    which: NDArray[np.int64]
    masks: tuple[NDArray[np.bool_], ...] | None
    crops: NDArray[np.uint8] | None
    dropped: int


def regions_of(
    dataset: Dataset, index: int, frames: Sequence[Frame], masks: bool, crop: int, given: Instances | None = None
) -> Region:
    """Given boxes of one image in its frames; crowds are no regions.

    Args:
        masks: whether masks are needed.
        crop: side in pixels of the cut-outs; 0 for none.
        given: the regions; the image's own instances where None.

    Raises:
        DataError: a label outside the classes, or masks that the dataset does not have.
    """
    truth = dataset.instances(index) if given is None else given
    where = f"dataset '{dataset.name}', image '{dataset.image_id(index)}'"
    if len(truth.labels) and (truth.labels.min() < 0 or truth.labels.max() >= len(dataset.things)):
        raise DataError(f"{where}: a label lies outside the {len(dataset.things)} classes", "mend the annotations")
    best = np.zeros(len(truth.labels))
    chosen, boxes = np.zeros(len(truth.labels), np.int64), np.zeros((len(truth.labels), 4))
    for k, frame in enumerate(frames):
        x1, y1, x2, y2 = frame.content
        moved = frame.boxes(truth.boxes)
        moved[:, 0::2], moved[:, 1::2] = moved[:, 0::2].clip(x1, x2), moved[:, 1::2].clip(y1, y2)
        area = (moved[:, 2:] - moved[:, :2]).prod(axis=1)
        better = area > best
        chosen[better], best[better] = k, area[better]
        height, width = frame.size
        boxes[better] = moved[better] / (width, height, width, height)
    # In single precision, as features are pooled: a box thinner than that has no area.
    solid = (boxes[:, 2:].astype(np.float32) > boxes[:, :2].astype(np.float32)).all(axis=1)
    kept = np.flatnonzero((best > 0) & solid & ~truth.crowd)
    pictures = None
    if masks:
        if truth.masks is None:
            raise DataError(f"{where}: no masks", "use how=roialign, or a set with masks")
        decoded = _decoded(truth.masks)
        drawn = [frames[chosen[k]].mask(decoded[k], 0) > 0 for k in kept]
        pictures = tuple(d for d in drawn if d.any())
        kept = kept[[bool(d.any()) for d in drawn]] if drawn else kept
    return Region(
        chosen[kept],
        boxes[kept],
        truth.labels[kept],
        tuple(truth.names[k] for k in kept) if truth.names is not None else (),
        kept,
        pictures,
        _cut_out(dataset.image(index), truth.boxes[kept], crop) if crop else None,
        int((~truth.crowd).sum()) - len(kept),
    )


def _decoded(masks: Sequence[Any]) -> list[NDArray[np.int64]]:
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise MissingExtraError.of("pycocotools", "detection", "pooling under masks") from error
    return [np.asarray(coco_mask.decode(dict(m)), dtype=np.int64) for m in masks]


def _cut_out(image: NDArray[np.uint8], boxes: NDArray[np.float64], side: int) -> NDArray[np.uint8]:
    """``(n, side, side, 3)``: boxes rounded outwards to whole pixels, cut at the image's edge, squashed bicubically."""
    height, width = image.shape[:2]
    out = np.zeros((len(boxes), side, side, 3), np.uint8)
    for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        left, top = min(max(math.floor(x1), 0), width - 1), min(max(math.floor(y1), 0), height - 1)
        right, bottom = max(min(math.ceil(x2), width), left + 1), max(min(math.ceil(y2), height), top + 1)
        part = Pil.fromarray(image[top:bottom, left:right])
        out[k] = np.asarray(part.resize((side, side), Pil.Resampling.BICUBIC))
    return out


@dataclass
class RegionSet:
    """Regions of a split: ``features`` of each method and layer ``(n, D)`` in rows, and what they are of.

    Methods are the pooling and, where asked for, ``crop``. ``image (n,)`` counts the images of ``ids``.
    """

    ids: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    image: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    boxes: list[tuple[int, int]] = field(default_factory=list)
    """(image, place among its instances) a row."""
    parts: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    dropped: int = 0
    forwards: int = 0

    def list_regions(self, name: str, index: int, region: Region) -> None:
        """Rows of one image's regions."""
        place = len(self.ids)
        self.ids.append(name)
        self.indices.append(index)
        self.image += [place] * len(region.labels)
        self.labels += region.labels.tolist()
        self.names += list(region.names)
        self.boxes += [(place, int(k)) for k in region.which]
        self.dropped += region.dropped

    def features(self, method: str, layer: int) -> Tensor:
        """``(n, D)`` float32."""
        parts = [p for p in self.parts.get((method, layer), []) if len(p)]
        return torch.cat(parts).float() if parts else torch.zeros(0, 1)

    def statistics(self, classes: Sequence[str], predicted: dict[str, NDArray[np.int64]]) -> RegionStatistics:
        """Statistics of predicted classes, a method."""
        image, label = np.array(self.image, dtype=np.int64), np.array(self.labels, dtype=np.int64)
        return RegionStatistics.of(self.ids, classes, image, label, {m: p == label for m, p in predicted.items()})

    def warnings(self, split: str) -> tuple[str, ...]:
        """How many regions were left out, in one line."""
        if not self.dropped:
            return ()
        total = self.dropped + len(self.labels)
        return (f"{self.dropped} of {total} {split} regions have no area inside the image and were left out",)


class RegionPass:
    """Rides on a pass (or reads the bank): features of every region of a split.

    Args:
        dataset: the split.
        encoder: who made the tokens; also forwards the cut-outs.
        how: pooling.
        layers: layers to pool.
        crop: side of the cut-outs; 0 for no control.
        finish: applied to the pooled features of each image.
        advance: called with 1 after each image.
    """

    def __init__(
        self,
        dataset: Dataset,
        encoder: Encoder,
        how: How,
        layers: Sequence[int],
        crop: int,
        advance: Callable[[int], None],
        finish: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self._dataset, self._encoder, self._how, self._layers = dataset, encoder, how, tuple(layers)
        self._crop, self._advance, self._finish = crop, advance, finish
        self.found = RegionSet()
        self.seconds = 0.0

    def __getstate__(self) -> dict[str, Any]:
        # A decoding worker annotates and nothing else.
        return {"_how": self._how, "_crop": self._crop}

    def annotate(self, dataset: Dataset, index: int, frames: tuple[Frame, ...]) -> Region:
        """The image's regions."""
        return regions_of(dataset, index, frames, self._how == "mask", self._crop)

    @torch.inference_mode()
    def consume(self, tokens: ImageTokens) -> None:
        """Pool the regions of one image."""
        start = time.perf_counter()
        region: Region = tokens.target
        out = self.found
        out.list_regions(self._dataset.image_id(tokens.index), tokens.index, region)
        for layer in self._layers:
            out.parts.setdefault((self._how, layer), []).append(self._finish(self._pooled(tokens, region, layer)))
        if region.crops is not None:
            out.parts.setdefault(("crop", self._layers[-1]), []).append(self.cropped(region.crops))
        self.seconds += time.perf_counter() - start
        self._advance(1)

    def _pooled(self, tokens: ImageTokens, region: Region, layer: int) -> Tensor:
        rows: list[tuple[int, Tensor]] = []
        for k in np.unique(region.frame).tolist():
            mine = np.flatnonzero(region.frame == k)
            patches = tokens.patches[layer][k].to(self._encoder.device, torch.float32)[None]
            here = Tokens({layer: patches}, {layer: tokens.grids[layer][k]})
            boxes = torch.from_numpy(region.boxes[mine]).float().clamp(0, 1)
            masks = None
            if region.masks is not None:
                masks = [torch.from_numpy(np.stack([region.masks[m] for m in mine]))]
            pooled = region_features(self._encoder, here, [boxes], self._how, masks=masks, layer=layer)[0]
            rows += list(zip(mine.tolist(), pooled))
        rows.sort(key=lambda row: row[0])
        return torch.stack([row for _, row in rows]).cpu() if rows else torch.zeros(0, 1)

    def cropped(self, crops: NDArray[np.uint8]) -> Tensor:
        """``(n, E)``: the encoder's own image embedding; where it has none, the class token, else the mean token."""
        out = []
        encoder = self._encoder
        for start in range(0, len(crops), 16):
            images = torch.from_numpy(crops[start : start + 16]).permute(0, 3, 1, 2).float().div(255)
            self.found.forwards += len(images)
            if "image" in encoder.facts.abilities and isinstance(encoder, EmbedsImage):
                out.append(encoder.embed_image(images.to(encoder.device)).float().cpu())
                continue
            tokens = encoder.encode(images.to(encoder.device))
            out.append((tokens.cls if tokens.cls is not None else tokens.last.mean(dim=1)).float().cpu())
        return torch.cat(out) if out else torch.zeros(0, 1)


@dataclass(frozen=True)
class RegionProtocol(Protocol):
    """Fields that all region protocols share.

    Attributes:
        how: ``roialign`` (bilinear samples of the token grid, half-pixel aligned, averaged over the box), ``mask`` (mean of tokens
            weighted by the mask's share of each) or ``prompter`` (the encoder's own region head).
        control: score the same regions a second time, each cut out of the image, squashed to the encoder's native square and
            embedded whole: one forward a region, outside the bank.
    """

    kind: ClassVar[str] = "regions"
    needs: ClassVar[frozenset[Annotation]] = frozenset({"instances"})
    metric: ClassVar[str] = "macc"

    how: Pooling = "roialign"
    control: bool = False

    def __post_init__(self) -> None:
        check_choice("how", self.how, POOLINGS)

    def collect(
        self, context: Context, split: str, layers: Sequence[int], finish: Callable[[Tensor], Tensor] = lambda x: x
    ) -> RegionPass:
        """Features of every region of a split.

        Raises:
            PlanError: an encoder without a region head where ``how`` asks for it, or the wrong layers for it.
        """
        encoder = context.encoder()
        if self.how == "prompter" and "regions" not in context.facts.abilities:
            raise PlanError(
                f"protocol '{self.id}': encoder '{context.facts.name}' has no region head of its own",
                "give --set how=roialign",
            )
        dataset = context.train if split == "train" else context.test
        source = context.tokens(split, self.view)
        side = context.facts.resolution if self.control else 0
        advance = context.progress(f"regions {split}", len(source.indices))
        found = RegionPass(dataset, encoder, self.how, layers, side, advance, finish)
        source.consume(found)
        if not found.found.labels:
            raise DataError(f"dataset '{dataset.name}' ({dataset.split}): no region to score", "check the split")
        return found
