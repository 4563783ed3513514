"""Views: named deterministic geometry from an image to what the encoder sees, for masks, boxes and points too, and back.

A view is written as a comma-separated list: a *base* that scales the image, then modifiers.

==================  =====================================================================================================
``square=S``        squash to S x S; the aspect ratio is lost, nothing else
``short=S``         scale so that the shorter side is S, aspect kept
``long=S``          scale so that the longer side is S, aspect kept
``letterbox=S``     scale so that the longer side is S, then pad at the right and bottom to S x S
``native``          no scaling
``slide=STRIDE``    with ``crop=C`` (or after ``short=S``, whose S is then C): windows of C x C at this stride, the last ones
                    shifted back inside, as mmseg's slide inference places them
``slide=even``      as many windows as it takes to cover each side, spread evenly (benchmark-vfm-ss)
``crop=C``          side of the sliding window
``pad=M``           pad to a multiple of M, centred (DINOv2's CenterPadding); pixels added are the encoder's mean colour;
                    ``pad=patch`` takes the encoder's patch
``flip``            mirror left-right, last of all
``interp=NAME``     ``bicubic`` (default) or ``bilinear``, both antialiased when shrinking; or ``plain``, bilinear without
                    antialiasing, as OpenCV's ``INTER_LINEAR`` and so mmcv scale images
==================  =====================================================================================================

A number followed by ``p`` counts patches: ``square=32p`` is 448 px for a patch of 14 and 512 px for one of 16, the same
1,024 tokens. ``View.resolve(patch)`` turns a view in patches into one in pixels; two encoders' results at one view in patches
share a protocol.

Dense tasks never crop the borders away: there is no centre crop here. Sides of ``short``, ``long`` and ``native`` are
rounded to the nearest integer, half to even. Coordinates are pixel edges: an image of width W spans 0 to W, and the centre of
pixel k is at k + 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pil

from rice_eval.errors import UsageError

__all__ = ["Frame", "Interpolation", "View", "resize"]

Image = NDArray[np.uint8]
Points = NDArray[np.float64]
Interpolation = Literal["bicubic", "bilinear", "plain"]

_BASES = ("square", "short", "long", "letterbox", "native")
_RESAMPLING: dict[Interpolation, Pil.Resampling | None] = {
    "bicubic": Pil.Resampling.BICUBIC,
    "bilinear": Pil.Resampling.BILINEAR,
    "plain": None,
}


@dataclass(frozen=True)
class Frame:
    """One window that the encoder sees, and how it lies on the image.

    A point x of the image is at ``(x * scale_x - left)`` of the frame (before the flip); likewise y.

    Attributes:
        image_size: ``(H, W)`` of the original image.
        scaled: ``(h, w)`` of the image after scaling.
        left, top: where the frame starts in the scaled image; negative where the frame is padded.
        size: ``(h, w)`` of the frame.
        window: ``(top, left, bottom, right)`` of the scaled image that the frame shows; the rest of the frame is padding,
            also where the scaled image goes on (a window of a sliding view is padded as if it were cut out first).
        flip: whether the frame is mirrored left-right.
    """

    image_size: tuple[int, int]
    scaled: tuple[int, int]
    left: int
    top: int
    size: tuple[int, int]
    window: tuple[int, int, int, int]
    flip: bool = False

    @property
    def scale(self) -> tuple[float, float]:
        """``(scale_y, scale_x)``."""
        return self.scaled[0] / self.image_size[0], self.scaled[1] / self.image_size[1]

    @property
    def content(self) -> tuple[int, int, int, int]:
        """``(x1, y1, x2, y2)`` of the frame that shows image, not padding."""
        y1, x1 = self.window[0] - self.top, self.window[1] - self.left
        y2, x2 = self.window[2] - self.top, self.window[3] - self.left
        return (self.size[1] - x2, y1, self.size[1] - x1, y2) if self.flip else (x1, y1, x2, y2)

    def points(self, points: Points) -> Points:
        """``(n, 2)`` xy in pixels of the image -> of the frame. Points outside stay outside."""
        sy, sx = self.scale
        out = np.asarray(points, dtype=np.float64) * (sx, sy) - (self.left, self.top)
        if self.flip:
            out[:, 0] = self.size[1] - out[:, 0]
        return out

    def points_back(self, points: Points) -> Points:
        """``(n, 2)`` xy of the frame -> of the image."""
        sy, sx = self.scale
        out = np.array(points, dtype=np.float64)
        if self.flip:
            out[:, 0] = self.size[1] - out[:, 0]
        back: Points = (out + np.array([self.left, self.top])) / (sx, sy)
        return back

    def boxes(self, boxes: Points, clip: bool = False) -> Points:
        """``(n, 4)`` xyxy of the image -> of the frame; ``clip`` cuts them at the frame's edges."""
        out = self._boxes(boxes, self.points)
        if clip:
            out[:, 0::2] = out[:, 0::2].clip(0, self.size[1])
            out[:, 1::2] = out[:, 1::2].clip(0, self.size[0])
        return out

    def boxes_back(self, boxes: Points) -> Points:
        """``(n, 4)`` xyxy of the frame -> of the image."""
        return self._boxes(boxes, self.points_back)

    def _boxes(self, boxes: Points, move: object) -> Points:
        assert callable(move)
        corners = move(np.asarray(boxes, dtype=np.float64).reshape(-1, 2)).reshape(-1, 2, 2)
        # A flip swaps left and right corners: take the extremes again.
        return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)

    def mask(self, mask: NDArray[np.int64], fill: int) -> NDArray[np.int64]:
        """``(H, W)`` labels of the image -> ``(h, w)`` of the frame, nearest at pixel centres; ``fill`` where padded."""
        rows, cols = self._sources()
        inside = (rows >= 0)[:, None] & (cols >= 0)[None, :]
        picked = mask[np.maximum(rows, 0)[:, None], np.maximum(cols, 0)[None, :]]
        return np.where(inside, picked, fill).astype(np.int64)

    def _sources(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each row and column of the frame the image's row or column at its centre; -1 in the padding."""
        out = []
        for axis, start, first, end in ((0, self.top, *self.window[0::2]), (1, self.left, *self.window[1::2])):
            place = np.arange(self.size[axis]) + start
            # floor((p + 1/2) * full / scaled) in whole numbers: exact at every size.
            full, scaled = self.image_size[axis], self.scaled[axis]
            source = ((2 * place + 1) * full) // (2 * scaled)
            out.append(np.where((place >= first) & (place < end), source, -1))
        rows, cols = out
        return rows, cols[::-1] if self.flip else cols


@dataclass(frozen=True)
class View:
    """A parsed view. ``View.parse(text)`` makes one, ``str(view)`` writes it in canonical form.

    Attributes:
        base: one of the bases above.
        side, crop, stride: pixels; below zero, that many patches; 0 where not given.
        pad: 1 for no padding, 0 for the encoder's patch.
        flip: mirrored left-right.
        interp: interpolation of the scaling.
        even: windows are spread evenly; ``stride`` is then the crop.
    """

    base: str
    side: int = 0
    crop: int = 0
    stride: int = 0
    pad: int = 1
    flip: bool = False
    interp: Interpolation = "bicubic"
    even: bool = False

    @classmethod
    def parse(cls, text: str) -> View:
        """Read a view from its text.

        Raises:
            UsageError: an unknown word, a number that is none, or modifiers that do not go together.
        """
        words: dict[str, str] = {}
        for part in str(text).replace(" ", "").split(","):
            key, _, value = part.partition("=")
            if key in words or not key:
                raise _bad(text, f"'{part}' is empty or given twice")
            words[key] = value
        bases = [w for w in words if w in _BASES]
        unknown = set(words) - {*_BASES, "crop", "slide", "pad", "flip", "interp"}
        if unknown or len(bases) != 1:
            reason = f"unknown word '{sorted(unknown)[0]}'" if unknown else f"one of {', '.join(_BASES)} is needed"
            raise _bad(text, reason)
        base = bases[0]
        for bare in ("native", "flip"):
            if words.get(bare):
                raise _bad(text, f"'{bare}' takes no value")
        interp = next((known for known in _RESAMPLING if known == words.get("interp", "bicubic")), None)
        if interp is None:
            raise _bad(text, f"interpolation '{words['interp']}' is not one of {', '.join(_RESAMPLING)}")
        side = 0 if base == "native" else _number(text, base, words[base])
        even = words.get("slide") == "even"
        stride = _number(text, "slide", words["slide"]) if "slide" in words and not even else 0
        crop = _number(text, "crop", words["crop"]) if "crop" in words else (side if stride or even else 0)
        stride = crop if even else stride
        if crop and not stride:
            raise _bad(text, "'crop' is the side of a sliding window and needs 'slide=STRIDE'")
        if stride and (base in ("square", "letterbox") or not crop):
            raise _bad(text, "'slide' goes with short=, long= or native, and needs a 'crop'")
        if (stride < 0) == (crop < 0) and abs(stride) > abs(crop):
            raise _bad(text, f"a stride of {stride} leaves gaps between windows of {crop}".replace("-", ""))
        return cls(
            base=base,
            side=side,
            crop=crop,
            stride=stride,
            pad=0 if words.get("pad") == "patch" else _number(text, "pad", words.get("pad", "1"), patches=False),
            flip="flip" in words,
            interp=interp,
            even=even,
        )

    def __str__(self) -> str:
        parts = [self.base if self.base == "native" else f"{self.base}={_text(self.side)}"]
        if self.stride:
            parts.append("slide=even" if self.even else f"slide={_text(self.stride)}")
            if self.crop != self.side:
                parts.append(f"crop={_text(self.crop)}")
        if self.pad != 1:
            parts.append(f"pad={self.pad or 'patch'}")
        if self.flip:
            parts.append("flip")
        if self.interp != "bicubic":
            parts.append(f"interp={self.interp}")
        return ",".join(parts)

    def resolve(self, patch: int) -> View:
        """The same view in pixels for an encoder whose sides must be multiples of ``patch``.

        Raises:
            UsageError: a stride in pixels and a crop in patches, or the other way round, that leave gaps at this patch.
        """
        side, crop, stride = (-n * patch if n < 0 else n for n in (self.side, self.crop, self.stride))
        if stride > crop:
            raise _bad(str(self), f"a stride of {stride} leaves gaps between windows of {crop} (patch {patch})")
        return replace(self, side=side, crop=crop, stride=stride, pad=self.pad or patch)

    def frames(self, height: int, width: int) -> tuple[Frame, ...]:
        """Where the view's windows lie on an image of this size; one frame unless the view slides.

        Raises:
            UsageError: the view counts patches and was not resolved.
        """
        if min(self.side, self.crop, self.stride) < 0 or not self.pad:
            raise UsageError(f"view '{self}' counts patches", "resolve it with the encoder's patch first")
        scaled = self._scaled(height, width)
        if self.stride:
            place = _even_windows if self.even else _windows
            spans = [place(side, self.crop, self.stride) for side in scaled]
            places = [(top, left, bottom - top, right - left) for top, bottom in spans[0] for left, right in spans[1]]
        elif self.base == "letterbox":
            places = [(0, 0, self.side, self.side)]
        else:
            places = [(0, 0, *scaled)]
        frames = []
        for top, left, h, w in places:
            up, before = ((-h) % self.pad) // 2, ((-w) % self.pad) // 2
            size = (h + (-h) % self.pad, w + (-w) % self.pad)
            window = (top, left, min(top + h, scaled[0]), min(left + w, scaled[1]))
            frames.append(Frame((height, width), scaled, left - before, top - up, size, window, self.flip))
        return tuple(frames)

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        if self.base == "native":
            return height, width
        if self.base == "square":
            return self.side, self.side
        edge = min(height, width) if self.base == "short" else max(height, width)
        return tuple(max(1, round(s * self.side / edge)) for s in (height, width))  # type: ignore[return-value]

    def apply(self, image: Image, fill: tuple[int, int, int] = (124, 116, 104)) -> list[tuple[Image, Frame]]:
        """The view's windows of an image.

        Args:
            image: ``(H, W, 3)`` uint8 RGB.
            fill: colour of padded pixels, 0 to 255; by default ImageNet's mean, rounded.

        Returns:
            ``(h, w, 3)`` uint8 windows with their frames.
        """
        height, width = int(image.shape[0]), int(image.shape[1])
        frames = self.frames(height, width)
        scaled = frames[0].scaled
        if scaled != (height, width):
            image = resize(image, scaled, self.interp)
        return [(_cut(image, frame, fill), frame) for frame in frames]


def resize(image: Image, size: tuple[int, int], interp: Interpolation) -> Image:
    """``(H, W, 3)`` uint8 to ``(*size, 3)`` uint8; see ``interp`` above."""
    filter_ = _RESAMPLING[interp]
    if filter_ is not None:
        return np.asarray(Pil.fromarray(image).resize((size[1], size[0]), filter_), dtype=np.uint8)
    out = image.astype(np.float32)
    for axis in (0, 1):
        full, wanted = out.shape[axis], size[axis]
        place = (np.arange(wanted) + 0.5) * (full / wanted) - 0.5
        before = np.floor(place).astype(np.int64)
        share = (place - before).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        near, far = (np.take(out, k.clip(0, full - 1), axis=axis) for k in (before, before + 1))
        out = near + (far - near) * share
    return np.rint(out).astype(np.uint8)


def _cut(image: Image, frame: Frame, fill: tuple[int, int, int]) -> Image:
    h, w = frame.size
    top, left, bottom, right = frame.window
    piece = image[top:bottom, left:right]
    if piece.shape[:2] == (h, w):
        out = piece
    else:
        out = np.empty((h, w, 3), dtype=np.uint8)
        out[:] = np.asarray(fill, dtype=np.uint8)
        y, x = top - frame.top, left - frame.left
        out[y : y + piece.shape[0], x : x + piece.shape[1]] = piece
    return np.ascontiguousarray(out[:, ::-1] if frame.flip else out)


def _windows(side: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """Start and end of each window along one side, as mmseg's ``slide_inference`` places them."""
    count = max(side - crop + stride - 1, 0) // stride + 1
    spans = []
    for k in range(count):
        end = min(k * stride + crop, side)
        spans.append((max(end - crop, 0), end))
    return spans


def _even_windows(side: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """The fewest windows that cover the side, evenly spread; starts are rounded down. ``stride`` is not read."""
    count = max(1, -(-side // crop))
    gap = (side - crop) / (count - 1) if count > 1 else 0.0
    return [(int(k * gap), min(int(k * gap) + crop, side)) for k in range(count)]


def _number(text: str, key: str, value: str, patches: bool = True) -> int:
    digits = value[:-1] if patches and value.endswith("p") else value
    if not (digits.isascii() and digits.isdecimal()) or not 1 <= int(digits) <= 16384:
        raise _bad(
            text,
            f"'{key}' needs a whole number from 1 to 16384{' of pixels, or of patches like 32p' if patches else ''}, not '{value}'",
        )
    return int(digits) if digits == value else -int(digits)


def _text(number: int) -> str:
    return str(number) if number >= 0 else f"{-number}p"


def _bad(text: str, reason: str) -> UsageError:
    return UsageError(f"view '{text}': {reason}", "write it like square=448 or short=512,slide=341 (docs/views.md)")
