"""Scenes in pixels, with the exact truth of every pixel: who owns it, and where each owned point lies in the other view."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rice_eval.datasets.scenes_layout import BACKDROP, Content, Layout, Placed, content, layout
from rice_eval.datasets.scenes_pack import SPLITS, pack
from rice_eval.datasets.scenes_raster import (
    COLOURS,
    ONE,
    Draws,
    Pose,
    composite,
    hue_matrix,
    premultiply,
    recolour,
    resize,
    sample,
    shade,
    tint,
)

__all__ = ["Object", "Scene", "matches", "render"]

Bytes = NDArray[np.uint8]

_SHADOW = 90  # strength of a cast shadow in 1/256
_POINTS = 8  # matched points an object, at most
_OPAQUE = 128  # an object owns a pixel where its opacity reaches one half


@dataclass(frozen=True)
class Object:
    """One visible object of a rendered scene.

    Attributes:
        owner: its number in ``Scene.owner``, from 1 for the farthest.
        index: its number in the content, the same in both views.
        label: index into the thing classes; the number of classes for a sign.
        name: the sprite's name; ``sign`` for a sign.
        colour: the named colour it is painted in (a sign's plate), or None where it keeps its own turned colours.
        distance: 1 to 3, larger is farther.
        box: xyxy in pixels around the visible pixels, x2 and y2 exclusive.
        area: visible pixels.
        text: what a sign says, else None.
        polygon: ``(4, 2)`` corners of a sign's text, clockwise from its top left, else None.
        legible: whether nothing but the sign itself shows in the text's polygon.
    """

    owner: int
    index: int
    label: int
    name: str
    colour: str | None
    distance: float
    box: tuple[int, int, int, int]
    area: int
    text: str | None = None
    polygon: NDArray[np.float64] | None = None
    legible: bool = False


@dataclass(frozen=True)
class Scene:
    """One rendering: ``image (S, S, 3)``, ``owner (S, S)`` uint8 (0 the background), objects from the farthest to the nearest."""

    image: Bytes
    owner: Bytes
    objects: tuple[Object, ...]
    poses: tuple[Pose, ...]
    """Pose of object ``owner`` at ``owner - 1``, in pixels of this rendering."""

    def depth(self) -> NDArray[np.float32]:
        """``(S, S)`` distances: 1 to 3 on objects, ``BACKDROP`` behind them."""
        table = np.full(256, BACKDROP, np.float32)
        for thing in self.objects:
            table[thing.owner] = thing.distance
        return table[self.owner]

    def labels(self) -> NDArray[np.int64]:
        """``(S, S)`` semantic classes: 0 the background, then the thing classes, then the sign."""
        table = np.zeros(256, np.int64)
        for thing in self.objects:
            table[thing.owner] = thing.label + 1
        return table[self.owner]


def _level(levels: tuple[Bytes, ...], pixels: int) -> Bytes:
    """The smallest level that is no smaller than its picture on the canvas (``pixels`` high, fixed point)."""
    return next((v for v in reversed(levels) if v.shape[0] * ONE >= pixels), levels[0])


def _backdrop(plan: Layout, size: int) -> Bytes:
    levels = pack().pyramid(plan.background)
    x, y, side = plan.crop
    level = next((k for k in range(len(levels) - 1, -1, -1) if side >> k >= size), 0)
    image = levels[level]
    crop = (x * ONE >> level, y * ONE >> level, (x + side) * ONE >> level, (y + side) * ONE >> level)
    canvas = resize(image, crop, size)
    canvas = recolour(canvas, hue_matrix(plan.hue, 180, plan.gain))
    return np.ascontiguousarray(canvas[:, ::-1]) if plan.flip else canvas


def _texture(items: Content, index: int, pixels_per: int) -> tuple[Bytes, tuple[int, int], Bytes]:
    """The object's premultiplied texture at a fitting level, the size of its level 0, and a small level for its shadow."""
    things = len(items.sprites)
    if index >= things:
        levels = items.plates[index - things].levels
        full = (levels[0].shape[0], levels[0].shape[1])
        rgba = _level(levels, full[0] * pixels_per)
    else:
        levels = pack().pyramid(items.sprites[index].file)
        full = (levels[0].shape[0], levels[0].shape[1])
        rgba = _level(levels, full[0] * pixels_per)
        look = items.looks[index]
        if look.colour is not None:
            rgba = tint(rgba, COLOURS[look.colour], look.gain)
        else:
            rgba = recolour(rgba, hue_matrix(look.hue, look.saturation, look.gain))
    return premultiply(rgba), full, levels[min(3, len(levels) - 1)]


def _scaled(pose: Pose, size: int) -> Pose:
    return Pose(pose.cx * size, pose.cy * size, max(pose.scale * size, 1), pose.degrees, pose.mirror)


def _paint(canvas: Bytes, owner: Bytes, items: Content, placed: Placed, number: int, size: int) -> Pose:
    pose = _scaled(placed.pose, size)
    texture, full, blurred = _texture(items, placed.index, pose.scale)
    # A soft shadow, down and to the right, on whatever lies behind.
    shift = ONE * size // 50 * 1000 // placed.distance
    under = Pose(pose.cx + shift // 2, pose.cy + shift, pose.scale, pose.degrees, pose.mirror)
    window = under.window(full, (size, size))
    if window[0] < window[2] and window[1] < window[3]:
        shade(canvas, sample(blurred[..., 3:], full, under, window), window, _SHADOW)
    window = pose.window(full, (size, size))
    if window[0] < window[2] and window[1] < window[3]:
        patch = sample(texture, full, pose, window)
        composite(canvas, patch, window)
        x0, y0, x1, y1 = window
        owner[y0:y1, x0:x1][patch[..., 3] >= _OPAQUE] = number
    return pose


def _polygon(items: Content, index: int, pose: Pose) -> NDArray[np.float64]:
    sign = items.plates[index - len(items.sprites)]
    height, width = sign.levels[0].shape[:2]
    x0, y0, x1, y1 = sign.ink
    u = np.array([x0, x1, x1, x0], np.float64) - width / 2
    v = np.array([y0, y0, y1, y1], np.float64) - height / 2
    x, y = pose.forward(u, v)
    # 1/64 of a pixel: coarser than what platforms' floating point could differ by.
    return np.rint(np.stack([x, y], 1) * 64) / 64


def _inside(polygon: NDArray[np.float64], size: int) -> NDArray[np.bool_]:
    """Pixels whose centres lie in a convex clockwise polygon."""
    ys, xs = np.mgrid[0:size, 0:size] + 0.5
    inside = np.ones((size, size), bool)
    for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, -1, axis=0)):
        inside &= (bx - ax) * (ys - ay) - (by - ay) * (xs - ax) >= 0
    return inside


def render(seed: int, split: str, index: int, size: int, view: int = 0, items: Content | None = None) -> Scene:
    """Scene ``index`` of a split at ``size`` pixels a side; ``view`` 1 is the other rendering of the same objects."""
    items = items or content(seed, split, index)
    plan = layout(items, seed, split, index, view)
    canvas = _backdrop(plan, size)
    owner = np.zeros((size, size), np.uint8)
    poses = [_paint(canvas, owner, items, placed, k + 1, size) for k, placed in enumerate(plan.placed)]
    light = np.arange(256, dtype=np.int32)[:, None] * np.array(plan.light, np.int32)[None, :] >> 8
    table = np.minimum(light, 255).astype(np.uint8)
    image = np.stack([table[:, c][canvas[..., c]] for c in range(3)], axis=-1)
    objects = []
    for k, placed in enumerate(plan.placed):
        mask = owner == k + 1
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not rows.size:
            continue
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        things = len(items.sprites)
        text: str | None = None
        polygon: NDArray[np.float64] | None = None
        legible = False
        if placed.index < things:
            sprite = items.sprites[placed.index]
            label, name, colour = sprite.label, sprite.name, items.looks[placed.index].colour
        else:
            sign = items.signs[placed.index - things]
            label, name, colour, text = len(pack().classes), "sign", sign.colour, sign.text
            polygon = _polygon(items, placed.index, poses[k])
            legible = bool(polygon.min() >= 0 and polygon.max() <= size and mask[_inside(polygon, size)].all())
        objects.append(
            Object(
                k + 1,
                placed.index,
                label,
                name,
                colour,
                placed.distance / 1000,
                box,
                int(mask.sum()),
                text,
                polygon,
                legible,
            )
        )
    return Scene(image, owner, tuple(objects), tuple(poses))


def matches(
    a: Scene, b: Scene, seed: int, split: str, index: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Points of objects visible in both renderings: ``here (n, 2)``, ``there (n, 2)`` in pixels, ``objects (n,)`` content indices.

    ``here`` lies on pixel centres owned by the object; ``there`` is the same point of the object, in a pixel it owns too.
    """
    draws = Draws(seed, SPLITS.index(split), index, 3)
    size = b.owner.shape[0]
    other = {o.index: o for o in b.objects}
    here, there, which = [], [], []
    for thing in a.objects:
        twin = other.get(thing.index)
        if twin is None:
            continue
        ys, xs = np.nonzero(a.owner == thing.owner)
        pick = np.array([draws.below(xs.size) for _ in range(4 * _POINTS)])
        x, y = xs[pick] + 0.5, ys[pick] + 0.5
        tx, ty = b.poses[twin.owner - 1].forward(*a.poses[thing.owner - 1].backward(x, y))
        tx, ty = np.rint(tx * 64) / 64, np.rint(ty * 64) / 64
        seen = (tx >= 0) & (ty >= 0) & (tx < size) & (ty < size)
        px, py = np.where(seen, tx, 0).astype(np.int64), np.where(seen, ty, 0).astype(np.int64)
        seen &= b.owner[py, px] == twin.owner
        _, first = np.unique(pick, return_index=True)
        keep = [k for k in range(pick.size) if seen[k] and k in set(first.tolist())][:_POINTS]
        here.append(np.stack([x, y], 1)[keep])
        there.append(np.stack([tx, ty], 1)[keep])
        which.append(np.full(len(keep), thing.index, np.int64))
    if not here:
        return np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0, np.int64)
    return np.concatenate(here), np.concatenate(there), np.concatenate(which)
