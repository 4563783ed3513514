"""Pictures of the images that changed most between two records: image, truth, and both predictions side by side."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageDraw

from rice_eval.report.panel_files import StoredPanel, load_panels, panels_folder
from rice_eval.results.compare import Comparison
from rice_eval.results.store import slug

__all__ = ["write_mover_panels"]

_GAP = 6
_LINE = 16


def write_mover_panels(comparison: Comparison, folder: Path, labels: tuple[str, str], limit: int = 8) -> list[Path]:
    """Write a PNG strip for each image that both records have a panel of, those that changed most first.

    Args:
        comparison: with its image movers.
        folder: where the strips go; made where it is missing.
        labels: of the two sides.
        limit: most strips written.

    Returns:
        the files, most changed first; empty where the records share no panel.
    """
    first = {p.image_id: p for p in load_panels(panels_folder(comparison.pair.a[0].path))}
    second = {p.image_id: p for p in load_panels(panels_folder(comparison.pair.b[0].path))}
    order = [m.name for m in comparison.images]
    shared = [name for name in first if name in second]
    shared.sort(key=lambda name: (order.index(name) if name in order else len(order), name))
    changes = {m.name: m for m in comparison.images}
    written = []
    for rank, name in enumerate(shared[:limit], 1):
        mover = changes.get(name)
        words = name if mover is None else f"{name}: {mover.a:.1f} to {mover.b:.1f} ({mover.difference:+.1f})"
        strip = _strip(first[name], second[name], labels, words)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{slug(labels[1])}-{slug(comparison.pair.name)}-{rank:02d}-{slug(name)}.png"
        strip.save(path)
        written.append(path)
    return written


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
