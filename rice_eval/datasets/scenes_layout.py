"""What stands in a scene and where: content, then two layouts of it (``view a`` and ``view b``), from seeded draws alone.

Lengths are fractions of the image's side in fixed point, so that a scene is the same scene at every size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rice_eval.datasets.scenes_pack import SPLITS, Sprite, pack
from rice_eval.datasets.scenes_raster import COLOURS, ONE, Draws, Pose, sample
from rice_eval.datasets.scenes_text import PLATE_COLOURS, Plate, SignText, draw_sign_text, plate

__all__ = ["BACKDROP", "GENERATOR", "Content", "Layout", "Look", "Placed", "content", "layout"]

GENERATOR = 1
"""Version of the generator: raised with every change that alters a pixel or an answer."""

BACKDROP = 4.0
"""Distance of the background; objects stand at 1 to 3, and look smaller in proportion."""

_GRID = 64  # cells a side of the coarse canvas on which layouts are tried
_KEEP_THING = 45  # per cent of an object's cells on the canvas that nearer ones may not cover
_KEEP_SIGN = 97


@dataclass(frozen=True)
class Look:
    """The appearance of a thing: painted in the named ``colour``, or its own colours turned by ``hue`` degrees."""

    colour: str | None
    hue: int
    saturation: int
    gain: int


@dataclass(frozen=True)
class Content:
    """Things with their looks, and signs; object k is thing k, signs come after."""

    sprites: tuple[Sprite, ...]
    looks: tuple[Look, ...]
    signs: tuple[SignText, ...]
    plates: tuple[Plate, ...]


@dataclass(frozen=True)
class Placed:
    """Object ``index`` of the content at a distance, in 1/1000, and its pose on a unit canvas."""

    index: int
    distance: int
    pose: Pose


@dataclass(frozen=True)
class Layout:
    """One view: a crop of a background, and objects from the farthest to the nearest."""

    background: str
    crop: tuple[int, int, int]
    flip: bool
    hue: int
    gain: int
    light: tuple[int, int, int]
    placed: tuple[Placed, ...]


def content(seed: int, split: str, index: int) -> Content:
    """The objects of scene ``index``: 3 to 7 things, of which one class occurs one to three times, and up to two signs.

    Every class is equally likely; a class's sprites too, whatever their number.
    """
    draws = Draws(GENERATOR, seed, SPLITS.index(split), index, 0)
    assets = pack()
    order = draws.shuffled(len(assets.classes))
    repeats = draws.between(1, 3)
    others = draws.between(max(0, 3 - repeats), 7 - repeats)
    labels = [order[0]] * repeats + order[1 : 1 + others]
    sprites, looks = [], []
    for label in labels:
        group = assets.sprites[split][label]
        sprites.append(group[draws.below(len(group))])
        names = tuple(COLOURS)
        painted = draws.below(2) == 0
        colour = names[draws.below(len(names))]
        looks.append(
            Look(colour if painted else None, draws.below(360), draws.between(90, 300), draws.between(190, 300))
        )
    palette = tuple(PLATE_COLOURS)
    signs: list[SignText] = []
    # 15 % of scenes have no sign, 50 % one, 35 % two (of different colours).
    chance = draws.below(100)
    for _ in range(0 if chance < 15 else 1 if chance < 65 else 2):
        left = tuple(c for c in palette if all(c != s.colour for s in signs))
        signs.append(draw_sign_text(draws, split, left))
    return Content(tuple(sprites), tuple(looks), tuple(signs), tuple(plate(s) for s in signs))


def _background(draws: Draws, split: str) -> tuple[str, tuple[int, int, int], bool]:
    files = pack().backgrounds[split]
    file = files[draws.below(len(files))]
    height, width = pack().pyramid(file)[0].shape[:2]
    side = draws.between(min(height, width) * 5 // 8, min(height, width))
    return file, (draws.below(width - side + 1), draws.below(height - side + 1), side), draws.below(2) == 0


def _cells(
    texture: NDArray[np.uint8], full: tuple[int, int], scale: int, degrees: int, mirror: bool
) -> tuple[NDArray[np.bool_], int]:
    """The object's mask on the coarse grid, centred in a square of odd side; and half that side."""
    reach = max(full) * scale * _GRID * 3 // 4
    half = int(reach >> 16) + 1
    middle = (2 * half + 1) * ONE // 2
    pose = Pose(middle, middle, max(scale * _GRID, 1), degrees, mirror)
    alpha = sample(texture[..., 3:], full, pose, (0, 0, 2 * half + 1, 2 * half + 1))
    return alpha[..., 0] >= 128, half


def layout(items: Content, seed: int, split: str, index: int, view: int) -> Layout:
    """Place the objects: farther ones are smaller and stand higher, nearer ones cover them, within limits.

    Each object lies at least 3/4 inside the image (signs wholly) and keeps ``_KEEP_THING`` per cent of what is inside
    visible (signs ``_KEEP_SIGN``), as measured on a coarse grid. An object that finds no place in 24 tries is left out;
    where fewer than three things remain, the whole layout is drawn again.
    """
    for attempt in range(50):
        draws = Draws(GENERATOR, seed, SPLITS.index(split), index, 1 + view, attempt)
        file, crop, flip = _background(draws, split)
        hue, gain = draws.between(-30, 30), draws.between(170, 280)
        light = (draws.between(226, 286), draws.between(226, 286), draws.between(226, 286))
        placed = _place(items, draws)
        if sum(p.index < len(items.sprites) for p in placed) >= 3:
            break
    return Layout(file, crop, flip, hue, gain, light, tuple(placed))


def _place(items: Content, draws: Draws) -> list[Placed]:
    things, count = len(items.sprites), len(items.sprites) + len(items.signs)
    distances: list[int] = []
    for index in range(count):
        distance = draws.between(1000, 3000 if index < things else 2200)
        while distance in distances:
            distance -= 1
        distances.append(distance)
    owner = np.full((_GRID, _GRID), -1, np.int16)
    inside = [0] * count
    placed: list[Placed] = []
    for index in sorted(range(count), key=lambda k: -distances[k]):
        sign = index >= things
        degrees = draws.between(-12, 12) if sign else draws.between(-25, 25)
        mirror = not sign and draws.below(2) == 0
        stature = draws.between(50, 72)  # per cent of the image's side at distance 1
        if sign:
            levels = items.plates[index - things].levels
            ink = items.plates[index - things].ink
            # Signs are sized by the height of their ink: 6 to 11 per cent of the side at distance 1, within 3/4 of it across.
            side = draws.between(60, 110) * ONE // distances[index]
            scale = min(side // (ink[3] - ink[1]), ONE * 3 // 4 // levels[0].shape[1])
        else:
            levels = pack().pyramid(items.sprites[index].file)
            scale = stature * 10 * ONE // distances[index] // levels[0].shape[0]
        full = (levels[0].shape[0], levels[0].shape[1])
        small = next((v for v in reversed(levels) if v.shape[0] * ONE >= full[0] * scale * _GRID), levels[0])
        mask, half = _cells(small, full, scale, degrees, mirror)
        # The ground rises towards the horizon with distance; a third of the side of play around it.
        ground = ONE * 34 // 100 + ONE * 300 // distances[index]
        for _ in range(24):
            cx = draws.below(ONE)
            cy = min(max(ground + draws.between(-ONE // 3, ONE // 3), 0), ONE)
            window = _fits(mask, half, cx, cy, owner, inside, things, sign)
            if window is not None:
                grid, cut = window
                inside[index] = int(cut.sum())
                owner[grid][cut] = index
                placed.append(Placed(index, distances[index], Pose(cx, cy, scale, degrees, mirror)))
                break
    return placed


def _fits(
    mask: NDArray[np.bool_],
    half: int,
    cx: int,
    cy: int,
    owner: NDArray[np.int16],
    inside: list[int],
    things: int,
    sign: bool,
) -> tuple[tuple[slice, slice], NDArray[np.bool_]] | None:
    """The window of the coarse canvas and the part of the mask in it, or None where a limit of ``layout`` is broken."""
    left, top = (cx * _GRID >> 16) - half, (cy * _GRID >> 16) - half
    side = mask.shape[0]
    x0, x1, y0, y1 = max(left, 0), min(left + side, _GRID), max(top, 0), min(top + side, _GRID)
    if x0 >= x1 or y0 >= y1:
        return None
    cut = mask[y0 - top : y1 - top, x0 - left : x1 - left]
    total, seen = int(mask.sum()), int(cut.sum())
    if seen * 100 < total * (100 if sign else 75):
        return None
    grid = (slice(y0, y1), slice(x0, x1))
    covered = np.bincount(owner[grid][cut] + 1, minlength=len(inside) + 1)[1:]
    if covered.any():
        visible = np.bincount(owner.ravel() + 1, minlength=len(inside) + 1)[1:] - covered
        for k in np.flatnonzero(covered):
            if visible[k] * 100 < inside[k] * (_KEEP_SIGN if k >= things else _KEEP_THING):
                return None
    return grid, cut
