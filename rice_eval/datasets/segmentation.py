"""Semantic segmentation: an index map beside every image. ADE20K, Cityscapes and COCO-Stuff in their own layouts."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rice_eval.datasets.base import IGNORE, Dataset, DatasetOptions, Labels, check_options
from rice_eval.datasets.files import FileDataset, need_files, need_split
from rice_eval.datasets.rasters import IMAGES, decode_indices
from rice_eval.datasets.storage import Storage, open_storage
from rice_eval.errors import DataError

__all__ = ["MaskDataset", "ade20k", "cityscapes", "class_table", "coco_stuff", "find_folder", "pair"]

UNKNOWN = -2
"""Marks file values that no class and no ignore rule covers."""
Palette = tuple[tuple[int, int, int], ...]


def class_table(name: str) -> tuple[tuple[str, ...], Palette]:
    """Class names and colours that ship with the package; each file states their source."""
    text = resources.files("rice_eval.datasets").joinpath("classes", f"{name}.json").read_text(encoding="utf-8")
    rows = json.loads(text)["classes"]
    return tuple(row[0] for row in rows), tuple((row[1], row[2], row[3]) for row in rows)


class MaskDataset(FileDataset):
    """Images with an index map each.

    Args:
        name: the registry's name.
        split: the split's own name.
        storage: where the files lie.
        images: a file name an image.
        masks: a file name an index map, in the same order.
        classes: names and colours of the classes.
        values: class index (or ``IGNORE``) of every value that a map may hold; any other is an error.
        layout: the expected layout in one line.
        annotations: lists and names files that enter the fingerprint.
        facts: further facts that decide the labels.
    """

    provides = frozenset({"semantic"})

    def __init__(
        self,
        name: str,
        split: str,
        storage: Storage,
        images: Sequence[str],
        masks: Sequence[str],
        classes: tuple[tuple[str, ...], Palette],
        values: Mapping[int, int],
        layout: str,
        annotations: Sequence[str] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        need_files(storage, images, "image", layout)
        need_files(storage, masks, "mask", layout)
        self.classes, self.palette = classes
        self.masks = tuple(masks)
        self._table = np.full(max(values) + 1, UNKNOWN, dtype=np.int64)
        for value, index in values.items():
            self._table[value] = index
        facts = {"values": sorted(values.items()), **(facts or {})}
        super().__init__(name, split, storage, images, annotations=annotations, maps=masks, facts=facts)

    def _values(self, name: str) -> Labels:
        """The values of one map as its file holds them."""
        return decode_indices(self.storage.read(name), self.storage.label(name))

    def semantic(self, index: int) -> Labels:
        """See ``Dataset``. Raises DataError where the map is damaged, of another size, or holds a value of no class."""
        name = self.masks[index]
        values = self._values(name)
        size = self.size(index)
        if values.shape != size:
            turned = "; it lies in the image's stored orientation" if values.shape == size[::-1] else ""
            fix = "turn the mask upright, or strip the image's EXIF rotation" if turned else "mend the mask"
            raise DataError(
                f"{self.storage.label(name)}: {values.shape[1]}x{values.shape[0]} pixels, but its image has "
                f"{size[1]}x{size[0]}{turned}",
                fix,
            )
        inside = (values >= 0) & (values < len(self._table))
        labels: Labels = self._table[np.where(inside, values, 0)]
        bad = ~inside | (labels == UNKNOWN)
        if bad.any():
            raise DataError(
                f"{self.storage.label(name)}: value {int(values[bad][0])} ({int(bad.sum())} pixels out of range) belongs to "
                f"no class; allowed: {_ranges(np.flatnonzero(self._table != UNKNOWN))}",
                "mend the mask, or check that it is the index map and not another of the dataset's pictures",
            )
        return labels


def _ranges(values: Iterable[int]) -> str:
    """``[0, 1, 2, 255]`` as ``0-2, 255``."""
    spans: list[list[int]] = []
    for value in values:
        if spans and value == spans[-1][1] + 1:
            spans[-1][1] = int(value)
        else:
            spans.append([int(value), int(value)])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


def find_folder(
    storage: Storage, candidates: Sequence[str], suffix: str | tuple[str, ...], what: str, layout: str
) -> str:
    """The first of the folders that holds files of that suffix (in it or below it); archives at the top are mounted if need be.

    Raises:
        DataError: none does.
    """
    for _ in range(2):
        for folder in candidates:
            if storage.walk(folder, suffix):
                return folder
        if not storage.mount_all():
            break
    raise DataError(f"{storage.label(candidates[0])}: holds no {what}", f"expected layout: {layout}")


def pair(
    storage: Storage, folder: str, images: Sequence[str], masks: Mapping[str, str], layout: str, what: str = "mask"
) -> tuple[list[str], list[str]]:
    """File names of images and of their masks (or of another annotation file each: ``what``).

    Args:
        storage: where the files lie.
        folder: the images' folder.
        images: image files relative to it.
        masks: mask file of each image's relative name without suffix.
        layout: the expected layout in one line.
        what: the kind of annotation file, for messages.

    Raises:
        DataError: an image with no annotation file, or the other way round.
    """
    stems = [posixpath.splitext(name)[0] for name in images]
    bare = [stem for stem in stems if stem not in masks]
    if bare:
        raise DataError(
            f"{storage.label(folder)}: {bare[0]} has no {what} ({len(bare)} of {len(stems)} images)",
            f"expected layout: {layout}",
        )
    orphans = sorted(masks.keys() - set(stems))
    if orphans:
        raise DataError(
            f"{storage.label(masks[orphans[0]])}: a {what} with no image ({len(orphans)} of {len(masks)})",
            f"fetch the rest of {storage.label(folder)}, or remove the {what}s",
        )
    return [f"{folder}/{name}" for name in images], [masks[stem] for stem in stems]


class NoOptions(DatasetOptions):
    """A reader with nothing to choose."""


def ade20k(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``ade20k``: SceneParsing 150 (ADEChallengeData2016). 0 is unlabelled, 1 to 150 are the classes, 255 counts as unlabelled."""
    check_options("ade20k", NoOptions, options)
    need_split("ade20k", split, ("training", "validation"))
    layout = f"images/{split}/*.jpg, annotations/{split}/*.png"
    storage = open_storage(data, "ade20k", layout).rooted([f"images/{split}", f"annotations/{split}"], "ade20k", layout)
    found = storage.files(f"annotations/{split}", ".png")
    masks = {posixpath.splitext(name)[0]: f"annotations/{split}/{name}" for name in found}
    images = storage.files(f"images/{split}", IMAGES)
    names = pair(storage, f"images/{split}", images, masks, layout)
    values = {0: IGNORE, 255: IGNORE, **{index + 1: index for index in range(150)}}
    return MaskDataset("ade20k", split, storage, *names, class_table("ade20k"), values, layout)


CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""labelIds of the 19 evaluated classes in the order of their trainIds (label definitions of cityscapesScripts)."""


class CityscapesOptions(DatasetOptions):
    """``labels``: which of the released maps is read; both give the same classes."""

    labels: Literal["labelIds", "labelTrainIds"] = "labelIds"


def cityscapes(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``cityscapes``: fine annotations, 19 classes; labelIds outside them, and 255 (licence plates), are ignored."""
    chosen = check_options("cityscapes", CityscapesOptions, options)
    need_split("cityscapes", split, ("train", "val"))
    tail = f"_gtFine_{chosen.labels}.png"
    layout = f"leftImg8bit/{split}/CITY/*_leftImg8bit.png, gtFine/{split}/CITY/*{tail}"
    where, truth = f"leftImg8bit/{split}", f"gtFine/{split}"
    storage = open_storage(data, "cityscapes", layout).rooted([where, truth], "cityscapes", layout)
    find_folder(storage, [truth], tail.lower(), f"*{tail}", layout)
    masks = {name[: -len(tail)] + "_leftImg8bit": f"{truth}/{name}" for name in storage.walk(truth, tail.lower())}
    names = pair(storage, where, storage.walk(where, "_leftimg8bit.png"), masks, layout)
    if chosen.labels == "labelTrainIds":
        values = {255: IGNORE, **{index: index for index in range(19)}}
    else:
        values = {**dict.fromkeys([*range(34), 255], IGNORE), **{key: i for i, key in enumerate(CITYSCAPES_IDS)}}
    facts = {"labels": chosen.labels}
    return MaskDataset("cityscapes", split, storage, *names, class_table("cityscapes"), values, layout, facts=facts)


COCO_STUFF_GAPS = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91})
"""Category ids of 1 to 182 that COCO-Stuff lists but never uses (things that COCO 2014 dropped)."""


class CocoStuffOptions(DatasetOptions):
    """``labels``: the maps as released (``ids``: category id less 1), or the converted ``*_labelTrainIds.png``."""

    labels: Literal["ids", "trainIds"] = "ids"


def coco_stuff(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``coco-stuff``: 164k images of COCO 2017, 80 things and 91 stuff classes by ascending category id; 255 is unlabelled."""
    chosen = check_options("coco-stuff", CocoStuffOptions, options)
    need_split("coco-stuff", split, ("train2017", "val2017"))
    tail = ".png" if chosen.labels == "ids" else "_labelTrainIds.png"
    layout = f"{split}/*.jpg (or images/{split}), stuffthingmaps/{split}/*{tail} (or annotations/{split})"
    image_folders = (split, f"images/{split}")
    map_folders = (f"stuffthingmaps/{split}", f"annotations/{split}", split)
    storage = open_storage(data, "coco-stuff", layout).rooted([image_folders, map_folders], "coco-stuff", layout)
    where = find_folder(storage, image_folders, ".jpg", "images", layout)
    truth = find_folder(storage, map_folders, tail.lower(), f"*{tail}", layout)
    found = storage.files(truth, tail.lower())
    masks = {name[: -len(tail)]: f"{truth}/{name}" for name in found if (tail != ".png") == ("_labelTrainIds" in name)}
    names = pair(storage, where, storage.files(where, ".jpg"), masks, layout)
    if chosen.labels == "trainIds":
        values = {index: index for index in range(171)}
    else:
        kept = [number for number in range(1, 183) if number not in COCO_STUFF_GAPS]
        values = {number - 1: index for index, number in enumerate(kept)}
    values[255] = IGNORE
    facts = {"labels": chosen.labels}
    return MaskDataset("coco-stuff", split, storage, *names, class_table("coco-stuff"), values, layout, facts=facts)
