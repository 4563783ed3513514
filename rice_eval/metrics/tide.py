"""Where a detector's AP50 is lost: an error breakdown after TIDE (Bolya et al., arXiv 2008.08115), and recall by crowding.

At IoU 0.5 a detection is right or makes one of five mistakes; a target that no detection explains is missed. The cost of a mistake
is the AP50 that mending all of its kind, and nothing else, would win:

==============  ======================================================================================  ====================
classification  overlaps a target of another class by 0.5 or more                                       class set right
localisation    overlaps a target of its class by 0.1 to 0.5                                            box set right
both            overlaps a target of another class by 0.1 to 0.5                                        detection dropped
duplicate       overlaps a target of its class by 0.5 or more that a surer detection has                detection dropped
background      overlaps no target by 0.1                                                               detection dropped
missed          target that no detection has, nor any mistake of class or place points at               target dropped
==============  ======================================================================================  ====================

A mended detection whose target is taken already is dropped. Detections that only a crowd explains are left out, and crowds are no targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rice_eval.metrics.coco import Found, Truth, ap_statistics
from rice_eval.metrics.coco_match import box_iou

__all__ = ["ERRORS", "Breakdown", "breakdown", "recall_by_crowding"]

FOREGROUND, BACKGROUND = 0.5, 0.1
"""TIDE's two IoU thresholds."""
ERRORS = ("classification", "localisation", "both", "duplicate", "background", "missed")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Breakdown:
    """Attributes:
    ap50: in percent.
    counts: mistakes of each kind; of ``missed``, targets.
    costs: AP50 that mending each kind would win, in percentage points.
    """

    ap50: float
    counts: Mapping[str, int]
    costs: Mapping[str, float]


@dataclass(frozen=True)
class _Image:
    """One image's verdicts: ``kind (m,)`` (-1 right, -2 left out, else a place in ``ERRORS``), ``target (m,)`` it points at, missed targets."""

    kind: NDArray[np.int64]
    target: NDArray[np.int64]
    missed: NDArray[np.bool_]


def breakdown(truth: Sequence[Truth], found: Sequence[Found], classes: int, most: int = 100) -> Breakdown:
    """The breakdown of a set.

    Args:
        truth, found: N each, as for ``ap_statistics``; boxes are compared.
        classes: C.
        most: detections an image that count, the surest.
    """
    clean = [_without_crowds(t) for t in truth]
    kept = [_best(f, most) for f in found]
    verdicts = [_judge(t, f, c) for t, f, c in zip(truth, kept, clean)]
    kept = [_picked(f, v.kind != -2) for f, v in zip(kept, verdicts)]
    verdicts = [replace(v, kind=v.kind[v.kind != -2], target=v.target[v.kind != -2]) for v in verdicts]
    base = _ap50(clean, kept, classes)
    counts, costs = {}, {}
    for k, name in enumerate(ERRORS):
        if name == "missed":
            counts[name] = sum(int(v.missed.sum()) for v in verdicts)
            less = [_targets(t, ~v.missed) for t, v in zip(clean, verdicts)]
            costs[name] = _ap50(less, kept, classes) - base
            continue
        counts[name] = sum(int((v.kind == k).sum()) for v in verdicts)
        costs[name] = _ap50(clean, [_mended(t, f, v, k) for t, f, v in zip(clean, kept, verdicts)], classes) - base
    return Breakdown(base, counts, costs)


def _ap50(truth: Sequence[Truth], found: Sequence[Found], classes: int) -> float:
    names = [str(k) for k in range(classes)]
    point = ap_statistics([str(i) for i in range(len(truth))], truth, found, names).point()["ap50"]
    return float(np.nan_to_num(point))


def _targets(t: Truth, keep: NDArray[np.bool_]) -> Truth:
    return Truth(t.boxes[keep], t.labels[keep], t.crowd[keep], t.area[keep])


def _without_crowds(t: Truth) -> Truth:
    return _targets(t, ~np.asarray(t.crowd, dtype=np.bool_))


def _picked(f: Found, keep: NDArray[np.bool_] | NDArray[np.int64]) -> Found:
    return Found(f.boxes[keep], f.scores[keep], f.labels[keep])


def _best(f: Found, most: int) -> Found:
    return _picked(f, np.argsort(-f.scores, kind="stable")[:most])


def _judge(whole: Truth, f: Found, t: Truth) -> _Image:
    """Verdicts of one image's detections, by descending score."""
    m, n = len(f.labels), len(t.labels)
    kind, target = np.full(m, ERRORS.index("background")), np.full(m, -1)
    ious = box_iou(f.boxes, t.boxes, np.zeros(n, bool)) if m and n else np.zeros((m, n))
    crowds = whole.boxes[whole.crowd]
    in_crowd = box_iou(f.boxes, crowds, np.ones(len(crowds), bool)) if m and len(crowds) else np.zeros((m, 0))
    taken = np.zeros(n, bool)
    for d in range(m):
        same = t.labels == f.labels[d]
        free = np.flatnonzero(same & ~taken & (ious[d] >= FOREGROUND))
        if len(free):
            pick = free[len(free) - 1 - int(np.argmax(ious[d][free][::-1]))]
            taken[pick], kind[d], target[d] = True, -1, pick
            continue
        if len(crowds) and (in_crowd[d][whole.labels[whole.crowd] == f.labels[d]] >= FOREGROUND).any():
            kind[d] = -2
            continue
        mine, others = np.where(same, ious[d], 0.0), np.where(same, 0.0, ious[d])
        best, other = float(mine.max(initial=0.0)), float(others.max(initial=0.0))
        if BACKGROUND <= best < FOREGROUND:
            kind[d], target[d] = ERRORS.index("localisation"), int(mine.argmax())
        elif other >= FOREGROUND:
            kind[d], target[d] = ERRORS.index("classification"), int(others.argmax())
        elif best >= FOREGROUND:
            kind[d] = ERRORS.index("duplicate")
        elif other >= BACKGROUND:
            kind[d] = ERRORS.index("both")
    explained = taken.copy()
    for name in ("classification", "localisation"):
        explained[target[kind == ERRORS.index(name)]] = True
    return _Image(kind, target, ~explained)


def _mended(t: Truth, f: Found, v: _Image, kind: int) -> Found:
    """Detections after mending every mistake of one kind: the surest of a free target becomes right, the others are dropped."""
    keep = np.ones(len(f.labels), bool)
    boxes, labels = f.boxes.copy(), f.labels.copy()
    taken = np.zeros(len(t.labels), bool)
    taken[v.target[v.kind == -1]] = True
    for d in np.flatnonzero(v.kind == kind):
        goal = int(v.target[d])
        if ERRORS[kind] not in ("classification", "localisation") or taken[goal]:
            keep[d] = False
            continue
        taken[goal] = True
        if ERRORS[kind] == "classification":
            labels[d] = t.labels[goal]
        else:
            boxes[d] = t.boxes[goal]
    return Found(boxes[keep], f.scores[keep], labels[keep])


def recall_by_crowding(
    truth: Sequence[Truth], found: Sequence[Found], edges: Sequence[int] = (1, 4, 8, 16)
) -> dict[str, tuple[float, int]]:
    """Recall at IoU 0.5 (class and box right) of the targets of images by how many targets they hold.

    Args:
        edges: least numbers of targets of the buckets, rising.

    Returns:
        ``"4-7"``, ``"16+"`` … -> recall in percent (NaN where the bucket is empty), targets.
    """
    hits, totals = np.zeros(len(edges)), np.zeros(len(edges))
    for t, f in zip(truth, found):
        clean = _without_crowds(t)
        n = len(clean.labels)
        if n < edges[0]:
            continue
        bucket = int(np.searchsorted(np.asarray(edges), n, side="right")) - 1
        hits[bucket] += int((_judge(t, _best(f, 100), clean).kind == -1).sum())
        totals[bucket] += n
    ends = [f"-{e - 1}" if e - 1 > s else "" for s, e in pairwise(edges)] + ["+"]
    with np.errstate(invalid="ignore"):
        shares = 100 * hits / totals
    return {f"{s}{end}": (float(r), int(c)) for s, end, r, c in zip(edges, ends, shares, totals)}
