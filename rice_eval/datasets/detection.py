"""Detection in COCO's JSON: COCO instances, LVIS (federated), and any set in COCO format.

Boxes ``[x, y, w, h]`` become xyxy; labels are indices into ``things``, the categories by ascending id. Boxes of no width or
height and boxes that reach over the border are kept as they are (COCO itself holds some); negative sizes and NaN are errors.
"""

from __future__ import annotations

import importlib.util
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rice_eval.datasets.base import Dataset, DatasetOptions, Instances, check_options
from rice_eval.datasets.coco_panoptic import image_folder
from rice_eval.datasets.files import FileDataset, need_files, need_split
from rice_eval.datasets.storage import Storage, open_storage
from rice_eval.errors import DataError, MissingExtraError, UsageError
from rice_eval.metrics.runs import check_runs, decode_runs

__all__ = ["CocoDetection", "Federated", "Lvis", "coco", "coco_format", "lvis"]


class MaskOptions(DatasetOptions):
    """``masks``: whether instance masks are read; boxes alone need no extra package."""

    masks: bool = True


class CocoDetection(FileDataset):
    """One split in COCO format.

    Args:
        name: the registry's name.
        split: the split's own name.
        storage: where the files lie.
        source: the annotation file.
        content: what it holds.
        paths: a file name an image, relative to the storage, in the order of ``content["images"]`` by ascending id.
        masks: whether to read masks.
        layout: the expected layout in one line.
        dropped: category ids to leave out (placeholders that no annotation uses).

    Attributes:
        category_ids: the file's id of each thing, for evaluators that want them.
        image_keys: the file's id of each image.
    """

    provides = frozenset({"instances"})

    def __init__(
        self,
        name: str,
        split: str,
        storage: Storage,
        source: str,
        content: Any,
        paths: Sequence[str],
        masks: bool,
        layout: str,
        dropped: frozenset[int] = frozenset(),
    ) -> None:
        label = storage.label(source)
        try:
            categories = sorted(content["categories"], key=lambda c: int(c["id"]))
            categories = [c for c in categories if int(c["id"]) not in dropped]
            self.category_ids = tuple(int(c["id"]) for c in categories)
            self.things = tuple(str(c["name"]) for c in categories)
            images = sorted_images(content)
            self.image_keys = tuple(int(image["id"]) for image in images)
            sizes = [(int(image["height"]), int(image["width"])) for image in images]
            self._read(content["annotations"], label, masks)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{label}: not a COCO annotation file ({type(error).__name__}: {error})",
                "it needs images (id, file_name, height, width), categories (id, name) and annotations "
                "(id, image_id, category_id, bbox)",
            ) from error
        for what, ids in (("categories", self.category_ids), ("images", self.image_keys)):
            if len(set(ids)) != len(ids):
                raise DataError(f"{label}: two {what} share an id", "give each its own id")
        for key, (height, width) in zip(self.image_keys, sizes):
            if height < 1 or width < 1:
                raise DataError(f"{label}: image {key} has {width}x{height} pixels", "mend the entry")
        need_files(storage, paths, "image", layout)
        facts = {"masks": self._rings is not None, "categories": self.category_ids}
        super().__init__(name, split, storage, paths, annotations=[source], facts=facts, sizes=sizes)

    def _read(self, annotations: Sequence[Mapping[str, Any]], label: str, masks: bool) -> None:
        """Annotations as flat arrays in the order of the images: a million small objects would weigh down every worker."""
        place = {key: index for index, key in enumerate(self.image_keys)}
        index_of = {key: index for index, key in enumerate(self.category_ids)}
        owners = np.array([place.get(int(a["image_id"]), -1) for a in annotations], dtype=np.int64)
        labels = np.array([index_of.get(int(a["category_id"]), -1) for a in annotations], dtype=np.int64)
        for key, known in (("image", owners), ("category", labels)):
            if (known < 0).any():
                entry = annotations[int(np.argmax(known < 0))]
                raise DataError(
                    f"{label}: annotation {entry['id']} is of {key} {entry[key + '_id']}, which the file does not list",
                    "mend the annotation",
                )
        odd = [a for a in annotations if len(a["bbox"]) != 4]
        boxes = np.array([a["bbox"] for a in annotations] if not odd else [], dtype=np.float64).reshape(-1, 4)
        bad = ~np.isfinite(boxes).all(1) | (boxes[:, 2:] < 0).any(1)
        if odd or bad.any():
            entry = odd[0] if odd else annotations[int(np.argmax(bad))]
            raise DataError(
                f"{label}: annotation {entry['id']} has the box {entry['bbox']}", "a box is [x, y, width, height]"
            )
        order = np.argsort(owners, kind="stable")
        sorted_ = [annotations[i] for i in order]
        counts = np.bincount(owners, minlength=len(place))
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        stated = [a.get("area") for a in sorted_]
        areas = [a["bbox"][2] * a["bbox"][3] if area is None else area for a, area in zip(sorted_, stated)]
        self._area = np.array(areas, dtype=np.float64)
        wrong = ~(self._area >= 0)  # NaN too, which every range of areas would count
        if wrong.any():
            entry = sorted_[int(np.argmax(wrong))]
            raise DataError(
                f"{label}: annotation {entry['id']} has the area {entry['area']}",
                "an area is zero or more square pixels",
            )
        boxes[:, 2:] += boxes[:, :2]
        self._boxes, self._labels = boxes[order], labels[order]
        self._crowd = np.array([bool(a.get("iscrowd", 0)) for a in sorted_], dtype=np.bool_)
        self._ids = np.array([int(a["id"]) for a in sorted_], dtype=np.int64)
        if len(np.unique(self._ids)) != len(self._ids):
            raise DataError(f"{label}: two annotations share an id", "give each its own id")
        self._rings: list[Any] | None = None
        drawn = [bool(a.get("segmentation")) for a in sorted_]
        if not masks or not any(drawn):
            return
        if not all(drawn):
            raise DataError(
                f"{label}: {drawn.count(False)} of {len(drawn)} annotations have no segmentation",
                "add them, or pass the option masks=false to read boxes alone",
            )
        if importlib.util.find_spec("pycocotools") is None:
            raise MissingExtraError.of("pycocotools", "detection", "instance masks (boxes alone: option masks=false)")
        self._rings = [_compact(a["segmentation"]) for a in sorted_]

    def instances(self, index: int) -> Instances:
        """See ``Dataset``. ``area`` is what the file states, of the box where it states none."""
        span = slice(int(self._starts[index]), int(self._starts[index + 1]))
        masks = None
        if self._rings is not None:
            height, width = self.size(index)
            what = f"{self.storage.label(self._annotations[0])}: annotation"
            masks = tuple(
                encode(ring, height, width, f"{what} {key}") for ring, key in zip(self._rings[span], self._ids[span])
            )
        return Instances(
            boxes=self._boxes[span].copy(),
            labels=self._labels[span].copy(),
            masks=masks,
            crowd=self._crowd[span].copy(),
            area=self._area[span].copy(),
            ids=self._ids[span].copy(),
        )


def sorted_images(content: Any) -> list[Mapping[str, Any]]:
    """The images of a COCO file by ascending id."""
    return sorted(content["images"], key=lambda image: int(image["id"]))


def _compact(segmentation: Any) -> Any:
    """Polygons as arrays instead of lists of floats, an eighth of the memory; run lengths as they are."""
    return segmentation if isinstance(segmentation, dict) else [np.asarray(ring, np.float64) for ring in segmentation]


def encode(segmentation: Any, height: int, width: int, label: str) -> Mapping[str, Any]:
    """Polygons, or run lengths of any kind, as COCO's compressed run lengths, by pycocotools.

    All is looked at before: pycocotools loops without end over a mask whose runs are too few, and crashes on points far away.

    Raises:
        DataError: a polygon that is none, or run lengths of another size, or that don't fill it.
    """
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, dict):
        if list(segmentation.get("size", ())) != [height, width]:
            raise DataError(
                f"{label}: its mask is {segmentation.get('size')}, its image {[height, width]}", "mend the annotation"
            )
        counts = segmentation.get("counts")
        try:
            runs = counts if isinstance(counts, list) else decode_runs(counts)
            check_runs(runs, height, width)
        except ValueError as error:
            raise DataError(f"{label}: malformed run lengths ({error})", "mend the annotation") from error
        if isinstance(counts, list):
            return dict(coco_mask.frPyObjects(segmentation, height, width))
        return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
    if any(ring.ndim != 1 or len(ring) < 6 or len(ring) % 2 for ring in segmentation):
        raise DataError(f"{label}: a polygon of fewer than three points", "mend or remove the polygon")
    if not all((np.abs(ring) < FARTHEST).all() for ring in segmentation):
        raise DataError(f"{label}: a polygon with a point that is no place in a picture", "mend or remove the polygon")
    return dict(coco_mask.merge(coco_mask.frPyObjects([ring.tolist() for ring in segmentation], height, width)))


FARTHEST = 1e6
"""Pixels from the image's corner; pycocotools walks along the edges of a polygon in fifths of a pixel, in 32 bits."""


def _content(storage: Storage, source: str) -> tuple[Any, list[Mapping[str, Any]]]:
    """A COCO file and its images by ascending id."""
    content = storage.json(source)
    try:
        images = sorted_images(content)
        return content, images
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{storage.label(source)}: not a COCO annotation file ({type(error).__name__}: {error})",
            "it needs images, categories and annotations",
        ) from error


def _names(storage: Storage, source: str, images: Sequence[Mapping[str, Any]]) -> list[str]:
    try:
        return [str(image["file_name"]) for image in images]
    except (KeyError, TypeError) as error:
        raise DataError(f"{storage.label(source)}: an image has no file_name", "mend the entry") from error


def coco(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``coco``: COCO 2017 instances, 80 things; splits by their file's name (``train2017``, ``val2017``); option ``masks``."""
    chosen = check_options("coco", MaskOptions, options)
    source = f"annotations/instances_{split}.json"
    layout = f"{source}, {split}/*.jpg (or images/{split}, or {split}.zip)"
    storage = open_storage(data, "coco", layout).rooted([source], "coco", layout)
    content, images = _content(storage, source)
    names = _names(storage, source, images)
    where = image_folder(storage, split, names, layout)
    paths = [f"{where}/{name}" for name in names]
    return CocoDetection("coco", split, storage, source, content, paths, chosen.masks, layout)


class CocoFormatOptions(MaskOptions):
    """``train_json``, ``val_json``, ``test_json``: annotation files; ``images``: the folder that their file names are
    relative to, ``{split}`` standing for the split. All relative to the data folder."""

    train_json: str | None = None
    val_json: str | None = None
    test_json: str | None = None
    images: str = ""


def coco_format(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``coco-format``: any set in COCO format; splits train, val, test, each with the annotation file the options name."""
    chosen = check_options("coco-format", CocoFormatOptions, options)
    need_split("coco-format", split, ("train", "val", "test"))
    source = {"train": chosen.train_json, "val": chosen.val_json, "test": chosen.test_json}[split]
    if source is None:
        raise UsageError(f"dataset 'coco-format' has no annotation file for split '{split}'", f"give {split}_json")
    folder = chosen.images.replace("{split}", split)
    layout = f"{source}, {posixpath.join(folder, '*.jpg')}"
    storage = open_storage(data, "coco-format", layout)
    if not storage.exists(source):
        storage.mount_all()
    content, images = _content(storage, source)
    paths = [posixpath.join(folder, name) for name in _names(storage, source, images)]
    return CocoDetection("coco-format", split, storage, source, content, paths, chosen.masks, layout)


@dataclass(frozen=True)
class Federated:
    """What LVIS says of one image: categories verified absent, and categories not exhaustively annotated (label indices)."""

    negative: tuple[int, ...]
    not_exhaustive: tuple[int, ...]


class Lvis(CocoDetection):
    """LVIS v1. Only a category with a box in an image, or among its negatives, is evaluated there.

    Attributes:
        frequency: ``r``, ``c`` or ``f`` (rare, common, frequent in train) a category.
    """

    def __init__(
        self, split: str, storage: Storage, source: str, content: Any, paths: Sequence[str], masks: bool, layout: str
    ) -> None:
        super().__init__("lvis", split, storage, source, content, paths, masks, layout)
        index_of = {key: index for index, key in enumerate(self.category_ids)}
        try:
            by_id = {int(c["id"]): str(c["frequency"]) for c in content["categories"]}
            self.frequency = tuple(by_id[key] for key in self.category_ids)
            self._federated = [
                Federated(
                    tuple(index_of[int(key)] for key in image["neg_category_ids"]),
                    tuple(index_of[int(key)] for key in image["not_exhaustive_category_ids"]),
                )
                for image in sorted_images(content)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{storage.label(source)}: not an LVIS v1 annotation file ({type(error).__name__}: {error})",
                "images need neg_category_ids and not_exhaustive_category_ids, categories need frequency",
            ) from error

    def federated(self, index: int) -> Federated:
        """Which categories count in an image beside those with a box."""
        return self._federated[index]


def lvis(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``lvis``: LVIS v1 on COCO 2017's images (those of val lie in both train2017 and val2017); splits train, val; option ``masks``."""
    chosen = check_options("lvis", MaskOptions, options)
    need_split("lvis", split, ("train", "val"))
    name = f"lvis_v1_{split}.json"
    layout = f"annotations/{name} (or {name}), train2017/*.jpg, val2017/*.jpg (or images/train2017, …)"
    storage = open_storage(data, "lvis", layout)
    storage = storage.rooted([(f"annotations/{name}", name)], "lvis", layout)
    source = f"annotations/{name}" if storage.exists(f"annotations/{name}") else name
    content, images = _content(storage, source)
    try:
        # The folder and the file's name are the end of the image's address at COCO.
        names = [tuple(str(image["coco_url"]).rsplit("/", 2)[-2:]) for image in images]
    except (KeyError, TypeError) as error:
        raise DataError(f"{storage.label(source)}: an image has no coco_url", "fetch LVIS v1.0") from error
    where = {
        folder: image_folder(storage, folder, [n for f, n in names if f == folder], layout)
        for folder in sorted({folder for folder, _ in names})
    }
    paths = [f"{where[folder]}/{name}" for folder, name in names]
    return Lvis(split, storage, source, content, paths, chosen.masks, layout)
