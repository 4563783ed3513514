"""Found text against true text by the rule of ICDAR 2015's Task 4: polygons, one to one, don't-care regions.

The rule (Karatzas et al., ICDAR 2015, section IV and its evaluation protocol): a detection of which more than half of the
area lies in one don't-care region is left out; a true region and a detection match when their IoU is above one half, each at
most once, in the order given. Hmean is the harmonic mean of precision and recall over all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rice_eval.errors import MissingExtraError

__all__ = ["IOU", "OVERLAP", "Matches", "convex", "match", "smallest_rectangle"]

IOU = 0.5
"""A match needs a larger IoU (ICDAR 2015)."""
OVERLAP = 0.5
"""A detection with a larger share of its area inside a don't-care region is left out (ICDAR 2015)."""

Polygon = NDArray[np.float64]


def _shapely() -> Any:
    try:
        import shapely
    except ImportError as error:
        raise MissingExtraError.of("shapely", "ocr", "matching text regions") from error
    return shapely


def _shape(points: Polygon) -> Any:
    """A valid shape: polygons that cross themselves (annotations do) are mended, degenerate ones are empty."""
    shapely = _shapely()
    shape = shapely.Polygon(points) if len(points) >= 3 else shapely.Polygon()
    return shape if shape.is_valid else shapely.make_valid(shape)


@dataclass(frozen=True)
class Matches:
    """What the rule says of one image.

    Attributes:
        pairs: (true region, detection) of every match.
        truths: regions that count, in order.
        found: detections that count, in order.
    """

    pairs: tuple[tuple[int, int], ...]
    truths: tuple[int, ...]
    found: tuple[int, ...]


def match(truth: Sequence[Polygon], ignore: Sequence[bool], found: Sequence[Polygon]) -> Matches:
    """Match one image.

    Args:
        truth: ``(k, 2)`` polygons.
        ignore: which of them are don't-care.
        found: ``(k, 2)`` polygons, in order of preference.
    """
    shapely = _shapely()
    true_shapes, found_shapes = [_shape(p) for p in truth], [_shape(p) for p in found]
    if not found_shapes:
        return Matches((), tuple(i for i, skip in enumerate(ignore) if not skip), ())
    areas = np.array([s.area for s in found_shapes])
    overlap = np.zeros((len(true_shapes), len(found_shapes)))
    tree = shapely.STRtree(found_shapes)
    for i, shape in enumerate(true_shapes):
        near = tree.query(shape)
        if len(near):
            overlap[i, near] = shapely.area(shapely.intersection(shape, np.array(found_shapes, dtype=object)[near]))
    dropped = np.zeros(len(found_shapes), dtype=np.bool_)
    for skipped in np.flatnonzero(np.asarray(ignore, dtype=np.bool_)):
        dropped |= overlap[skipped] > OVERLAP * np.maximum(areas, 0)
    pairs, taken = [], set()
    truths = tuple(i for i, skip in enumerate(ignore) if not skip)
    for i in truths:
        for j in np.flatnonzero(overlap[i] > 0):
            union = true_shapes[i].area + areas[j] - overlap[i, j]
            if j not in taken and not dropped[j] and union > 0 and overlap[i, j] / union > IOU:
                pairs.append((i, int(j)))
                taken.add(j)
                break
    return Matches(tuple(pairs), truths, tuple(int(j) for j in np.flatnonzero(~dropped)))


def smallest_rectangle(points: Polygon) -> Polygon | None:
    """The smallest rectangle around points, at any angle, clockwise from its top-left corner; None where it has no area.

    Its long side is the reading direction, unless the rectangle is nearly a square (sides within a tenth) or stands upright
    (an angle above 45 degrees), where the horizontal one is.

    Args:
        points: ``(n, 2)``.
    """
    shapely = _shapely()
    shape = shapely.MultiPoint(points).minimum_rotated_rectangle
    if shape.geom_type != "Polygon" or shape.area <= 0:
        return None
    corners = np.asarray(shape.exterior.coords)[:4]
    x, y = corners.T
    if float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) < 0:
        corners = corners[::-1]
    # The first edge is the one that runs rightwards most: text is read from left to right.
    edges = np.roll(corners, -1, axis=0) - corners
    angles = np.abs(np.arctan2(edges[:, 1], edges[:, 0]))
    return np.ascontiguousarray(np.roll(corners, -int(np.argmin(angles)), axis=0), dtype=np.float64)


def convex(points: Polygon) -> Polygon:
    """The convex hull of ``(n, 2)`` points as a clockwise polygon; the points themselves where it has no area."""
    shapely = _shapely()
    hull = shapely.MultiPoint(points).convex_hull
    if hull.geom_type != "Polygon":
        return points
    out: Polygon = np.asarray(shapely.orient_polygons(hull, exterior_cw=False).exterior.coords)[:-1]
    return out
