"""Panels on disk: a folder beside the record, with small WebP pictures and an ``index.jsonl`` that lists them.

The folder of ``linear-0123.json`` is ``linear-0123.panels/``. It is written under another name and renamed, so a folder with
an index is complete. The index has one panel a line (and not the suffix of a record, which it must not be taken for)::

    {"format": 1, "image_id": "000123", "index": 4, "note": "91.3 % of pixels right",
     "legend": [{"name": "cup", "color": [200, 40, 40]}],
     "tiles": [{"role": "image", "file": "0000-image.webp", "width": 224, "height": 224, "sha256": "…"}]}
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image as Pil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rice_eval.errors import RecordError
from rice_eval.report.panels import PanelPicture, Role, Tile

__all__ = [
    "ANALYSIS",
    "INDEX",
    "StoredPanel",
    "StoredTile",
    "load_analysis",
    "load_panels",
    "panels_folder",
    "save_analysis",
    "save_panels",
]

ANALYSIS = "analysis.jsonl"
INDEX = "index.jsonl"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Legend(_Strict):
    name: str
    color: tuple[int, int, int]


class StoredTile(_Strict):
    """A picture on disk; ``data`` holds its bytes once ``load_panels`` has read and checked them."""

    role: Role
    file: str = Field(pattern=r"^[0-9a-z][0-9a-z-]*\.webp$")
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    sha256: str
    data: bytes = Field(default=b"", exclude=True)


class StoredPanel(_Strict):
    """The strip of one test image, on disk."""

    format: Literal[1] = 1
    image_id: str
    index: int
    note: str
    legend: tuple[_Legend, ...]
    tiles: tuple[StoredTile, ...]


def panels_folder(record: Path) -> Path:
    """Where the panels of the record file ``record`` lie."""
    return record.with_name(record.stem + ".panels")


def save_panels(folder: Path, panels: Sequence[PanelPicture]) -> Path:
    """Write panels into ``folder``, replacing what is there. Equal pictures give equal bytes with one version of Pillow.

    Photos are WebP at quality 80, flat pictures are lossless WebP.

    Raises:
        RecordError: the folder can't be written.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        stored = [
            StoredPanel(
                image_id=panel.image_id,
                index=panel.index,
                note=panel.note,
                legend=tuple(_Legend(name=entry.name, color=entry.color) for entry in panel.legend),
                tiles=tuple(_write(partial, f"{k:04d}-{tile.role}.webp", tile) for tile in panel.tiles),
            )
            for k, panel in enumerate(panels)
        ]
        lines = [json.dumps(panel.model_dump(mode="json"), ensure_ascii=False) + "\n" for panel in stored]
        (partial / INDEX).write_text("".join(lines), encoding="utf-8")
        for last in (False, False, True):
            # Another run may put its pictures of the same record there in between.
            shutil.rmtree(folder, ignore_errors=True)
            try:
                os.replace(partial, folder)
                break
            except OSError as error:
                if last or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free some space and run the same command again" if full else "give another folder, or mend this one"
        raise RecordError(f"{folder}: the pictures can't be written ({error.strerror or error})", fix) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def load_panels(folder: Path) -> list[StoredPanel]:
    """Read the panels of ``folder``; an empty list where there is no finished folder.

    Raises:
        RecordError: an index that does not fit the format, or a picture that is missing or changed.
    """
    index = folder / INDEX
    if not index.is_file():
        return []
    remedy = "run the task again, or delete the folder"
    try:
        lines = index.read_bytes().split(b"\n")
        panels = [StoredPanel.model_validate_json(line) for line in lines if line]
    except (ValidationError, OSError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        where = f"{'.'.join(str(p) for p in first['loc'])}: {first['msg']}" if first else str(error)
        raise RecordError(f"{index} is not an index of panels ({where})", remedy) from error
    loaded = []
    for panel in panels:
        tiles = []
        for tile in panel.tiles:
            try:
                data = (folder / tile.file).read_bytes()
            except OSError as error:
                raise RecordError(f"{folder / tile.file} can't be read ({error.strerror})", remedy) from error
            if hashlib.sha256(data).hexdigest() != tile.sha256:
                raise RecordError(f"{folder / tile.file} is not the picture that {INDEX} lists", remedy)
            tiles.append(tile.model_copy(update={"data": data}))
        loaded.append(panel.model_copy(update={"tiles": tuple(tiles)}))
    return loaded


def save_analysis(folder: Path, analysis: Mapping[str, Any]) -> Path:
    """Write ``analysis.jsonl`` into a folder of panels: one line, its sha256 and plain JSON values. Call it after ``save_panels``.

    Raises:
        RecordError: the folder can't be written.
    """
    text = json.dumps(analysis, sort_keys=True, separators=(",", ":"), allow_nan=False)
    line = json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "analysis": text})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{ANALYSIS}.{os.getpid()}.tmp"
        partial.write_text(line + "\n", encoding="utf-8")
        os.replace(partial, folder / ANALYSIS)
    except OSError as error:
        raise RecordError(f"{folder}: can't be written ({error.strerror or error})", "give another folder") from error
    return folder / ANALYSIS


def load_analysis(folder: Path) -> dict[str, Any] | None:
    """What ``save_analysis`` wrote; None where there is nothing.

    Raises:
        RecordError: a file that is damaged.
    """
    source = folder / ANALYSIS
    if not source.is_file():
        return None
    try:
        entry = json.loads(source.read_text(encoding="utf-8"))
        if hashlib.sha256(entry["analysis"].encode()).hexdigest() != entry["sha256"]:
            raise ValueError("its checksum does not match")
        found: dict[str, Any] = json.loads(entry["analysis"])
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{source} is damaged ({error})", "run the task again, or delete the folder") from error


def _write(folder: Path, name: str, tile: Tile) -> StoredTile:
    buffer = io.BytesIO()
    options = {"lossless": True, "quality": 90, "exact": True} if tile.flat else {"quality": 80}
    Pil.fromarray(tile.picture).save(buffer, "WEBP", method=3, **options)
    data = buffer.getvalue()
    (folder / name).write_bytes(data)
    height, width = tile.picture.shape[:2]
    return StoredTile(role=tile.role, file=name, width=width, height=height, sha256=hashlib.sha256(data).hexdigest())
