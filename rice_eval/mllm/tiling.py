"""How an image becomes the tiles an encoder sees, and how the tiles' tokens become one sequence again.

``anyres`` (LLaVA-NeXT, blog of 2024-01-30 and ``llava/mm_utils.py``): the pinpoint that keeps most of the image's pixels is
chosen, the image is scaled into it and padded with black, both sides evenly; it is cut into tiles of the encoder's size, and
the whole image, squashed to one tile, stands first. After the projector the tiles' tokens form one grid again, what the
padding made of it is cut away (``spatial_unpad``), and a learned ``image_newline`` ends every row. ``anyres_max_K``
(LLaVA-OneVision) scales that grid down, bilinearly, where it holds more tokens than about K tiles.

Sizes are ``(height, width)`` throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rice_eval.errors import DataError, UsageError
from rice_eval.mllm.scaling import Scaler, crop_square, pad_square, scale, smart_size
from rice_eval.views import View

__all__ = [
    "NEXT_SHAPES",
    "Tiles",
    "Tiling",
    "best_pinpoint",
    "open_image",
    "pack",
    "read_image",
    "scaled_size",
    "unpadded",
]

Size = tuple[int, int]

#: Pinpoints of LLaVA-NeXT in tiles (rows, columns): ``llava/mm_utils.py`` and llava-v1.6's config.json, 336 px a tile; RICE's
#: group ran the same shapes at its own side (unicom, mlcd_vl/scripts/finetune_mlcd.sh: 448 px a tile).
NEXT_SHAPES: tuple[Size, ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))

_BY = ("squash", "crop", "pad", "smart")

#: Longer side over shorter side beyond which no image of a benchmark lies; a tile of one would be a line of pixels.
MAX_ASPECT = 200.0


@dataclass(frozen=True)
class Tiles:
    """The tiles of one image.

    Attributes:
        pixels: ``(T, 3, h, w)`` float in [0, 1]; the base image first.
        size: ``(H, W)`` of the image.
    """

    pixels: Tensor
    size: Size


@dataclass(frozen=True)
class Tiling:
    """A named way to cut. Use ``Tiling.single`` or ``Tiling.anyres``.

    Attributes:
        kind: ``single`` or ``anyres``.
        side: pixels a side of a tile; 0 where a single view decides.
        single: how a single image is scaled: a view of ``rice_eval.views``; or ``squash`` (to ``side`` x ``side``), ``crop`` (shorter side to
            ``side``, centre cropped), ``pad`` (padded to a square with the encoder's mean colour, then squashed to ``side``), as LLaVA-1.5's
            processors do; or ``smart`` (LLaVA-OneVision-1.5: own size, sides rounded to multiples of ``side``, pixels kept
            within ``pixel_range``).
        pinpoints: sizes to choose from, for ``anyres``.
        max_tiles: K of ``anyres_max_K``; None for plain ``anyres``.
        scaler: what scales: ``pil`` or ``torchvision`` (both antialiased, some pixels differ by one level).
        resample: ``bicubic`` or ``bilinear``.
        pixel_range: fewest and most pixels, for ``smart``.
        several: what ``anyres`` does with images that do not stand alone in their request: ``tiles`` as ever, or ``pad``
            (LLaVA-OneVision): padded to a square with the mean colour, one tile and one newline.
    """

    kind: Literal["single", "anyres"]
    side: int = 0
    single_by: str = "crop"
    pinpoints: tuple[Size, ...] = ()
    max_tiles: int | None = None
    scaler: Scaler = "pil"
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    pixel_range: tuple[int, int] | None = None
    several: Literal["tiles", "pad"] = "tiles"

    def __post_init__(self) -> None:
        if self.kind == "anyres":
            if not self.pinpoints:
                raise UsageError("anyres needs at least one pinpoint", "give (height, width) pairs in pixels")
            for pair in self.pinpoints:
                if len(pair) != 2 or any(not isinstance(n, int) or n < self.side or n % self.side for n in pair):
                    raise UsageError(
                        f"pinpoint {tuple(pair)} is no pair of multiples of the tile's side {self.side}",
                        "give (height, width) pairs in pixels",
                    )
        elif self.single_by not in _BY:
            View.parse(self.single_by)

    @classmethod
    def single(cls, view: str) -> Tiling:
        """The whole image as one tile, through a view such as ``square=448``, ``letterbox=448`` or ``native,pad=14``.

        Raises:
            UsageError: a view that does not parse, or one that slides.
        """
        parsed = View.parse(view)
        if parsed.stride:
            raise UsageError(f"view '{view}' slides: a single tile is asked for", "choose anyres for several tiles")
        return cls(kind="single", single_by=str(parsed))

    @classmethod
    def anyres(cls, side: int, pinpoints: tuple[Size, ...] | None = None, max_tiles: int | None = None) -> Tiling:
        """LLaVA-NeXT's tiles of ``side`` px.

        Args:
            side: of a tile, the encoder's native one.
            pinpoints: ``(height, width)`` pairs; by default LLaVA-NeXT's five shapes of up to 4 tiles.
            max_tiles: see ``anyres_max_K``.

        Raises:
            UsageError: pinpoints that are no multiples of ``side``.
        """
        chosen = pinpoints if pinpoints is not None else tuple((r * side, c * side) for r, c in NEXT_SHAPES)
        return cls(kind="anyres", side=side, pinpoints=tuple((int(h), int(w)) for h, w in chosen), max_tiles=max_tiles)

    def facts(self) -> dict[str, Any]:
        """All that changes a tile, as JSON values."""
        out: dict[str, Any] = {"kind": self.kind}
        if self.kind == "single" and self.single_by not in _BY:
            return {**out, "view": self.single_by}
        out |= {"side": self.side, "scaler": self.scaler, "resample": self.resample}
        if self.kind == "single":
            out |= {"by": self.single_by}
            if self.pixel_range is not None:
                out |= {"pixel_range": list(self.pixel_range)}
        else:
            shapes = [list(p) for p in self.pinpoints]
            out |= {"pinpoints": shapes, "max_tiles": self.max_tiles, "several": self.several}
        return out

    @property
    def square_side(self) -> int | None:
        """Side of every tile where all are squares of one size, else None."""
        if self.kind == "anyres" or self.single_by in ("squash", "crop", "pad"):
            return self.side
        if self.single_by == "smart":
            return None
        view = View.parse(self.single_by)
        return view.side if view.base in ("square", "letterbox") and view.side > 0 and view.pad == 1 else None

    def cut(self, image: Image.Image, patch: int, mean: tuple[float, float, float], alone: bool = True) -> Tiles:
        """The tiles of an image.

        Args:
            image: any mode; made RGB as ``convert`` does.
            patch: the encoder's, for views that count patches or pad to it.
            mean: the encoder's, 0 to 1, the colour of padding in single views.
            alone: whether its request has no other image; see ``several``.

        Raises:
            DataError: an image that can't be decoded, is empty, or is thinner than any benchmark's.
        """
        pixels = read_image(image)
        size = (int(pixels.shape[0]), int(pixels.shape[1]))
        if self.kind == "anyres" and not alone and self.several == "pad":
            tiles = [scale(pad_square(pixels, mean), (self.side, self.side), self.scaler, self.resample)]
        elif self.kind == "anyres":
            tiles = self._anyres(pixels, size)
        else:
            tiles = [self._single(pixels, size, patch, mean)]
        stacked = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2)
        return Tiles(stacked.to(torch.float32) / 255, size)

    def _anyres(self, pixels: NDArray[np.uint8], size: Size) -> list[NDArray[np.uint8]]:
        best = best_pinpoint(size, self.pinpoints)
        inner = scaled_size(size, best)
        canvas = np.zeros((*best, 3), dtype=np.uint8)
        top, left = (best[0] - inner[0]) // 2, (best[1] - inner[1]) // 2
        canvas[top : top + inner[0], left : left + inner[1]] = scale(pixels, inner, self.scaler, self.resample)
        side = self.side
        base = scale(pixels, (side, side), self.scaler, self.resample)
        rows, cols = best[0] // side, best[1] // side
        return [base] + [
            canvas[r * side : (r + 1) * side, c * side : (c + 1) * side] for r in range(rows) for c in range(cols)
        ]

    def _single(
        self, pixels: NDArray[np.uint8], size: Size, patch: int, mean: tuple[float, float, float]
    ) -> NDArray[np.uint8]:
        if self.single_by == "squash":
            return scale(pixels, (self.side, self.side), self.scaler, self.resample)
        if self.single_by == "crop":
            return crop_square(pixels, self.side, self.scaler, self.resample)
        if self.single_by == "pad":
            return scale(pad_square(pixels, mean), (self.side, self.side), self.scaler, self.resample)
        if self.single_by == "smart":
            assert self.pixel_range is not None
            return scale(pixels, smart_size(size, self.side, self.pixel_range), self.scaler, self.resample)
        view = View.parse(self.single_by).resolve(patch)
        r, g, b = (round(255 * m) for m in mean)
        return view.apply(pixels, fill=(r, g, b))[0][0]


def open_image(path: str | Path) -> Image.Image:
    """An image file, decoded.

    Raises:
        DataError: missing, no image, cut short, or too large to be meant.
    """
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image", "check the folder the annotations are relative to") from error
    except Exception as error:  # PIL's decoders raise many kinds
        raise DataError(
            f"{path}: can't be opened as an image ({_first_line(error)})", "replace or remove it"
        ) from error
    return image


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:120] if text else type(error).__name__


def read_image(image: Image.Image) -> NDArray[np.uint8]:
    """``(H, W, 3)`` uint8 RGB.

    Raises:
        DataError: it can't be decoded, is empty, or is thinner than 1 : 200.
    """
    name = getattr(image, "filename", "") or "image"
    try:
        pixels = np.asarray(image.convert("RGB"), dtype=np.uint8)
    except Exception as error:  # PIL's decoders raise many kinds
        raise DataError(f"{name}: can't be decoded ({_first_line(error)})", "replace or remove the image") from error
    height, width = pixels.shape[:2]
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        raise DataError(
            f"{name}: {width} x {height} px can't be cut into tiles",
            f"sides may differ by up to {MAX_ASPECT:.0f} times",
        )
    return pixels


def best_pinpoint(size: Size, pinpoints: tuple[Size, ...]) -> Size:
    """The pinpoint that keeps most of the image's pixels; among equals the one with least padding, then the first.

    Args:
        size: ``(H, W)`` of the image.
        pinpoints: sizes to choose from.
    """
    height, width = size
    best, most, least = pinpoints[0], 0, math.inf
    for target in pinpoints:
        factor = min(target[1] / width, target[0] / height)
        kept = min(int(width * factor) * int(height * factor), width * height)
        wasted = target[0] * target[1] - kept
        if kept > most or (kept == most and wasted < least):
            best, most, least = target, kept, wasted
    return best


def scaled_size(size: Size, target: Size) -> Size:
    """What an image of ``size`` becomes inside ``target``: aspect kept, the other side rounded up."""
    height, width = size
    by_width, by_height = target[1] / width, target[0] / height
    if by_width < by_height:
        return min(math.ceil(height * by_width), target[0]), target[1]
    return target[0], min(math.ceil(width * by_height), target[1])


def unpadded(grid: Size, size: Size) -> tuple[slice, slice]:
    """Rows and columns of a token grid that show image; the same number is cut on both sides.

    Args:
        grid: ``(h, w)`` of all tiles together.
        size: ``(H, W)`` of the image.
    """
    (h, w), (height, width) = grid, size
    if width / height > w / h:
        # Rounded to 7 digits before the fraction is dropped, as transformers does since 4.46: 23.9999999 is 24.
        inner = int(round(height * (w / width), 7))
        cut = (h - inner) // 2
        return slice(cut, h - cut), slice(0, w)
    inner = int(round(width * (h / height), 7))
    cut = (w - inner) // 2
    return slice(0, h), slice(cut, w - cut)


def pack(tokens: Tensor, grid: Size, tiling: Tiling, size: Size | None, newline: Tensor | None) -> Tensor:
    """Projected tokens of one image's tiles as one sequence.

    Args:
        tokens: ``(T, n, D)``, base image first.
        grid: ``(h, w)`` of a tile's projected tokens, n = h * w.
        tiling: how the image was cut.
        size: ``(H, W)`` of the image; may be None where it is single.
        newline: ``(D,)`` after every row of the tiles' grid; None where the model has none.

    Returns:
        ``(m, D)``: the base image's tokens, then the tiles'.

    Raises:
        UsageError: the number of tiles is not the tiling's.
    """
    if tiling.kind == "single":
        if tokens.shape[0] != 1:
            raise UsageError(f"{tokens.shape[0]} tiles where the model takes one", "encode with the model's own tiling")
        return tokens[0]
    if tokens.shape[0] == 1 and tiling.several == "pad":
        return tokens[0] if newline is None else torch.cat([tokens[0], newline.to(tokens)[None]])
    if size is None:
        raise UsageError("anyres needs the image's size to cut its padding away", "give Encoded.size = (H, W)")
    best = best_pinpoint(size, tiling.pinpoints)
    rows, cols = best[0] // tiling.side, best[1] // tiling.side
    if tokens.shape[0] != rows * cols + 1:
        raise UsageError(
            f"{tokens.shape[0]} tiles where an image of {size[1]} x {size[0]} px has {rows * cols + 1}",
            "encode with the model's own tiling",
        )
    (h, w), depth = grid, tokens.shape[-1]
    whole = tokens[1:].reshape(rows, cols, h, w, depth).permute(0, 2, 1, 3, 4).reshape(rows * h, cols * w, depth)
    down, across = unpadded((rows * h, cols * w), size)
    whole = whole[down, across]
    if tiling.max_tiles is not None:
        whole = _within(whole, tiling.max_tiles, h)
    if newline is not None:
        whole = torch.cat([whole, newline.to(whole).expand(whole.shape[0], 1, depth)], dim=1)
    return torch.cat([tokens[0], whole.flatten(0, 1)])


def _within(tokens: Tensor, max_tiles: int, h: int) -> Tensor:
    """``(y, x, D)`` scaled down where it holds over 1.1**2 times ``max_tiles`` tiles (LLaVA-OneVision, llava_arch.py)."""
    y, x, _ = tokens.shape
    ratio = math.sqrt(y * x / (max_tiles * h**2))
    if ratio <= 1.1:
        return tokens
    size = (int(y // ratio), int(x // ratio))
    down = torch.nn.functional.interpolate(tokens.permute(2, 0, 1)[None], size, mode="bilinear")[0]
    return down.permute(1, 2, 0)
