"""Write ``scenes`` to a folder in COCO's layout, so that other tools can read it too.

::

    DIR/scenes.json                          what made it, and a sha256 of every file
    DIR/{train,val}/000000.png               images
    DIR/view_b/{train,val}/000000.png        the other rendering of each scene
    DIR/annotations/instances_{split}.json   COCO instances: boxes, compressed run lengths, names, colours, distances
    DIR/annotations/panoptic_{split}.json    COCO panoptic, with its PNGs in panoptic_{split}/
    DIR/annotations/text_{split}.json        a transcript and a polygon a sign, as COCO captions are laid out
    DIR/annotations/questions_{split}.json   questions with answers
    DIR/annotations/correspondences_{split}.json   matched points of both renderings
    DIR/annotations/depth_{split}/000000.png distances in 1/1000, 16 bits
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pil

from rice_eval.datasets import scenes_rle
from rice_eval.datasets.scenes import Scenes
from rice_eval.datasets.scenes_facts import FORMAT, annotation_id, check_numbers
from rice_eval.datasets.scenes_layout import GENERATOR
from rice_eval.datasets.scenes_pack import SPLITS, pack
from rice_eval.datasets.scenes_questions import questions
from rice_eval.datasets.scenes_render import Scene, matches
from rice_eval.errors import DataError, UsageError

__all__ = ["write_scenes"]

Progress = Callable[[str, int, int], None]
"""Called as ``progress(split, done, total)`` after each scene."""


class _Folder:
    """Files of a folder in the making, with their checksums."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sums: dict[str, str] = {}

    def put(self, name: str, data: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.sums[name] = hashlib.sha256(data).hexdigest()

    def png(self, name: str, pixels: np.ndarray[Any, Any]) -> None:
        import io

        out = io.BytesIO()
        Pil.fromarray(pixels).save(out, "PNG")
        self.put(name, out.getvalue())

    def json(self, name: str, value: object) -> None:
        self.put(name, (json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n").encode())


def _info(seed: int, split: str) -> dict[str, Any]:
    return {
        "description": f"scenes, generator {GENERATOR}, seed {seed}, split {split}",
        "version": str(GENERATOR),
        "contributor": "rice-eval",
    }


_LICENSES = [
    {
        "id": 1,
        "name": "Sprites: MIT (Microsoft Fluent emoji). Photos: CC0-1.0 and public domain. See NOTICE.",
        "url": "",
    }
]


def _objects(scene: Scene, index: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The scene's entries of ``instances`` and of ``text``."""
    shapes, texts = [], []
    for thing in scene.objects:
        x0, y0, x1, y1 = thing.box
        number = annotation_id(index, thing.owner)
        box = [x0, y0, x1 - x0, y1 - y0]
        shapes.append(
            {
                "id": number,
                "image_id": index,
                "category_id": thing.label + 1,
                "bbox": box,
                "area": thing.area,
                "iscrowd": 0,
                "segmentation": {
                    "size": list(scene.owner.shape),
                    "counts": scenes_rle.encode(scene.owner == thing.owner).decode("ascii"),
                },
                "name": thing.name,
                "colour": thing.colour,
                "distance": thing.distance,
                "object": thing.index,
            }
        )
        if thing.polygon is not None:
            polygon = [float(value) for value in thing.polygon.ravel()]
            texts.append(
                {"id": number, "image_id": index, "caption": thing.text, "polygon": polygon, "legible": thing.legible}
            )
    return shapes, texts


def _panoptic(scene: Scene, index: int, background: int) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """The scene's entry of ``panoptic`` and its PNG; a segment's id is ``R + 256 G + 65536 B``."""
    ids = np.zeros(256, np.int64)
    ids[0] = annotation_id(index, 15)  # objects are numbered from 1 and fewer than 15
    segments = []
    rest = scene.owner == 0
    if rest.any():
        rows, columns = np.flatnonzero(rest.any(1)), np.flatnonzero(rest.any(0))
        box = [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1]
        segments.append(
            {"id": int(ids[0]), "category_id": background, "bbox": box, "area": int(rest.sum()), "iscrowd": 0}
        )
    for thing in scene.objects:
        ids[thing.owner] = annotation_id(index, thing.owner)
        x0, y0, x1, y1 = thing.box
        segments.append(
            {
                "id": int(ids[thing.owner]),
                "category_id": thing.label + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": thing.area,
                "iscrowd": 0,
            }
        )
    code = ids[scene.owner]
    picture = np.stack([code & 255, code >> 8 & 255, code >> 16 & 255], axis=-1).astype(np.uint8)
    entry = {"image_id": index, "file_name": f"{index:06d}.png", "segments_info": segments}
    return entry, picture


def _write_split(folder: _Folder, data: Scenes, progress: Progress | None) -> None:
    split, side = data.split, data.side
    background = len(data.things) + 1
    categories: list[dict[str, Any]] = [
        {"id": k + 1, "name": name, "supercategory": "text" if name == "sign" else "thing"}
        for k, name in enumerate(data.things)
    ]
    images: list[dict[str, Any]] = []
    shapes: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    panoptic: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    for index in range(len(data)):
        scene, other = data.scene(index), data.other(index)
        stem = data.image_id(index)
        images.append({"id": index, "file_name": f"{stem}.png", "width": side, "height": side, "license": 1})
        folder.png(f"{split}/{stem}.png", scene.image)
        folder.png(f"view_b/{split}/{stem}.png", other.image)
        folder.png(
            f"annotations/depth_{split}/{stem}.png", np.rint(scene.depth().astype(np.float64) * 1000).astype(np.uint16)
        )
        found = _objects(scene, index)
        shapes += found[0]
        texts += found[1]
        entry, picture = _panoptic(scene, index, background)
        panoptic.append(entry)
        folder.png(f"annotations/panoptic_{split}/{stem}.png", picture)
        for k, question in enumerate(questions(scene, data.seed, split, index)):
            asked.append(
                {
                    "id": index * 8 + k + 1,
                    "image_id": index,
                    "kind": question.kind,
                    "question": question.question,
                    "answer": question.answer,
                    "box": list(question.box) if question.box else None,
                }
            )
        here, there, which = matches(scene, other, data.seed, split, index)
        points.append({"image_id": index, "here": here.tolist(), "there": there.tolist(), "object": which.tolist()})
        if progress is not None:
            progress(split, index + 1, len(data))
    head = {"info": _info(data.seed, split), "licenses": _LICENSES, "images": images}
    kinds: list[dict[str, Any]] = [{**category, "isthing": 1} for category in categories]
    stuff: list[dict[str, Any]] = [{"id": background, "name": "background", "supercategory": "stuff", "isthing": 0}]
    folder.json(f"annotations/instances_{split}.json", {**head, "categories": categories, "annotations": shapes})
    folder.json(f"annotations/panoptic_{split}.json", {**head, "categories": kinds + stuff, "annotations": panoptic})
    folder.json(f"annotations/text_{split}.json", {**head, "annotations": texts})
    folder.json(f"annotations/questions_{split}.json", {**head, "annotations": asked})
    folder.json(f"annotations/correspondences_{split}.json", {**head, "annotations": points})


def write_scenes(
    out: Path, n_train: int, n_val: int, size: int = 224, seed: int = 0, progress: Progress | None = None
) -> Path:
    """Write both splits under ``out``; the folder appears whole or not at all.

    The pixels and annotations are the same everywhere; the bytes of the PNGs too, wherever Pillow's zlib is the same.

    Args:
        out: a folder that does not exist yet, or is empty.
        n_train, n_val: scenes a split.
        size: side of the images in pixels.
        seed: which set of scenes.
        progress: called after each scene.

    Raises:
        UsageError: ``out`` holds something, or a number is out of range.
        DataError: the disk is full or can't be written.
    """
    out = Path(out)
    for split, n in zip(SPLITS, (n_train, n_val)):
        check_numbers(split, n, size, seed)
    partial = out.absolute().parent / f".{out.absolute().name}.partial-{os.getpid()}"
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"--out {out}: is not an empty folder", "name one that does not exist yet")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        folder = _Folder(partial)
        for split, n in zip(SPLITS, (n_train, n_val)):
            _write_split(folder, Scenes(split, n, size, seed), progress)
        about = {
            "dataset": "scenes",
            "format": FORMAT,
            "generator": GENERATOR,
            "assets": pack().fingerprint,
            "size": size,
            "seed": seed,
            "splits": {"train": n_train, "val": n_val},
            "files": folder.sums,
        }
        (partial / "scenes.json").write_text(json.dumps(about, indent=0) + "\n", encoding="ascii")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise DataError(
            f"--out {out}: can't be written ({error.strerror or error})", "free some space, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out
