"""COCO panoptic read as semantic segmentation: 133 categories, or their 27 supercategories.

Layout (https://cocodataset.org/#format-data, section 4): ``annotations/panoptic_{split}.json``, a PNG an image whose pixels
hold segment ids as ``R + 256 G + 65536 B`` in ``annotations/panoptic_{split}/`` (or in the zip of that name, as shipped), and
images in ``{split}/`` or ``images/{split}/`` (or ``{split}.zip``).

Segments of a crowd keep their category, as in the panoptic API's own conversion to semantic segmentation: a crowd of people
is person everywhere inside. Id 0 is void and becomes ``IGNORE``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rice_eval.datasets.base import IGNORE, Dataset, DatasetOptions, Labels, check_options
from rice_eval.datasets.files import FileDataset, need_files
from rice_eval.datasets.rasters import colour_map, decode_colours
from rice_eval.datasets.storage import Storage, open_storage
from rice_eval.errors import DataError

__all__ = ["CocoPanoptic", "PanopticOptions", "factory"]

LAYOUT = "annotations/panoptic_{split}.json, annotations/panoptic_{split}/*.png, {split}/*.jpg"


class PanopticOptions(DatasetOptions):
    """``classes``: every category (``all``) or the supercategories (``super``)."""

    classes: Literal["all", "super"] = "all"


class CocoPanoptic(FileDataset):
    """One split. Classes follow the ids of the categories; supercategories the first category of each."""

    provides = frozenset({"semantic"})

    def __init__(self, split: str, storage: Storage, options: PanopticOptions) -> None:
        layout = LAYOUT.replace("{split}", split)
        source = f"annotations/panoptic_{split}.json"
        folder = f"annotations/panoptic_{split}"
        content = storage.json(source)
        if not storage.is_folder(folder):
            storage.mount_archive(f"{folder}.zip", "annotations")
        if not storage.is_folder(folder):
            raise DataError(f"{storage.label(folder)}: no such folder of PNGs", f"expected layout: {layout}")
        try:
            categories = sorted(content["categories"], key=lambda c: int(c["id"]))
            names = [str(c["name" if options.classes == "all" else "supercategory"]) for c in categories]
            self.classes = tuple(dict.fromkeys(names))
            indices = {int(c["id"]): self.classes.index(name) for c, name in zip(categories, names)}
            images = {int(image["id"]): image for image in content["images"]}
            annotations = sorted(content["annotations"], key=lambda a: int(a["image_id"]))
            files = [str(images[int(a["image_id"])]["file_name"]) for a in annotations]
            sizes = [(int(i["height"]), int(i["width"])) for i in (images[int(a["image_id"])] for a in annotations)]
            self.maps = tuple(f"{folder}/{a['file_name']}" for a in annotations)
            segments = [
                [(int(s["id"]), indices[int(s["category_id"])]) for s in a["segments_info"]] for a in annotations
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{storage.label(source)}: not a COCO panoptic annotation file ({type(error).__name__}: {error})",
                "fetch annotations/panoptic_{train,val}2017.json of COCO 2017, or mend the entry",
            ) from error
        if options.classes == "all" and len(self.classes) != len(categories):
            raise DataError(f"{storage.label(source)}: two categories share a name", "rename one of them")
        unlabelled = len(images.keys() - {int(a["image_id"]) for a in annotations})
        if unlabelled:
            raise DataError(
                f"{storage.label(source)}: {unlabelled} of {len(images)} images have no panoptic annotation",
                "remove them from 'images', or fetch the whole file again",
            )
        self.palette = colour_map(len(self.classes))
        # Flat arrays: a hundred thousand small dicts would weigh down every worker.
        self._starts = np.cumsum([0, *(len(s) for s in segments)])
        self._segments = np.array([pair for s in segments for pair in s], dtype=np.int64).reshape(-1, 2)
        where = image_folder(storage, split, files, layout)
        super().__init__(
            "coco-panoptic",
            split,
            storage,
            [f"{where}/{name}" for name in files],
            annotations=[source],
            maps=self.maps,
            facts={"options": options.model_dump(), "crowd": "keeps its category", "void": 0},
            sizes=sizes,
        )
        need_files(storage, self.images, "image", layout)
        need_files(storage, self.maps, "panoptic map", layout)

    def semantic(self, index: int) -> Labels:
        """See ``Dataset``. Raises DataError where the map is damaged, of another size, or holds an unlisted segment."""
        name = self.maps[index]
        ids = decode_colours(self.storage.read(name), self.storage.label(name))
        height, width = self.size(index)
        if ids.shape != (height, width):
            raise DataError(
                f"{self.storage.label(name)}: {ids.shape[1]}x{ids.shape[0]} pixels, but its image has {width}x{height}",
                "fetch the map and the image of the same release",
            )
        segments = self._segments[self._starts[index] : self._starts[index + 1]]
        table = np.concatenate([[[0, IGNORE]], segments[np.argsort(segments[:, 0])]])
        places = np.minimum(np.searchsorted(table[:, 0], ids), len(table) - 1)
        unknown = ids[table[places, 0] != ids]
        if unknown.size:
            raise DataError(
                f"{self.storage.label(name)}: segment {int(unknown[0])} is not in segments_info of its annotation",
                "fetch the maps and the annotation file of the same release",
            )
        labels: Labels = table[places, 1]
        return labels


def image_folder(storage: Storage, split: str, files: list[str], layout: str) -> str:
    """The folder that holds a COCO split's images: ``{split}``, ``images/{split}``, or ``{split}.zip`` mounted at the root."""
    candidates = (split, f"images/{split}", "images")
    for _ in range(2):
        for folder in candidates:
            if any(storage.exists(f"{folder}/{name}") for name in files[:1]):
                return folder
        if not storage.mount_archive(f"{split}.zip"):
            break
    for folder in candidates:
        if storage.is_folder(folder):
            return folder
    raise DataError(f"{storage.label(split)}: no such folder of images", f"expected layout: {layout}")


def factory(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``coco-panoptic``: splits by their file's name (``train2017``, ``val2017``); options ``classes=all|super``."""
    chosen = check_options("coco-panoptic", PanopticOptions, options)
    layout = LAYOUT.replace("{split}", split)
    storage = open_storage(data, "coco-panoptic", layout)
    return CocoPanoptic(split, storage.rooted([f"annotations/panoptic_{split}.json"], "coco-panoptic", layout), chosen)
