"""Pictures of the images that changed most between two records: image, truth, and both predictions side by side."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from rice_eval.report.panel_files import StoredPanel, load_panels, panels_folder
from rice_eval.results.compare import Comparison
from rice_eval.results.store import slug

__all__ = ["MoverPanels", "write_mover_panels"]

_GAP = 6
_LINE = 16


@dataclass(frozen=True)
class MoverPanels:
    """The strips of one comparison.

    Attributes:
        files: one an image, most changed first; the number in the name is the image's place among all by its change.
        missing: images among those that changed most that a record keeps no picture of, most changed first.
        images: test images.
    """

    files: tuple[Path, ...]
    missing: tuple[str, ...]
    images: int

    def sentence(self) -> str:
        """Which images have no picture, and how to get them."""
        names = ", ".join(self.missing[:4]) + (", …" if len(self.missing) > 4 else "")
        return (
            f"no picture of {len(self.missing)} of the images that changed most ({names}), as the records keep pictures of "
            f"some test images only; run both again with --panels {self.images} to have every one"
        )


def write_mover_panels(comparison: Comparison, folder: Path, labels: tuple[str, str], limit: int = 8) -> MoverPanels:
    """Write a PNG strip for each image that both records have a panel of, those that changed most first.

    Args:
        comparison: with all its image movers.
        folder: where the strips go; made where it is missing.
        labels: of the two sides.
        limit: most strips written, and how many of the images that changed most ought to have one.
    """
    first = {p.image_id: p for p in load_panels(panels_folder(comparison.pair.a[0].path))}
    second = {p.image_id: p for p in load_panels(panels_folder(comparison.pair.b[0].path))}
    place = {m.name: k for k, m in enumerate(comparison.images, 1)}
    shared = [name for name in first if name in second]
    shared.sort(key=lambda name: (place.get(name, len(place) + 1), name))
    changes = {m.name: m for m in comparison.images}
    written = []
    for name in shared[:limit]:
        mover = changes.get(name)
        words = name if mover is None else f"{name}: {mover.a:.1f} to {mover.b:.1f} ({mover.difference:+.1f})"
        strip = _strip(first[name], second[name], labels, words)
        folder.mkdir(parents=True, exist_ok=True)
        rank = place.get(name, len(place) + 1)
        path = folder / f"{slug(labels[1])}-{slug(comparison.pair.name)}-{rank:04d}-{slug(name)}.png"
        strip.save(path)
        written.append(path)
    moved = [m.name for m in comparison.images[:limit] if m.difference != 0]
    return MoverPanels(
        files=tuple(written),
        missing=tuple(name for name in moved if name not in first or name not in second),
        images=comparison.pair.record.task.n_test,
    )


def _strip(a: StoredPanel, b: StoredPanel, labels: tuple[str, str], words: str) -> Image.Image:
    tiles: list[tuple[str, bytes]] = [
        (str(tile.role), tile.data) for tile in a.tiles if tile.role in ("image", "truth")
    ]
    for panel, label in ((a, labels[0]), (b, labels[1])):
        tiles += [(label, tile.data) for tile in panel.tiles if tile.role == "prediction"]
    pictures = [(caption, Image.open(io.BytesIO(data)).convert("RGB")) for caption, data in tiles]
    width = sum(p.width for _, p in pictures) + _GAP * (len(pictures) + 1)
    height = max(p.height for _, p in pictures) + 2 * _LINE + 2 * _GAP
    strip = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(strip)
    draw.text((_GAP, 2), _plain(words), fill="black")
    x = _GAP
    for caption, picture in pictures:
        draw.text((x, _LINE + 2), _plain(caption)[: max(1, picture.width // 6)], fill="black")
        strip.paste(picture, (x, 2 * _LINE + _GAP))
        x += picture.width + _GAP
    return strip


def _plain(text: str) -> str:
    """Text that Pillow's built-in font can draw: one line of Latin-1."""
    return " ".join(text.split()).encode("latin-1", "replace").decode("latin-1")
