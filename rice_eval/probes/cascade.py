"""Mask R-CNN and Cascade Mask R-CNN on a pyramid of frozen features, from torchvision's detection modules.

Coordinates are in sixteenths of a token: a token is 16 units a side whatever its pixels, so that the pyramid's strides are powers
of two, which torchvision's anchors and RoIAlign take for granted (a patch of 14 px at four times the resolution has a stride of 3.5).

Sources: Mask R-CNN (arXiv 1703.06870), Cascade R-CNN (1712.00726), feature pyramids (1612.03144), ViTDet (2203.16527).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import _utils as det_utils
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, batched_nms, box_iou, clip_boxes_to_image

__all__ = ["UNIT", "CascadeRcnn", "Instance", "Settings", "Wanted"]

UNIT = 16
"""Units a token."""
ANCHOR = 8
"""Side of a level's anchors in its own strides: feature pyramids have 32 px at stride 4 to 512 px at stride 64."""
CODER = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
"""Box coder weights of the stages (Cascade R-CNN's deviations 0.1, 0.2 halved and cut to a third)."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the heads.

    Attributes:
        classes: C.
        ious: IoU with a target from which a box is one, a stage: (0.5,) is Mask R-CNN, (0.5, 0.6, 0.7) the cascade.
        hidden: width of the two layers of a box head.
        samples: boxes an image of the first stage, a quarter of them targets at most.
        proposals: proposals an image that the region proposal network gives.
        candidates: of each level before its suppression.
        masks: whether there is a mask head.
        mask_channels: width of its four convolutions.
    """

    classes: int
    ious: tuple[float, ...]
    hidden: int
    samples: int
    proposals: int
    candidates: int
    masks: bool
    mask_channels: int


@dataclass(frozen=True)
class Wanted:
    """Targets of one frame: ``boxes (n, 4)`` in units, ``labels (n,)``, ``masks (n, H, W)`` of the frame's pixels or None, and
    ``pixels``: ``(x, y)`` pixels a unit."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None
    pixels: tuple[float, float]


@dataclass(frozen=True)
class Instance:
    """Detections of one frame: boxes in units, scores, classes, ``masks (m, 28, 28)`` probabilities inside their boxes."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None


class CascadeRcnn(nn.Module):
    """A region proposal network, one to three box stages (class-agnostic boxes) and a mask head on a pyramid.

    Args:
        inputs: standardises the map.
        pyramid: ``(B, D, h, w)`` to a list of levels.
        channels: of every level.
        scales: of the levels against the map, finest first.
        settings: of the heads.
    """

    def __init__(
        self, inputs: nn.Module, pyramid: nn.Module, channels: int, scales: Sequence[float], settings: Settings
    ) -> None:
        super().__init__()
        self.inputs, self.pyramid, self.settings = inputs, pyramid, settings
        self.step = round(1 / min(1.0, *scales))  # the map's sides are padded to a multiple of the coarsest cell
        names = [str(k) for k in range(len(scales))]
        sizes = tuple((round(ANCHOR * UNIT / s),) for s in scales)
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(scales))
        # 0.7, 0.3, 256 anchors, half of them targets, suppression at 0.7: Faster R-CNN's own (arXiv 1506.01497).
        self.rpn = RegionProposalNetwork(
            anchors, RPNHead(channels, 3), 0.7, 0.3, 256, 0.5,
            dict.fromkeys(("training", "testing"), settings.candidates),
            dict.fromkeys(("training", "testing"), settings.proposals), 0.7,
        )  # fmt: skip
        self.pool = MultiScaleRoIAlign(names, 7, 2)
        self.heads = nn.ModuleList(_box_head(channels * 49, settings.hidden) for _ in settings.ious)
        self.classes = nn.ModuleList(nn.Linear(settings.hidden, settings.classes + 1) for _ in settings.ious)
        self.boxes = nn.ModuleList(nn.Linear(settings.hidden, 4) for _ in settings.ious)
        self.coders = [det_utils.BoxCoder(CODER[k]) for k in range(len(settings.ious))]
        self.sampler = det_utils.BalancedPositiveNegativeSampler(settings.samples, 0.25)
        if settings.masks:
            width = settings.mask_channels
            self.mask_pool = MultiScaleRoIAlign(names, 14, 2)
            self.mask_head = MaskRCNNHeads(channels, (width,) * 4, 1)
            self.mask_out = MaskRCNNPredictor(width, width, settings.classes)

    def _features(self, maps: Tensor) -> tuple[dict[str, Tensor], tuple[int, int], ImageList]:
        """Levels, the padded size in units, and what the proposal network wants to know of the images."""
        b, _, h, w = maps.shape
        x = F.pad(self.inputs(maps), (0, -w % self.step, 0, -h % self.step))
        padded = (x.shape[2] * UNIT, x.shape[3] * UNIT)
        levels = OrderedDict((str(k), level) for k, level in enumerate(self.pyramid(x)))
        images = ImageList(x.new_empty(b, 0, *padded), [(h * UNIT, w * UNIT)] * b)
        return levels, padded, images

    def losses(self, maps: Tensor, wanted: Sequence[Wanted]) -> dict[str, Tensor]:
        """Losses of ``(B, D, h, w)`` maps: of the proposals, of every stage's classes and boxes, of the masks."""
        levels, padded, images = self._features(maps)
        targets = [{"boxes": w.boxes, "labels": w.labels} for w in wanted]
        boxes, out = self.rpn(images, levels, targets)
        boxes = [torch.cat([b.detach(), w.boxes]) for b, w in zip(boxes, wanted)]
        size = images.image_sizes[0]
        losses: dict[str, Tensor] = dict(out)
        for stage, iou in enumerate(self.settings.ious):
            matched = [_match(b, w, iou, self.settings.classes) for b, w in zip(boxes, wanted)]
            if stage == 0:
                picked = self._sample([m[1] for m in matched])
                boxes = [b[p] for b, p in zip(boxes, picked)]
                matched = [(which[p], label[p]) for (which, label), p in zip(matched, picked)]
                first = boxes, matched
            logits, deltas = self._stage(stage, levels, padded, boxes, True)
            labels = torch.cat([label for _, label in matched])
            losses[f"class{stage}"] = F.cross_entropy(logits, labels)
            losses[f"box{stage}"] = self._box_loss(stage, deltas, boxes, wanted, matched, labels)
            boxes = [clip_boxes_to_image(b.detach(), size) for b in self._moved(stage, deltas, boxes)]
        if self.settings.masks:
            losses["mask"] = self._mask_loss(levels, padded, wanted, *first)
        return losses

    def _sample(self, labels: Sequence[Tensor]) -> list[Tensor]:
        flags = [(label < self.settings.classes).to(torch.int64) for label in labels]
        positive, negative = self.sampler(flags)
        return [torch.where(p.bool() | n.bool())[0] for p, n in zip(positive, negative)]

    def _stage(
        self, stage: int, levels: dict[str, Tensor], padded: tuple[int, int], boxes: list[Tensor], training: bool
    ) -> tuple[Tensor, Tensor]:
        """``(R, C + 1)`` logits, the last for background, and ``(R, 4)`` deltas of the boxes of all images."""
        x = self.pool(levels, boxes, [padded] * len(boxes))
        if training and len(self.settings.ious) > 1:
            # All stages pull at one pyramid: each with its share.
            share = 1.0 / len(self.settings.ious)
            x = x * share + x.detach() * (1 - share)
        x = self.heads[stage](x)
        return cast(Tensor, self.classes[stage](x)), cast(Tensor, self.boxes[stage](x))

    def _moved(self, stage: int, deltas: Tensor, boxes: list[Tensor]) -> list[Tensor]:
        moved = self.coders[stage].decode_single(deltas, torch.cat(boxes))
        return list(moved.split([len(b) for b in boxes]))

    def _box_loss(
        self,
        stage: int,
        deltas: Tensor,
        boxes: list[Tensor],
        wanted: Sequence[Wanted],
        matched: Sequence[tuple[Tensor, Tensor]],
        labels: Tensor,
    ) -> Tensor:
        positive = labels < self.settings.classes
        goals = [w.boxes[which] if len(w.boxes) else b for b, w, (which, _) in zip(boxes, wanted, matched)]
        target = self.coders[stage].encode_single(torch.cat(goals), torch.cat(boxes))
        # 1/9: torchvision's and Detectron's corner of the smooth L1 loss.
        loss = F.smooth_l1_loss(deltas[positive], target[positive], beta=1 / 9, reduction="sum")
        return loss / max(1, len(labels))

    def _mask_loss(
        self,
        levels: dict[str, Tensor],
        padded: tuple[int, int],
        wanted: Sequence[Wanted],
        boxes: list[Tensor],
        matched: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        keep = [label < self.settings.classes for _, label in matched]
        boxes = [b[k] for b, k in zip(boxes, keep)]
        if not sum(map(len, boxes)):
            return next(iter(levels.values())).sum() * 0
        logits = self._mask_logits(levels, padded, boxes)
        labels = torch.cat([label[k] for (_, label), k in zip(matched, keep)])
        goals = []
        for b, w, (which, _), k in zip(boxes, wanted, matched, keep):
            assert w.masks is not None
            scale = b.new_tensor([*w.pixels, *w.pixels])
            if len(b):
                goals.append(project_masks_on_boxes(w.masks, b * scale, which[k], logits.shape[-1]))
        mine = logits[torch.arange(len(labels)), labels]
        return F.binary_cross_entropy_with_logits(mine, torch.cat(goals).to(mine.dtype))

    def _mask_logits(self, levels: dict[str, Tensor], padded: tuple[int, int], boxes: list[Tensor]) -> Tensor:
        x = self.mask_pool(levels, boxes, [padded] * len(boxes))
        return cast(Tensor, self.mask_out(self.mask_head(x)))

    @torch.inference_mode()
    def detect(self, map_: Tensor, threshold: float, iou: float, most: int) -> Instance:
        """Detections of one ``(1, D, h, w)`` map, suppressed inside each class; scores are the stages' mean."""
        levels, padded, images = self._features(map_)
        boxes, _ = self.rpn(images, levels)
        size = images.image_sizes[0]
        share = []
        for stage in range(len(self.settings.ious)):
            logits, deltas = self._stage(stage, levels, padded, boxes, False)
            share.append(logits.softmax(dim=1)[:, :-1])
            boxes = [clip_boxes_to_image(b, size) for b in self._moved(stage, deltas, boxes)]
        scores, found = torch.stack(share).mean(dim=0), boxes[0]
        row, label = torch.nonzero(scores > threshold, as_tuple=True)
        solid = (found[row, 2:] > found[row, :2]).all(dim=1)
        row, label = row[solid], label[solid]
        keep = batched_nms(found[row], scores[row, label], label, iou)[:most]
        row, label = row[keep], label[keep]
        masks = None
        if self.settings.masks:
            masks = found.new_zeros(0, 28, 28)
            if len(row):
                logits = self._mask_logits(levels, padded, [found[row]])
                masks = logits[torch.arange(len(row)), label].sigmoid()
        return Instance(found[row], scores[row, label], label, masks)


def _box_head(inputs: int, hidden: int) -> nn.Sequential:
    """Two layers on a flattened RoI, each with a layer norm (ViTDet norms its heads too): one rate then suits encoders of any width."""
    layers: list[nn.Module] = [nn.Flatten(1)]
    for width in (inputs, hidden):
        layers += [nn.Linear(width, hidden, bias=False), nn.LayerNorm(hidden), nn.ReLU()]
    return nn.Sequential(*layers)


def _match(boxes: Tensor, wanted: Wanted, iou: float, background: int) -> tuple[Tensor, Tensor]:
    """For each box its best target, and that target's class where they overlap enough, else the background's number."""
    if not len(wanted.boxes):
        none = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return none, none + background
    best, which = box_iou(boxes, wanted.boxes).max(dim=1)
    return which, torch.where(best >= iou, wanted.labels[which], torch.full_like(which, background))
