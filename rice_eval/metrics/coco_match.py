"""Greedy matching of detections to targets for many (image, class) pairs at once.

The rule is ``pycocotools``' ``COCOeval.evaluateImg``: detections in order of score; each takes the free target of highest IoU
at or above the threshold, one that counts before one that is ignored, the later of two at the same IoU; crowds can be taken
many times. LVIS (``lvis/eval.py``) has the same rule without crowds, on the classes that were checked in the image, and of
targets and detections that have an area.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rice_eval.metrics.coco import Found, Truth

__all__ = ["Flags", "Groups", "box_iou", "match_groups"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
_CHUNK = 1 << 23  # elements of one (pairs, areas, thresholds, targets) array
_PAIRS = 1 << 22  # IoUs computed at once


@dataclass(frozen=True)
class Flags:
    """``(M, A, T)`` bool each: whether a detection was matched, and whether it counts neither way."""

    matched: Bools
    ignored: Bools


@dataclass(frozen=True)
class Groups:
    """All targets and detections of a set, sorted by (image, class): a group's rows are one slice.

    Attributes:
        detection_*: ``(M,)`` over the detections kept; ``rank`` counts from 0 in a group, by descending score.
        target_*: ``(P,)`` over all targets, in their given order inside a group.
        unmatched_ignored: ``(M,)`` whether an unmatched detection counts neither way (LVIS: class not exhaustively labelled).
        spans: ``(G, 4)`` of the groups with both: first detection, detections, first target, targets.
        starts: ``(G,)`` where a group's IoUs start in ``ious``.
        ious: all groups' ``(detections, targets)`` matrices, flat, one after the other.
    """

    detection_image: Ints
    detection_class: Ints
    detection_score: Floats
    detection_rank: Ints
    detection_area: Floats
    unmatched_ignored: Bools
    target_image: Ints
    target_class: Ints
    target_area: Floats
    target_crowd: Bools
    spans: Ints
    starts: Ints
    ious: Floats

    @classmethod
    def of(
        cls, truth: Sequence[Truth], found: Sequence[Found], classes: int, kind: str, rule: str, limit: int
    ) -> Groups:
        """Group a set; see ``ap_statistics`` for the arguments."""
        for image, (t, f) in enumerate(zip(truth, found)):
            _check(image, t, f, kind)
        if rule == "lvis":
            truth = [_with_area(t) for t in truth]
        d, t_ = _flat(found), _flat(truth)
        for rows in (d, t_):
            if len(rows.label) and (rows.label.min() < 0 or rows.label.max() >= classes):
                bad = int(rows.image[np.flatnonzero((rows.label < 0) | (rows.label >= classes))[0]])
                raise ValueError(f"image {bad}: a label lies outside the {classes} classes")
        score = _joined([np.asarray(f.scores, np.float64) for f in found], np.float64)
        if kind == "segm":
            areas = _mask_areas(found)
        else:
            size = d.box[:, 2:] - d.box[:, :2]
            areas = size[:, 0] * size[:, 1]
        keep = np.arange(len(score))
        if rule == "lvis":
            keep = _checked(truth, d, score, classes, limit)
            keep = keep[areas[keep] > 0]
        # Stable: equal scores stay in the order they were given, as pycocotools' mergesort leaves them.
        order = keep[np.lexsort((-score[keep], d.label[keep], d.image[keep]))]
        key = d.image[order] * classes + d.label[order]
        rank = _ranks(key)
        order, key, rank = order[rank < limit], key[rank < limit], rank[rank < limit]
        t_order = np.argsort(t_.image * classes + t_.label, kind="stable")
        t_key = (t_.image * classes + t_.label)[t_order]
        shared = np.intersect1d(key, t_key)
        first, last = np.searchsorted(key, shared), np.searchsorted(key, shared, side="right")
        t_first, t_last = np.searchsorted(t_key, shared), np.searchsorted(t_key, shared, side="right")
        spans = np.stack([first, last - first, t_first, t_last - t_first], axis=1).astype(np.int64)
        sizes = spans[:, 1] * spans[:, 3]
        crowd = _joined([np.asarray(t.crowd, bool) for t in truth], bool)[t_order]
        partly = {i * classes + k for i, t in enumerate(truth) for k in t.not_exhaustive}
        d_boxes, t_boxes = d.box[order], t_.box[t_order]
        if kind == "segm":
            ious = _mask_ious(truth, found, spans, d, t_, order, t_order, crowd)
        else:
            ious = _box_ious(d_boxes, t_boxes, crowd, spans)
        return cls(
            d.image[order],
            d.label[order],
            score[order],
            rank,
            areas[order],
            np.isin(key, np.fromiter(partly, np.int64, len(partly))) if partly else np.zeros(len(key), bool),
            t_.image[t_order],
            t_.label[t_order],
            _joined([np.asarray(t.area, np.float64) for t in truth], np.float64)[t_order],
            crowd if rule == "coco" else np.zeros(len(crowd), bool),
            spans,
            np.concatenate([[0], np.cumsum(sizes)])[:-1].astype(np.int64),
            ious,
        )

    def ignored_targets(self, areas: Sequence[tuple[float, float]]) -> Bools:
        """``(P, A)``: crowds, and targets outside the range of areas."""
        low, high = np.array(areas).T
        outside = (self.target_area[:, None] < low) | (self.target_area[:, None] > high)
        ignored: Bools = outside | self.target_crowd[:, None]
        return ignored

    def target_counts(self, areas: Sequence[tuple[float, float]]) -> Ints:
        """``(rows, 4)``: image, class, area index and the number of targets that count, where that is not zero."""
        rows = []
        ignored = self.ignored_targets(areas)
        step = int(self.target_class.max(initial=0)) + 1
        for a in range(len(areas)):
            keep = ~ignored[:, a]
            key, counts = np.unique(self.target_image[keep] * step + self.target_class[keep], return_counts=True)
            rows.append(np.column_stack([key // step, key % step, np.full(len(key), a), counts]))
        return np.concatenate(rows).astype(np.int64)


@dataclass(frozen=True)
class _Rows:
    """Rows of all images: ``image (n,)``, ``label (n,)``, ``box (n, 4)``, and ``first (N,)`` row of each image."""

    image: Ints
    label: Ints
    box: Floats
    first: Ints


def _joined(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _flat(items: Sequence[Truth] | Sequence[Found]) -> _Rows:
    counts = np.array([len(item.labels) for item in items], dtype=np.int64)
    boxes = _joined([np.asarray(item.boxes, np.float64).reshape(-1, 4) for item in items], np.float64)
    return _Rows(
        np.repeat(np.arange(len(items)), counts),
        _joined([np.asarray(item.labels, np.int64) for item in items], np.int64),
        boxes.reshape(-1, 4),
        np.concatenate([[0], np.cumsum(counts)])[:-1].astype(np.int64),
    )


def _ranks(key: Ints) -> Ints:
    """Place of each row among those of the same key, from 0; ``key`` is sorted."""
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    lengths = np.diff(np.append(starts, len(key)))
    return np.arange(len(key)) - np.repeat(starts, lengths)


def _with_area(truth: Truth) -> Truth:
    """LVIS: targets without area are left out (``LVIS.get_ann_ids`` asks for more than zero), so that they don't check their class."""
    keep = np.flatnonzero(np.asarray(truth.area) > 0)
    if len(keep) == len(truth.area):
        return truth
    masks = None if truth.masks is None else [truth.masks[k] for k in keep.tolist()]
    rows = {name: getattr(truth, name)[keep] for name in ("boxes", "labels", "crowd", "area")}
    return replace(truth, masks=masks, **rows)


def _checked(truth: Sequence[Truth], rows: _Rows, score: Floats, classes: int, limit: int) -> Ints:
    """LVIS: rows of the ``limit`` best detections of each image, whatever their classes, whose class was checked there."""
    order = np.lexsort((-score, rows.image))
    order = order[_ranks(rows.image[order]) < limit]
    checked = {i * classes + int(k) for i, t in enumerate(truth) for k in (*t.labels.tolist(), *(t.negative or ()))}
    known = np.fromiter(checked, np.int64, len(checked))
    # Back in the given order, so that ties are broken by it.
    kept: Ints = np.sort(order[np.isin(rows.image[order] * classes + rows.label[order], known)])
    return kept


def _check(image: int, truth: Truth, found: Found, kind: str) -> None:
    if not len(found.boxes) == len(found.scores) == len(found.labels):
        raise ValueError(f"image {image}: boxes, scores and labels of the detections differ in number")
    if not len(truth.boxes) == len(truth.labels) == len(truth.crowd) == len(truth.area):
        raise ValueError(f"image {image}: boxes, labels, crowd flags and areas of the targets differ in number")
    if np.isnan(found.scores).any():
        raise ValueError(f"image {image}: a detection's score is NaN")
    if kind == "segm" and ((len(found.labels) and found.masks is None) or (len(truth.labels) and truth.masks is None)):
        raise ValueError(f"image {image}: masks are asked for and missing")


def _mask_areas(found: Sequence[Found]) -> Floats:
    from pycocotools import mask

    parts = [np.asarray(mask.area(list(f.masks)), np.float64).reshape(-1) for f in found if f.masks]
    return _joined(parts, np.float64)


def _mask_ious(
    truth: Sequence[Truth],
    found: Sequence[Found],
    spans: Ints,
    d: _Rows,
    t: _Rows,
    order: Ints,
    t_order: Ints,
    crowd: Bools,
) -> Floats:
    """All groups' IoUs of masks, flat, by pycocotools."""
    from pycocotools import mask

    parts = []
    for first, m, t_first, n in spans.tolist():
        rows, t_rows = order[first : first + m], t_order[t_first : t_first + n]
        image = int(d.image[rows[0]])
        masks, t_masks = found[image].masks, truth[image].masks
        assert masks is not None
        assert t_masks is not None
        mine: list[Mapping[str, Any]] = [masks[k - d.first[image]] for k in rows]
        theirs: list[Mapping[str, Any]] = [t_masks[k - t.first[image]] for k in t_rows]
        flags = crowd[t_first : t_first + n].astype(np.uint8).tolist()
        parts.append(np.asarray(mask.iou(mine, theirs, flags), dtype=np.float64).reshape(-1))
    return _joined(parts, np.float64)


def _box_ious(detections: Floats, targets: Floats, crowd: Bools, spans: Ints) -> Floats:
    """All groups' IoUs of boxes, flat."""
    parts = []
    for rows in _chunks(spans[:, 1] * spans[:, 3], _PAIRS):
        first, m, t_first, n = spans[rows].T
        sizes = m * n
        # Number of a pair in its group: detection = number // n, target = number % n.
        within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        wide = np.repeat(n, sizes)
        d = np.repeat(first, sizes) + within // wide
        t = np.repeat(t_first, sizes) + within % wide
        parts.append(_pair_iou(detections[d], targets[t], crowd[t]))
    return _joined(parts, np.float64)


def _chunks(sizes: Ints, limit: int) -> Iterator[slice]:
    """Slices over ``sizes`` whose sums stay under ``limit`` (or hold one element)."""
    total = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        done = int(total[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(total, done + limit, side="right")))
        yield slice(start, end)
        start = end


def _pair_iou(detections: Floats, targets: Floats, crowd: Bools) -> Floats:
    """``(k,)`` IoU of k pairs of xyxy boxes; over the detection's own area where the target is a crowd (pycocotools' ``bbIou``)."""
    # Width and height first, then the corner again, as pycocotools computes from xywh.
    dx, dy, dw, dh = _xywh(detections)
    tx, ty, tw, th = _xywh(targets)
    w = np.minimum(dx + dw, tx + tw) - np.maximum(dx, tx)
    h = np.minimum(dy + dh, ty + th) - np.maximum(dy, ty)
    inside = np.where((w > 0) & (h > 0), w * h, 0.0)
    union = np.where(crowd, dw * dh, dw * dh + tw * th - inside)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(inside > 0, inside / union, 0.0)


def _xywh(boxes: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    x, y = boxes[..., 0], boxes[..., 1]
    return x, y, boxes[..., 2] - x, boxes[..., 3] - y


def box_iou(detections: Floats, targets: Floats, crowd: Bools) -> Floats:
    """``(m, n)`` IoU of ``(m, 4)`` and ``(n, 4)`` xyxy boxes; over the detection's own area where the target is a crowd."""
    shape = (len(detections), len(targets), 4)
    d = np.broadcast_to(detections[:, None], shape).reshape(-1, 4)
    t = np.broadcast_to(targets[None], shape).reshape(-1, 4)
    return _pair_iou(d, t, np.tile(crowd, len(detections))).reshape(shape[:2])


def match_groups(groups: Groups, thresholds: Floats, areas: Sequence[tuple[float, float]]) -> Flags:
    """Match every group at every threshold and area range."""
    count = len(groups.detection_image)
    shape = (count, len(areas), len(thresholds))
    matched, ignored = np.zeros(shape, bool), np.zeros(shape, bool)
    ignored_targets = groups.ignored_targets(areas)
    work = _Work.of(groups, float(min(thresholds.min(), 1 - 1e-10)))
    # Groups of alike numbers of targets are matched together: no padding worth mentioning.
    buckets = np.ceil(np.log2(np.maximum(work.targets, 1))).astype(np.int64)
    for bucket in np.unique(buckets):
        members = np.flatnonzero(buckets == bucket)
        # Longest lists of detections first, so that the groups still at work at any rank are the first ones.
        members = members[np.argsort(-work.lengths[members], kind="stable")]
        width = int(work.targets[members].max())
        step = max(1, _CHUNK // (width * shape[1] * shape[2]))
        for start in range(0, len(members), step):
            work.match(members[start : start + step], width, groups, thresholds, ignored_targets, matched, ignored)
    low, high = np.array(areas).T
    outside = (groups.detection_area[:, None] < low) | (groups.detection_area[:, None] > high)
    ignored |= ~matched & (outside | groups.unmatched_ignored[:, None])[:, :, None]
    return Flags(matched, ignored)


@dataclass(frozen=True)
class _Work:
    """Detections that some target of their group overlaps enough at the lowest threshold: no other can be matched.

    Attributes:
        rows: ``(m,)`` detection rows, group by group, by rank.
        places: ``(m,)`` where a detection's IoUs start in ``Groups.ious``.
        firsts, lengths: ``(G,)`` a group's slice of ``rows``; groups without any are left out.
        first_targets, targets: ``(G,)`` a group's slice of the targets.
    """

    rows: Ints
    places: Ints
    firsts: Ints
    lengths: Ints
    first_targets: Ints
    targets: Ints

    @classmethod
    def of(cls, groups: Groups, lowest: float) -> _Work:
        first, m, t_first, n = groups.spans.T
        owner = np.repeat(np.arange(len(m)), m)
        rank = np.arange(len(owner)) - np.repeat(np.cumsum(m) - m, m)
        rows, places = first[owner] + rank, groups.starts[owner] + rank * n[owner]
        best = np.maximum.reduceat(groups.ious, places) if len(places) else np.zeros(0)
        able = best >= lowest
        lengths = np.bincount(owner[able], minlength=len(m))
        some = lengths > 0
        firsts = np.cumsum(lengths) - lengths
        return cls(rows[able], places[able], firsts[some], lengths[some], t_first[some], n[some])

    def match(
        self,
        members: Ints,
        width: int,
        groups: Groups,
        thresholds: Floats,
        ignored_targets: Bools,
        matched: Bools,
        ignored: Bools,
    ) -> None:
        """Match the groups ``members`` rank by rank, writing into ``matched`` and ``ignored``."""
        g, areas, t = len(members), ignored_targets.shape[1], len(thresholds)
        column = np.arange(width)
        n, lengths = self.targets[members], self.lengths[members]
        present = column < n[:, None]
        target = np.where(present, self.first_targets[members][:, None] + column, 0)
        skip = (ignored_targets[target] & present[..., None]).transpose(0, 2, 1)
        crowd = groups.target_crowd[target] & present
        free = np.broadcast_to(present[:, None, None], (g, areas, t, width)).copy()
        any_crowd = bool(crowd.any())
        limits = np.minimum(thresholds, 1 - 1e-10)[None, None, :, None]
        for rank in range(int(lengths.max())):
            now = int((lengths > rank).sum())
            mine = self.firsts[members[:now]] + rank
            rows = self.rows[mine]
            place = np.where(present[:now], self.places[mine][:, None] + column, 0)
            here = np.where(present[:now], groups.ious[place], -1.0)[:, None, None]
            able = (free[:now] | crowd[:now, None, None] if any_crowd else free[:now]) & (here >= limits)
            counts = able & ~skip[:now, :, None]
            # One that counts goes before one that is ignored.
            able = np.where(counts.any(axis=-1, keepdims=True), counts, able)
            # The later of two at the same IoU.
            best = width - 1 - np.argmax(np.where(able, here, -1.0)[..., ::-1], axis=-1)
            hit = np.take_along_axis(able, best[..., None], axis=-1)[..., 0]
            matched[rows] = hit
            skipped = np.take_along_axis(np.broadcast_to(skip[:now, :, None], able.shape), best[..., None], axis=-1)
            ignored[rows] = hit & skipped[..., 0]
            free[:now] &= ~(hit[..., None] & (best[..., None] == column))
