"""The packed assets of ``scenes``: sprites, backgrounds and glyph sheets, decoded on first use.

Every asset is a PNG (lossless, so decoded alike by every version of every decoder) inside one zip; ``manifest.json`` names
each with its class, split and licence. No font engine runs when scenes are made: glyphs were rasterised once, when the
assets were built, since engines differ in their last bits.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pil

from rice_eval.errors import DataError

__all__ = ["ASSETS", "SPLITS", "Font", "Pack", "Sprite", "halve", "pack"]

ASSETS = Path(__file__).parent / "scenes_assets"
SPLITS = ("train", "val")
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Sprite:
    """One cut-out: ``label`` indexes the thing classes, ``code_point`` is its Unicode name in hex."""

    name: str
    label: int
    code_point: str
    file: str


@dataclass(frozen=True)
class Font:
    """A glyph sheet: ``glyphs[char]`` is ``(left, width, bearing, advance)`` in pixels of the sheet."""

    name: str
    file: str
    glyphs: dict[str, tuple[int, int, int, int]]


def halve(image: Bytes) -> Bytes:
    """``(H, W, C)`` -> ``(ceil(H/2), ceil(W/2), C)``: means of 2 x 2 pixels, halves rounded up; edges are repeated.

    With four channels the last is opacity, and colours are weighted by it, so that clear pixels lend no colour.
    """
    height, width, channels = image.shape
    padded = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge").astype(np.int32)
    quads = padded.reshape((height + 1) // 2, 2, (width + 1) // 2, 2, channels).swapaxes(1, 2).reshape(-1, 4, channels)
    shape = ((height + 1) // 2, (width + 1) // 2, channels)
    if channels != 4:
        plain: Bytes = ((quads.sum(1) + 2) >> 2).astype(np.uint8).reshape(shape)
        return plain
    weight = quads[..., 3:]
    total = weight.sum(1)
    colour = ((quads[..., :3] * weight).sum(1) + (total >> 1)) // np.maximum(total, 1)
    return np.concatenate([colour, (total + 2) >> 2], axis=1).astype(np.uint8).reshape(shape)


@dataclass
class Pack:
    """The manifest, and decoded assets by file, each as a pyramid of halvings."""

    classes: tuple[str, ...]
    sprites: dict[str, tuple[tuple[Sprite, ...], ...]]
    backgrounds: dict[str, tuple[str, ...]]
    fonts: dict[str, tuple[Font, ...]]
    fingerprint: str
    glyph_em: int
    _raw: dict[str, bytes]
    _levels: dict[str, tuple[Bytes, ...]] = field(default_factory=dict)

    def pyramid(self, file: str) -> tuple[Bytes, ...]:
        """Levels of one asset: the asset itself, then halvings down to 8 pixels on the short side.

        Sprites are ``(H, W, 4)`` with straight (not premultiplied) opacity, backgrounds ``(H, W, 3)``, glyphs ``(H, W, 1)``.
        """
        if file not in self._levels:
            pixels = np.asarray(Pil.open(io.BytesIO(self._raw[file])))
            if pixels.ndim == 2:
                pixels = pixels[..., None]
            if file.startswith("backgrounds/") and pixels.shape[2] == 1:
                pixels = np.repeat(pixels, 3, axis=2)
            levels = [pixels]
            while not file.startswith("glyphs/") and min(levels[-1].shape[:2]) >= 16:
                levels.append(halve(levels[-1]))
            self._levels[file] = tuple(levels)
        return self._levels[file]


@lru_cache(maxsize=1)
def pack() -> Pack:
    """The assets that came with the package.

    Raises:
        DataError: they are missing, or differ from the manifest's checksum.
    """
    fix = "reinstall rice-eval"
    try:
        text = (ASSETS / "manifest.json").read_bytes()
        blob = (ASSETS / "assets.zip").read_bytes()
    except OSError as error:
        raise DataError(f"{error.filename}: can't be read ({error.strerror})", fix) from error
    manifest: dict[str, Any] = json.loads(text)
    if hashlib.sha256(blob).hexdigest() != manifest["assets_sha256"]:
        raise DataError(f"{ASSETS / 'assets.zip'}: its checksum is not the manifest's", fix)
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        raw = {name: archive.read(name) for name in archive.namelist()}
    classes = tuple(manifest["classes"])
    sprites: dict[str, list[list[Sprite]]] = {split: [[] for _ in classes] for split in SPLITS}
    for entry in manifest["sprites"]:
        label = classes.index(entry["class"])
        sprites[entry["split"]][label].append(Sprite(entry["name"], label, entry["code_point"], entry["file"]))
    return Pack(
        classes=classes,
        sprites={split: tuple(tuple(group) for group in groups) for split, groups in sprites.items()},
        backgrounds={s: tuple(b["file"] for b in manifest["backgrounds"] if b["split"] == s) for s in SPLITS},
        fonts={
            s: tuple(
                Font(f["name"], f["file"], {c: (g[0], g[1], g[2], g[3]) for c, g in f["glyphs"].items()})
                for f in manifest["fonts"]
                if f["split"] == s
            )
            for s in SPLITS
        },
        fingerprint=hashlib.sha256(text).hexdigest(),
        glyph_em=int(manifest["glyph_em_px"]),
        _raw=raw,
    )
