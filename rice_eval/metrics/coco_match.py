"""Greedy matching of detections to targets for many (image, class) pairs at once.

The rule is ``pycocotools``' ``COCOeval.evaluateImg``: detections in order of score; each takes the free target of highest IoU
at or above the threshold, one that counts before one that is ignored, the later of two at the same IoU; crowds can be taken
many times. LVIS (``lvis/eval.py``) has the same rule without crowds, on the classes that were checked in the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rice_eval.metrics.coco import Found, Truth

__all__ = ["Flags", "Groups", "box_iou", "match_groups"]

Floats = NDArray[np.float64]
_CHUNK = 1 << 23  # elements of one (pairs, areas, thresholds, targets) array


@dataclass(frozen=True)
class Flags:
    """``(M, A, T)`` bool each: whether a detection was matched, and whether it counts neither way."""

    matched: NDArray[np.bool_]
    ignored: NDArray[np.bool_]


@dataclass(frozen=True)
class Groups:
    """All targets and detections of a set, grouped by (image, class).

    Attributes:
        ious: one ``(m, n)`` matrix a group; detections in order of score.
        detections, targets: one array of row numbers a group.
        detection_*: ``(M,)`` over the detections kept.
        target_*: ``(P,)`` over all targets that belong to a group.
        unmatched_ignored: ``(M,)`` whether an unmatched detection counts neither way (LVIS: class not exhaustively labelled).
    """

    ious: list[Floats]
    detections: list[NDArray[np.int64]]
    targets: list[NDArray[np.int64]]
    detection_image: NDArray[np.int64]
    detection_class: NDArray[np.int64]
    detection_score: Floats
    detection_rank: NDArray[np.int64]
    detection_area: Floats
    unmatched_ignored: NDArray[np.bool_]
    target_image: NDArray[np.int64]
    target_class: NDArray[np.int64]
    target_area: Floats
    target_crowd: NDArray[np.bool_]

    @classmethod
    def of(
        cls, truth: Sequence[Truth], found: Sequence[Found], classes: int, kind: str, rule: str, limit: int
    ) -> Groups:
        """Group a set; see ``ap_statistics`` for the arguments."""
        ious: list[Floats] = []
        groups_d: list[NDArray[np.int64]] = []
        groups_t: list[NDArray[np.int64]] = []
        parts: dict[str, list[Any]] = {n: [] for n in ("di", "dc", "ds", "dr", "da", "du", "ti", "tc", "ta", "tw")}
        n_d = n_t = 0
        for image, (t, f) in enumerate(zip(truth, found)):
            _check(image, t, f, classes, kind)
            order = np.argsort(-f.scores, kind="mergesort")
            if rule == "lvis":
                order = order[:limit]  # LVIS keeps 300 an image, whatever their classes
                checked = set(t.labels.tolist()) | set(t.negative or ())
                order = order[[int(c) in checked for c in f.labels[order]]] if len(order) else order
            areas = _areas(f, kind)
            if not len(order) and not len(t.labels):
                continue
            labels = f.labels[order]
            for k in np.union1d(labels, t.labels):
                mine_d, mine_t = order[labels == k][:limit], np.flatnonzero(t.labels == k)
                if len(mine_d) and len(mine_t):
                    ious.append(_ious(t, f, mine_d, mine_t, kind))
                    groups_d.append(np.arange(n_d, n_d + len(mine_d)))
                    groups_t.append(np.arange(n_t, n_t + len(mine_t)))
                for name, value, size in (
                    ("di", image, len(mine_d)),
                    ("dc", k, len(mine_d)),
                    ("ti", image, len(mine_t)),
                    ("tc", k, len(mine_t)),
                ):
                    parts[name].append(np.full(size, value, dtype=np.int64))
                parts["ds"].append(f.scores[mine_d])
                parts["dr"].append(np.arange(len(mine_d)))
                parts["da"].append(areas[mine_d])
                parts["du"].append(np.full(len(mine_d), int(k) in t.not_exhaustive))
                parts["ta"].append(t.area[mine_t])
                parts["tw"].append(t.crowd[mine_t] if rule == "coco" else np.zeros(len(mine_t), bool))
                n_d, n_t = n_d + len(mine_d), n_t + len(mine_t)
        whole = {n: np.concatenate(v) if v else np.zeros(0) for n, v in parts.items()}
        ints = {n: whole[n].astype(np.int64) for n in ("di", "dc", "dr", "ti", "tc")}
        return cls(
            ious,
            groups_d,
            groups_t,
            ints["di"],
            ints["dc"],
            whole["ds"].astype(np.float64),
            ints["dr"],
            whole["da"].astype(np.float64),
            whole["du"].astype(bool),
            ints["ti"],
            ints["tc"],
            whole["ta"].astype(np.float64),
            whole["tw"].astype(bool),
        )

    def ignored_targets(self, areas: Sequence[tuple[float, float]]) -> NDArray[np.bool_]:
        """``(P, A)``: crowds, and targets outside the range of areas."""
        low, high = np.array(areas).T
        outside = (self.target_area[:, None] < low) | (self.target_area[:, None] > high)
        ignored: NDArray[np.bool_] = outside | self.target_crowd[:, None]
        return ignored

    def target_counts(self, areas: Sequence[tuple[float, float]]) -> NDArray[np.int64]:
        """``(rows, 4)``: image, class, area index and the number of targets that count, where that is not zero."""
        rows = []
        ignored = self.ignored_targets(areas)
        for a in range(len(areas)):
            keep = ~ignored[:, a]
            pairs = np.stack([self.target_image[keep], self.target_class[keep]], axis=1)
            unique, counts = np.unique(pairs, axis=0, return_counts=True) if len(pairs) else (pairs, np.zeros(0, int))
            rows.append(np.column_stack([unique, np.full(len(unique), a), counts]))
        return np.concatenate(rows).astype(np.int64)


def _check(image: int, truth: Truth, found: Found, classes: int, kind: str) -> None:
    for labels in (truth.labels, found.labels):
        if len(labels) and (labels.min() < 0 or labels.max() >= classes):
            raise ValueError(f"image {image}: a label lies outside the {classes} classes")
    if not len(found.boxes) == len(found.scores) == len(found.labels):
        raise ValueError(f"image {image}: boxes, scores and labels of the detections differ in number")
    if np.isnan(found.scores).any():
        raise ValueError(f"image {image}: a detection's score is NaN")
    if kind == "segm" and ((len(found.labels) and found.masks is None) or (len(truth.labels) and truth.masks is None)):
        raise ValueError(f"image {image}: masks are asked for and missing")


def _areas(found: Found, kind: str) -> Floats:
    if kind == "segm" and found.masks is not None and len(found.masks):
        from pycocotools import mask

        return np.asarray(mask.area(list(found.masks)), dtype=np.float64).reshape(-1)
    size = found.boxes[:, 2:] - found.boxes[:, :2]
    return np.asarray(size[:, 0] * size[:, 1], dtype=np.float64)


def _ious(truth: Truth, found: Found, d: NDArray[np.int64], t: NDArray[np.int64], kind: str) -> Floats:
    if kind == "segm":
        from pycocotools import mask

        assert found.masks is not None
        assert truth.masks is not None
        picked_d: list[Mapping[str, Any]] = [found.masks[i] for i in d]
        picked_t: list[Mapping[str, Any]] = [truth.masks[i] for i in t]
        crowd = truth.crowd[t].astype(np.uint8).tolist()
        return np.asarray(mask.iou(picked_d, picked_t, crowd), dtype=np.float64).reshape(len(d), len(t))
    return box_iou(found.boxes[d], truth.boxes[t], truth.crowd[t])


def box_iou(detections: Floats, targets: Floats, crowd: NDArray[np.bool_]) -> Floats:
    """``(m, n)`` IoU of xyxy boxes; over the detection's own area where the target is a crowd (pycocotools' ``bbIou``)."""
    # Width and height first, then the corner again, as pycocotools computes from xywh.
    dw, dh = detections[:, 2] - detections[:, 0], detections[:, 3] - detections[:, 1]
    tw, th = targets[:, 2] - targets[:, 0], targets[:, 3] - targets[:, 1]
    w = np.minimum((detections[:, 0] + dw)[:, None], (targets[:, 0] + tw)[None]) - np.maximum(
        detections[:, None, 0], targets[None, :, 0]
    )
    h = np.minimum((detections[:, 1] + dh)[:, None], (targets[:, 1] + th)[None]) - np.maximum(
        detections[:, None, 1], targets[None, :, 1]
    )
    inside = np.where((w > 0) & (h > 0), w * h, 0.0)
    union = np.where(crowd[None], (dw * dh)[:, None], (dw * dh)[:, None] + (tw * th)[None] - inside)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(inside > 0, inside / union, 0.0)


def match_groups(groups: Groups, thresholds: Floats, areas: Sequence[tuple[float, float]]) -> Flags:
    """Match every group at every threshold and area range."""
    count = len(groups.detection_image)
    shape = (count, len(areas), len(thresholds))
    matched, ignored = np.zeros(shape, bool), np.zeros(shape, bool)
    ignored_targets = groups.ignored_targets(areas)
    # Groups of alike numbers of targets are matched together: no padding worth mentioning.
    sizes = np.array([len(t) for t in groups.targets], dtype=np.int64)
    buckets = np.ceil(np.log2(np.maximum(sizes, 1))).astype(np.int64)
    for bucket in np.unique(buckets):
        members = np.flatnonzero(buckets == bucket)
        # Longest lists of detections first, so that the groups still at work at any rank are the first ones.
        members = members[np.argsort([-len(groups.detections[m]) for m in members], kind="stable")]
        width = int(sizes[members].max())
        step = max(1, _CHUNK // (width * shape[1] * shape[2]))
        for start in range(0, len(members), step):
            _match_bucket(groups, members[start : start + step], width, thresholds, ignored_targets, matched, ignored)
    low, high = np.array(areas).T
    outside = (groups.detection_area[:, None] < low) | (groups.detection_area[:, None] > high)
    ignored |= ~matched & (outside | groups.unmatched_ignored[:, None])[:, :, None]
    return Flags(matched, ignored)


def _match_bucket(
    groups: Groups,
    members: NDArray[np.int64],
    width: int,
    thresholds: Floats,
    ignored_targets: NDArray[np.bool_],
    matched: NDArray[np.bool_],
    ignored: NDArray[np.bool_],
) -> None:
    """Match the groups ``members`` rank by rank, writing into ``matched`` and ``ignored``."""
    g, areas, t = len(members), ignored_targets.shape[1], len(thresholds)
    lengths = np.array([len(groups.detections[m]) for m in members])
    ious = np.full((g, int(lengths.max()), width), -1.0)
    present = np.zeros((g, width), bool)
    skip = np.zeros((g, areas, width), bool)
    crowd = np.zeros((g, width), bool)
    for row, m in enumerate(members):
        n = len(groups.targets[m])
        ious[row, : lengths[row], :n] = groups.ious[m]
        present[row, :n] = True
        skip[row, :, :n] = ignored_targets[groups.targets[m]].T
        crowd[row, :n] = groups.target_crowd[groups.targets[m]]
    free = np.broadcast_to(present[:, None, None], (g, areas, t, width)).copy()
    limits = np.minimum(thresholds, 1 - 1e-10)[None, None, :, None]
    last = np.arange(width)
    for rank in range(int(lengths.max())):
        now = int((lengths > rank).sum())
        here = ious[:now, None, None, rank, :]
        able = (free[:now] | (crowd & present)[:now, None, None]) & (here >= limits)
        counts = able & ~skip[:now, :, None]
        # One that counts goes before one that is ignored.
        able = np.where(counts.any(axis=-1, keepdims=True), counts, able)
        score = np.where(able, here, -1.0)
        # The later of two at the same IoU.
        best = width - 1 - np.argmax(score[..., ::-1], axis=-1)
        hit = np.take_along_axis(able, best[..., None], axis=-1)[..., 0]
        rows = np.array([groups.detections[m][rank] for m in members[:now]])
        matched[rows] = hit
        ignored[rows] = (
            hit & np.take_along_axis(np.broadcast_to(skip[:now, :, None], able.shape), best[..., None], axis=-1)[..., 0]
        )
        free[:now] &= ~(hit[..., None] & (best[..., None] == last))
