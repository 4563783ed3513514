"""FCOS (Tian et al., arXiv 1904.01355): targets of every location, losses, and boxes from predictions.

A location is the centre of a cell of a feature map, in pixels of the frame that the encoder saw. It predicts classes, the
distances to the four sides of its box in cells, and its centre-ness. Losses come for H heads side by side, which share
locations and targets; each head's loss depends on its own outputs alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "PRIOR",
    "Level",
    "Losses",
    "Targets",
    "assign",
    "decode",
    "fcos_loss",
    "level_ranges",
    "locations",
    "suppress",
]

PRIOR = 0.01
"""Initial class probability (RetinaNet, arXiv 1708.02002, section 4.1): the background does not swamp the first steps."""
_LIMIT = 8.0
"""Distances are at most exp(8) = 2981 cells: more than any image has, and far from overflow."""


@dataclass(frozen=True)
class Level:
    """One feature map.

    Attributes:
        grid: ``(h, w)``.
        stride: ``(sy, sx)`` pixels of a cell.
        low, high: it takes boxes whose longest distance from the location lies in ``(low, high]`` pixels.
    """

    grid: tuple[int, int]
    stride: tuple[float, float]
    low: float = 0.0
    high: float = float("inf")

    @property
    def count(self) -> int:
        """Locations."""
        return self.grid[0] * self.grid[1]


def level_ranges(strides: Sequence[float], cells: float) -> list[tuple[float, float]]:
    """Size ranges of a pyramid, finest level first: each up to ``cells`` of its own strides, the last without end.

    FCOS gives its level of stride 8 distances up to 64 px, that of stride 16 up to 128 px and so on: 8 cells.
    """
    ends = [cells * s for s in strides[:-1]] + [float("inf")]
    return list(zip([0.0, *ends[:-1]], ends))


def locations(levels: Sequence[Level]) -> tuple[Tensor, Tensor, Tensor]:
    """Centres, strides and ranges of all locations, level after level, rows first.

    Returns:
        ``(L, 2)`` xy in pixels, ``(L, 2)`` sx, sy in pixels, ``(L, 2)`` low, high in pixels.
    """
    points, strides, ranges = [], [], []
    for level in levels:
        (h, w), (sy, sx) = level.grid, level.stride
        y, x = torch.meshgrid((torch.arange(h) + 0.5) * sy, (torch.arange(w) + 0.5) * sx, indexing="ij")
        points.append(torch.stack([x, y], dim=-1).view(-1, 2))
        strides.append(torch.tensor([sx, sy]).expand(level.count, 2))
        ranges.append(torch.tensor([level.low, level.high]).expand(level.count, 2))
    return torch.cat(points).float(), torch.cat(strides).float(), torch.cat(ranges).float()


@dataclass(frozen=True)
class Targets:
    """What L locations should say.

    Attributes:
        label: ``(L,)`` int64 class, -1 for background, -2 where nothing may be learnt (crowds, cut objects).
        distance: ``(L, 4)`` left, top, right, bottom in cells; rows of ones where there is no box.
        centreness: ``(L,)`` in [0, 1].
        missed: boxes that no location takes.
    """

    label: Tensor
    distance: Tensor
    centreness: Tensor
    missed: int = 0


def assign(levels: Sequence[Level], boxes: Tensor, labels: Tensor, ignored: Tensor, radius: float) -> Targets:
    """FCOS's rule: a location takes the smallest box it lies in, of those of its level's size.

    Args:
        levels: the maps.
        boxes: ``(n, 4)`` xyxy in pixels of the frame.
        labels: ``(n,)`` classes.
        ignored: ``(k, 4)`` boxes whose inside is no background.
        radius: centre sampling: only locations within this many cells of the box's centre (both ways); 0 for the whole box.
    """
    points, strides, ranges = locations(levels)
    label = torch.full((len(points),), -1, dtype=torch.int64)
    distance, centreness = torch.ones(len(points), 4), torch.zeros(len(points))
    if len(ignored):
        label[(_sides(points, ignored.float()).amin(dim=-1) > 0).any(dim=1)] = -2
    if not len(boxes):
        return Targets(label, distance, centreness)
    boxes = boxes.float()
    sides = _sides(points, boxes)
    able = sides.amin(dim=-1) > 0
    if radius > 0:
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        away = (points[:, None] - centres[None]).abs() / strides[:, None]
        able &= away.amax(dim=-1) < radius
    longest = sides.amax(dim=-1)
    able &= (longest > ranges[:, :1]) & (longest <= ranges[:, 1:])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=-1).expand(len(points), -1)
    smallest, which = torch.where(able, area, torch.full_like(area, float("inf"))).min(dim=1)
    taken = torch.isfinite(smallest)
    label[taken] = labels[which[taken]].long()
    mine = sides[taken, which[taken]]
    distance[taken] = mine / strides[taken].repeat(1, 2)
    centreness[taken] = _centreness(mine)
    return Targets(label, distance, centreness, len(boxes) - len(set(which[taken].tolist())))


def _sides(points: Tensor, boxes: Tensor) -> Tensor:
    """``(L, n, 4)`` distances of each point from each box's left, top, right and bottom side; negative outside."""
    return torch.cat([points[:, None] - boxes[None, :, :2], boxes[None, :, 2:] - points[:, None]], dim=-1)


def _centreness(sides: Tensor) -> Tensor:
    """``(…)`` of ``(…, 4)`` distances: sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))."""
    pairs = torch.stack([sides[..., [0, 2]], sides[..., [1, 3]]], dim=-2)
    return (pairs.amin(dim=-1) / pairs.amax(dim=-1)).prod(dim=-1).sqrt()


@dataclass(frozen=True)
class Losses:
    """Sums over locations, ``(H,)`` each, and what to divide by: several parts of a batch are added, then divided.

    Attributes:
        classes, boxes, centres: summed losses.
        positives: locations with a box.
        weight: their summed centre-ness.
    """

    classes: Tensor
    boxes: Tensor
    centres: Tensor
    positives: float
    weight: float

    def __add__(self, other: Losses) -> Losses:
        return Losses(
            self.classes + other.classes,
            self.boxes + other.boxes,
            self.centres + other.centres,
            self.positives + other.positives,
            self.weight + other.weight,
        )

    def total(self) -> Tensor:
        """``(H,)`` loss: classes and centres a positive location, boxes a unit of centre-ness, as FCOS weighs them."""
        n, weight = max(self.positives, 1.0), max(self.weight, 1e-6)
        return self.classes / n + self.boxes / weight + self.centres / n


def fcos_loss(outputs: Tensor, targets: Targets, alpha: float, gamma: float) -> Losses:
    """Focal loss of the classes (arXiv 1708.02002), GIoU loss of the boxes (1902.09630), cross-entropy of the centre-ness.

    Args:
        outputs: ``(H, L, C + 5)``: class logits, four log distances in cells, centre-ness logit.
        targets: of the L locations, on the same device.
        alpha, gamma: of the focal loss.
    """
    classes = outputs.shape[-1] - 5
    keep = targets.label > -2
    logits = outputs[:, keep, :classes].float()
    wanted = targets.label[keep]
    truth = torch.zeros(logits.shape[1:], device=logits.device)
    rows = torch.nonzero(wanted >= 0)[:, 0]
    truth[rows, wanted[rows]] = 1.0
    p = logits.sigmoid()
    away = torch.where(truth > 0, 1 - p, p)
    share = torch.where(truth > 0, alpha, 1 - alpha)
    entropy = F.softplus(torch.where(truth > 0, -logits, logits))
    focal = (share * away**gamma * entropy).sum(dim=(1, 2))
    positive = targets.label >= 0
    centre = targets.centreness[positive]
    found = outputs[:, positive, classes : classes + 4].float().clamp(max=_LIMIT).exp()
    boxes = ((1 - _giou(found, targets.distance[positive])) * centre).sum(dim=1)
    centres = F.binary_cross_entropy_with_logits(
        outputs[:, positive, classes + 4].float(), centre.expand(len(outputs), -1), reduction="none"
    ).sum(dim=1)
    return Losses(focal, boxes, centres, float(positive.sum()), float(centre.sum()))


def _giou(found: Tensor, wanted: Tensor) -> Tensor:
    """``(H, P)`` generalised IoU of boxes given by their four distances from one common point."""
    wanted = wanted.expand_as(found)
    low, high = torch.minimum(found, wanted), torch.maximum(found, wanted)
    inside = (low[..., 0] + low[..., 2]) * (low[..., 1] + low[..., 3])
    hull = (high[..., 0] + high[..., 2]) * (high[..., 1] + high[..., 3])
    areas = [(b[..., 0] + b[..., 2]) * (b[..., 1] + b[..., 3]) for b in (found, wanted)]
    union = areas[0] + areas[1] - inside
    return inside / union - (hull - union) / hull


def decode(outputs: Tensor, levels: Sequence[Level], threshold: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of one frame and one head, before suppression.

    Args:
        outputs: ``(L, C + 5)``.
        levels: the maps, in the order of the locations.
        threshold: least score; a score is sqrt(class probability x centre-ness).
        most: (location, class) pairs kept of each level, the best ones.

    Returns:
        ``(m, 4)`` xyxy in pixels of the frame (not clipped), ``(m,)`` scores, ``(m,)`` classes.
    """
    points, strides, _ = (t.to(outputs.device) for t in locations(levels))
    classes = outputs.shape[-1] - 5
    score = (outputs[:, :classes].float().sigmoid() * outputs[:, classes + 4 :].float().sigmoid()).sqrt()
    reach = outputs[:, classes : classes + 4].float().clamp(max=_LIMIT).exp() * strides.repeat(1, 2)
    boxes = torch.cat([points - reach[:, :2], points + reach[:, 2:]], dim=1)
    rows = []
    start = 0
    for level in levels:
        part = score[start : start + level.count].flatten()
        picked = torch.nonzero(part > threshold)[:, 0]
        if len(picked) > most:
            picked = picked[part[picked].topk(most).indices]
        rows.append(picked + start * classes)
        start += level.count
    flat = torch.cat(rows)
    return boxes[flat // classes], score.flatten()[flat], flat % classes


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Non-maximum suppression inside each class, then the ``most`` best detections, by descending score."""
    from torchvision.ops import batched_nms

    keep = batched_nms(boxes.float(), scores.float(), labels, iou)[:most]
    return boxes[keep], scores[keep], labels[keep]
