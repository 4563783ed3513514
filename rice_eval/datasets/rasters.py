"""Files of pixels: sizes without decoding, index maps without the traps of image libraries, colour maps."""

from __future__ import annotations

from io import BytesIO
from typing import IO

import numpy as np
from numpy.typing import NDArray

from rice_eval.datasets.archives import DAMAGE
from rice_eval.datasets.base import undecoded
from rice_eval.errors import DataError

__all__ = ["IMAGES", "colour_map", "decode_colours", "decode_indices", "upright_size"]

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Suffixes of image files, lower case."""

_ORIENTATION = 0x0112
"""EXIF tag of the orientation; 5 to 8 turn the image by 90 or 270 degrees (EXIF 2.32, 4.6.4)."""

_WIDTH, _LENGTH = 0x0100, 0x0101
"""Tags of a TIFF's stored size (TIFF 6.0, 8)."""


def upright_size(stream: IO[bytes], label: str) -> tuple[int, int]:
    """Height and width of an image as shown (EXIF orientation applied), from its header alone.

    Raises:
        DataError: no image.
    """
    from PIL import Image as Pil
    from PIL.TiffImagePlugin import TiffImageFile

    try:
        with stream, Pil.open(stream) as opened:
            width, height = opened.size
            # Pillow decodes a whole PNG for the sake of facts that may stand behind its pixels.
            plain = opened.format == "PNG" and not _told_later(stream)
            exif = Pil.Image.getexif(opened) if plain else opened.getexif()
            turned = exif.get(_ORIENTATION, 1) in (5, 6, 7, 8)
            if isinstance(opened, TiffImageFile):
                # Pillow may or may not have turned the size of a TIFF already: the tags say how it is stored.
                width, height = int(opened.tag_v2[_WIDTH]), int(opened.tag_v2[_LENGTH])
    except (*DAMAGE, SyntaxError, ValueError, Pil.DecompressionBombError) as error:
        # The stream may be a member of a zip, which raises as it is read.
        raise DataError(f"{label}: can't be decoded ({undecoded(error)})", "replace the file") from error
    return (width, height) if turned else (height, width)


def _told_later(stream: IO[bytes]) -> bool:
    """Whether a PNG has chunks behind its pixels that may turn it (eXIf, or text that holds EXIF or XMP); lengths and names are read."""
    here = stream.tell()
    stream.seek(8)
    behind = told = False
    while len(head := stream.read(8)) == 8:
        behind = behind or head[4:] == b"IDAT"
        told = told or (behind and head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"))
        stream.seek(int.from_bytes(head[:4], "big") + 4, 1)
    stream.seek(here)
    return told


def decode_indices(data: bytes, label: str) -> NDArray[np.int64]:
    """``(H, W)`` int64 values of an index map: 1, 2, 4, 8 or 16-bit grayscale as stored, or the indices of a palette image.

    Raises:
        DataError: damaged, or a colour picture rather than an index map.
    """
    from PIL import Image as Pil

    try:
        with Pil.open(BytesIO(data)) as opened:
            opened.load()
            if opened.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
                raise DataError(
                    f"{label}: a colour picture (mode {opened.mode}), not a map of class indices",
                    "save it as 8-bit or 16-bit grayscale, or with a palette",
                )
            values = np.asarray(opened).astype(np.int64)
            mode, kind = opened.mode, opened.format
    except (OSError, SyntaxError, ValueError, Pil.DecompressionBombError) as error:
        raise DataError(f"{label}: can't be decoded ({undecoded(error)})", "replace the file") from error
    if values.ndim != 2:
        raise DataError(f"{label}: has {values.ndim} dimensions, not a map of class indices", "save it as grayscale")
    # Pillow stretches 2 and 4-bit grayscale to 0..255; byte 24 of a PNG is its bit depth (PNG 1.2, 4.1.1).
    if mode == "L" and kind == "PNG" and data[24] in (2, 4):
        values //= 255 // (2 ** data[24] - 1)
    return values


def decode_colours(data: bytes, label: str) -> NDArray[np.int64]:
    """``(H, W)`` int64 ``R + 256 G + 65536 B`` of an 8-bit RGB map, as COCO panoptic writes segment ids.

    Raises:
        DataError: damaged, or not 8-bit RGB.
    """
    from PIL import Image as Pil

    try:
        with Pil.open(BytesIO(data)) as opened:
            opened.load()
            # Byte 24 of a PNG is its bit depth: Pillow cuts 16-bit RGB down to 8 without a word.
            if opened.mode != "RGB" or (opened.format == "PNG" and data[24] != 8):
                raise DataError(f"{label}: mode {opened.mode}, not an 8-bit RGB map of segment ids", "fetch it again")
            rgb = np.asarray(opened).astype(np.int64)
    except (OSError, SyntaxError, ValueError, Pil.DecompressionBombError) as error:
        raise DataError(f"{label}: can't be decoded ({undecoded(error)})", "replace the file") from error
    flat: NDArray[np.int64] = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
    return flat


def colour_map(count: int, start: int = 1) -> tuple[tuple[int, int, int], ...]:
    """``count`` distinct colours by the rule of Pascal VOC's devkit (VOClabelcolormap): the bits of the index, spread over RGB.

    Args:
        count: how many.
        start: index of the first; 0 is black, VOC's background.
    """
    colours = []
    for index in range(start, start + count):
        rgb = [0, 0, 0]
        for place in range(8):
            for channel in range(3):
                rgb[channel] |= ((index >> (3 * place + channel)) & 1) << (7 - place)
        colours.append((rgb[0], rgb[1], rgb[2]))
    return tuple(colours)
