"""Integer rasteriser of ``scenes``: the same bytes on every machine and with every version of every library.

Geometry is in fixed point (16 bits after the point), colours in bytes, and every operation is an integer one; no image
library resamples here. Coordinates are pixel edges: the centre of pixel k is at k + 0.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "COLOURS",
    "ONE",
    "Draws",
    "Pose",
    "composite",
    "hue_matrix",
    "recolour",
    "resize",
    "sample",
    "shade",
    "tint",
]

ONE = 1 << 16
"""The number one in fixed point."""

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

# Eleven basic colour terms without the ones that shading turns into one another (orange and brown, pink and red).
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 42),
    "yellow": (242, 200, 22),
    "green": (44, 158, 62),
    "blue": (38, 92, 214),
    "purple": (140, 56, 184),
    "gray": (132, 132, 132),
}


class Draws:
    """Random integers from PCG64's raw words, whose stream numpy guarantees for good (that of its distributions it does not)."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(list(key)))

    def below(self, bound: int) -> int:
        """An integer in ``[0, bound)``; bias under ``bound / 2**32``."""
        return (int(self._bits.random_raw()) >> 32) * bound >> 32

    def between(self, low: int, high: int) -> int:
        """An integer in ``[low, high]``."""
        return low + self.below(high - low + 1)

    def shuffled(self, count: int) -> list[int]:
        """A random order of ``range(count)`` (Fisher-Yates)."""
        order = list(range(count))
        for last in range(count - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order


def _turn(degrees: int) -> tuple[int, int]:
    """Cosine and sine in fixed point. Rounding hides the last bits in which platforms' libm differ."""
    angle = math.radians(degrees)
    return round(math.cos(angle) * ONE), round(math.sin(angle) * ONE)


@dataclass(frozen=True)
class Pose:
    """Where a texture lies on a canvas: centre ``cx, cy`` and pixels a texture pixel ``scale``, fixed point; whole degrees, mirrored."""

    cx: int
    cy: int
    scale: int
    degrees: int
    mirror: bool = False

    def inverse(self) -> tuple[int, int, int, int]:
        """Texture pixels a canvas pixel: ``du/dx, du/dy, dv/dx, dv/dy``, fixed point."""
        cos, sin = _turn(self.degrees)
        a, b = cos * ONE // self.scale, sin * ONE // self.scale
        return (-a if self.mirror else a), (-b if self.mirror else b), -b, a

    def forward(
        self, u: NDArray[np.float64], v: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Canvas pixels of texture points given relative to the texture's centre, in texture pixels."""
        du_dx, du_dy, dv_dx, dv_dy = (c / ONE for c in self.inverse())
        det = du_dx * dv_dy - du_dy * dv_dx
        return (u * dv_dy - v * du_dy) / det + self.cx / ONE, (v * du_dx - u * dv_dx) / det + self.cy / ONE

    def backward(
        self, x: NDArray[np.float64], y: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Texture pixels, relative to the texture's centre, of canvas points."""
        du_dx, du_dy, dv_dx, dv_dy = (c / ONE for c in self.inverse())
        x, y = x - self.cx / ONE, y - self.cy / ONE
        return x * du_dx + y * du_dy, x * dv_dx + y * dv_dy

    def window(self, size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int, int, int]:
        """``x0, y0, x1, y1`` of the canvas ``(H, W)`` that a texture ``(h, w)`` can touch."""
        cos, sin = (abs(c) for c in _turn(self.degrees))
        half_w = ((size[1] + 1) * cos + (size[0] + 1) * sin) * self.scale >> 1
        half_h = ((size[1] + 1) * sin + (size[0] + 1) * cos) * self.scale >> 1
        x0, x1 = (self.cx * ONE - half_w) >> 32, -((-self.cx * ONE - half_w) >> 32)
        y0, y1 = (self.cy * ONE - half_h) >> 32, -((-self.cy * ONE - half_h) >> 32)
        return max(0, x0), max(0, y0), min(canvas[1], x1), min(canvas[0], y1)


def sample(texture: Bytes, full: tuple[int, int], pose: Pose, window: tuple[int, int, int, int]) -> Bytes:
    """Bilinear samples of a texture at the pixel centres of a canvas window; clear outside the texture.

    Args:
        texture: ``(h, w, C)``, one level of a pyramid whose level 0 is ``full``.
        full: ``(H, W)`` of level 0, in whose pixels the pose's scale is given.
        pose: where the texture lies.
        window: ``x0, y0, x1, y1`` of the canvas.

    Returns:
        ``(y1 - y0, x1 - x0, C)`` uint8.
    """
    height, width, channels = texture.shape
    x0, y0, x1, y1 = window
    du_dx, du_dy, dv_dx, dv_dy = pose.inverse()
    # A level's pixel covers full/level pixels of level 0; the levels are exact halvings for even sizes.
    du_dx, du_dy = du_dx * width // full[1], du_dy * width // full[1]
    dv_dx, dv_dy = dv_dx * height // full[0], dv_dy * height // full[0]
    xs = (np.arange(x0, x1, dtype=np.int64) << 16) + (ONE // 2 - pose.cx)
    ys = (np.arange(y0, y1, dtype=np.int64) << 16) + (ONE // 2 - pose.cy)
    # -ONE/2: from edges to centres; +ONE: a clear border of one pixel is added below.
    u = ((xs * du_dx)[None, :] + (ys * du_dy)[:, None] >> 16) + (width * ONE // 2 - ONE // 2 + ONE)
    v = ((xs * dv_dx)[None, :] + (ys * dv_dy)[:, None] >> 16) + (height * ONE // 2 - ONE // 2 + ONE)
    # Outside the border everything is clear: clamp onto it.
    np.clip(u, 0, (width + 1) * ONE - 1, out=u)
    np.clip(v, 0, (height + 1) * ONE - 1, out=v)
    stride = width + 2
    border = np.zeros((height + 2, stride, channels), np.uint8)
    border[1:-1, 1:-1] = texture
    flat = border.reshape(-1, channels)
    at = (v >> 16) * stride + (u >> 16)
    fu = ((u >> 8) & 255).astype(np.int32)[..., None]
    fv = ((v >> 8) & 255).astype(np.int32)[..., None]
    top = (flat[at].astype(np.int32) << 8) + fu * (flat[at + 1].astype(np.int32) - flat[at])
    low = (flat[at + stride].astype(np.int32) << 8) + fu * (flat[at + stride + 1].astype(np.int32) - flat[at + stride])
    result: Bytes = (((top << 8) + fv * (low - top) + (1 << 15)) >> 16).astype(np.uint8)
    return result


def _div255(x: NDArray[np.int32]) -> NDArray[np.int32]:
    """``round(x / 255)`` for ``0 <= x <= 65025``."""
    x = x + 128
    result: NDArray[np.int32] = (x + (x >> 8)) >> 8
    return result


def premultiply(rgba: Bytes) -> Bytes:
    """Straight to premultiplied opacity, ``(..., 4)``."""
    out = rgba.copy()
    out[..., :3] = _div255(rgba[..., :3].astype(np.int32) * rgba[..., 3:])
    return out


def composite(canvas: Bytes, patch: Bytes, window: tuple[int, int, int, int]) -> None:
    """Lay a premultiplied ``(h, w, 4)`` patch over a window of the canvas ``(H, W, 3)``, in place."""
    x0, y0, x1, y1 = window
    under = canvas[y0:y1, x0:x1]
    clear = 255 - patch[..., 3:].astype(np.int32)
    under[...] = np.minimum(_div255(under * clear) + patch[..., :3], 255)


def shade(canvas: Bytes, opacity: Bytes, window: tuple[int, int, int, int], strength: int) -> None:
    """Darken a window of the canvas by an opacity ``(h, w, 1)``; ``strength`` in 1/256 at full opacity. In place."""
    x0, y0, x1, y1 = window
    under = canvas[y0:y1, x0:x1]
    keep = 65280 - opacity.astype(np.int32) * strength
    under[...] = (under * keep + 32640) // 65280


def hue_matrix(degrees: int, saturation: int, gain: int) -> NDArray[np.int32]:
    """``(3, 3)`` matrix in 1/4096 that turns the hue about the grey axis, keeping luma.

    Args:
        degrees: turn of the chroma plane.
        saturation, gain: in 1/256.
    """
    cos, sin = _turn(degrees)
    # Rec. 601 luma and the two axes of the chroma plane of YIQ, in 1/1000.
    luma = np.array([299, 587, 114], np.int64)
    to_iq = np.array([[596, -274, -322], [211, -523, 312]], np.int64)
    from_iq = np.array([[956, 621], [-272, -647], [-1107, 1704]], np.int64)
    turn = np.array([[cos, -sin], [sin, cos]], np.int64)
    chroma = (from_iq @ turn @ to_iq) * saturation // (256 * 1000)  # in ONE/1000
    matrix = (luma[None, :] * ONE + chroma) * gain // 256  # in ONE/1000
    return (matrix * 4096 // (ONE * 1000)).astype(np.int32)


def recolour(rgba: Bytes, matrix: NDArray[np.int32]) -> Bytes:
    """Apply a matrix of ``hue_matrix`` to the colours of ``(H, W, 3 or 4)``; opacity is kept."""
    out = rgba.copy()
    out[..., :3] = np.clip((rgba[..., :3].astype(np.int32) @ matrix.T + 2048) >> 12, 0, 255)
    return out


def _luma(rgb: Bytes) -> NDArray[np.int32]:
    wide = rgb.astype(np.int32)
    result: NDArray[np.int32] = (wide[..., 0] * 77 + wide[..., 1] * 150 + wide[..., 2] * 29) >> 8
    return result


def tint(rgba: Bytes, colour: tuple[int, int, int], gain: int) -> Bytes:
    """Paint ``(H, W, 4)`` in one colour: shadows dark, mid tones the colour, highlights pale. ``gain`` in 1/256."""
    steps = np.arange(256, dtype=np.int32)[:, None]
    base = np.array(colour, np.int32)[None, :]
    # Luma 0 is the colour at 30 %, 150 the colour itself, 255 the colour at 45 % under white.
    dark = base * (77 + steps * 179 // 150) >> 8
    pale = base + (255 - base) * (steps - 150) * 141 // (105 * 256)
    ramp = np.clip(np.where(steps < 150, dark, pale) * gain >> 8, 0, 255).astype(np.uint8)
    out = rgba.copy()
    out[..., :3] = ramp[_luma(rgba[..., :3])]
    return out


def resize(image: Bytes, crop: tuple[int, int, int, int], size: int) -> Bytes:
    """Bilinear ``size x size`` samples of a crop ``x0, y0, x1, y1`` (fixed point) of ``(H, W, 3)``, edges repeated."""

    def taps(low: int, high: int, limit: int) -> tuple[Ints, Ints, NDArray[np.int32]]:
        step = (high - low) // size
        at = low + step * np.arange(size, dtype=np.int64) + step // 2 - ONE // 2
        np.clip(at, 0, (limit - 1) * ONE, out=at)
        first = at >> 16
        return first, np.minimum(first + 1, limit - 1), ((at >> 8) & 255).astype(np.int32)

    height, width = image.shape[:2]
    x0, x1, fx = taps(crop[0], crop[2], width)
    y0, y1, fy = taps(crop[1], crop[3], height)
    low, high = int(y0[0]), int(y1[-1]) + 1
    rows = image[low:high].astype(np.int32)
    across = (rows[:, x0] << 8) + fx[None, :, None] * (rows[:, x1] - rows[:, x0])
    top, bottom = across[y0 - low], across[y1 - low]
    return (((top << 8) + fy[:, None, None] * (bottom - top) + (1 << 15)) >> 16).astype(np.uint8)
