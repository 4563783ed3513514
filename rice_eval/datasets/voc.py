"""Layouts of the Pascal VOC development kit: VOC 2012 segmentation (with SBD), Pascal Context, VOC detection."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import field_validator

from rice_eval.datasets.base import IGNORE, Dataset, DatasetOptions, Labels, check_options
from rice_eval.datasets.files import need_split
from rice_eval.datasets.segmentation import MaskDataset, NoOptions, class_table
from rice_eval.datasets.storage import Storage, open_storage
from rice_eval.errors import DataError, MissingExtraError

__all__ = ["pascal_context", "read_list", "voc2012"]

SBD = ("benchmark_RELEASE/dataset", "VOCaug/dataset", "sbd", "SBD", "dataset")
"""Where the Semantic Boundaries Dataset lies below the data folder: as released, as mmsegmentation and torchvision keep it."""


def read_list(storage: Storage, name: str) -> tuple[str, ...]:
    """The ids of an image set: the first word of every line. Raises DataError where an id occurs twice."""
    ids = tuple(line.split()[0] for _, line in storage.lines(name))
    if len(set(ids)) != len(ids):
        twice = next(key for key in ids if ids.count(key) > 1)
        raise DataError(f"{storage.label(name)}: lists {twice} twice", "remove the second line")
    if not ids:
        raise DataError(f"{storage.label(name)}: lists no image", "fetch the file again")
    return ids


class VocMasks(MaskDataset):
    """VOC 2012 with index maps as PNG, or as MATLAB files of the Semantic Boundaries Dataset."""

    def _values(self, name: str) -> Labels:
        if not name.endswith(".mat"):
            return super()._values(name)
        try:
            from scipy.io import loadmat
        except ImportError as error:
            raise MissingExtraError.of("scipy", "sbd", "reading SBD's .mat files") from error
        label = self.storage.label(name)
        try:
            truth = loadmat(BytesIO(self.storage.read(name)), squeeze_me=True, struct_as_record=False)["GTcls"]
            values = np.asarray(truth.Segmentation).astype(np.int64)
        except DataError:
            raise
        except Exception as error:  # loadmat raises whatever its parsers meet in a damaged file.
            raise DataError(
                f"{label}: not a class map of SBD ({type(error).__name__}: {error})", "fetch it again"
            ) from error
        return values


def voc2012(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``voc2012``: background and 20 classes; 255 (borders and difficult objects) is ignored. Splits train, trainaug, val, trainval.

    ``trainaug`` is train with VOC's own maps, and every further image of SBD that is not in val, with SBD's labels: from
    ``SegmentationClassAug/*.png``, else from SBD's own ``cls/*.mat``. Its list is ``ImageSets/Segmentation/trainaug.txt``
    where there is one, else it is made by that rule from SBD's ``train.txt`` and ``val.txt``.
    """
    check_options("voc2012", NoOptions, options)
    need_split("voc2012", split, ("train", "trainaug", "val", "trainval"))
    sets = "ImageSets/Segmentation"
    base = "train" if split == "trainaug" else split
    layout = f"VOCdevkit/VOC2012: {sets}/{base}.txt, JPEGImages/*.jpg, SegmentationClass/*.png"
    if split == "trainaug":
        layout += "; SegmentationClassAug/*.png with trainaug.txt, or benchmark_RELEASE/dataset/{cls/*.mat, train.txt, val.txt}"
    whole = open_storage(data, "voc2012", layout)
    root = whole.rooted([f"{sets}/{base}.txt", "JPEGImages", "SegmentationClass"], "voc2012", layout).prefix
    lists = [posixpath.join(root, f"{sets}/{base}.txt")]
    ids = read_list(whole, lists[0])
    masks = [posixpath.join(root, f"SegmentationClass/{key}.png") for key in ids]
    if split == "trainaug":
        further, paths, listed = _augmented(whole, root, set(ids), layout)
        lists += listed
        ids, masks = (*ids, *further), [*masks, *paths]
    images = [posixpath.join(root, f"JPEGImages/{key}.jpg") for key in ids]
    values = {255: IGNORE, **{index: index for index in range(21)}}
    table = class_table("voc2012")
    return VocMasks("voc2012", split, whole, images, masks, table, values, layout, annotations=lists)


def _augmented(whole: Storage, root: str, train: set[str], layout: str) -> tuple[list[str], list[str], list[str]]:
    """Ids beyond train, their maps, and the lists they come from."""
    ready = posixpath.join(root, "SegmentationClassAug")
    source = posixpath.join(root, "ImageSets/Segmentation/trainaug.txt")
    if whole.is_folder(ready) and whole.exists(source):
        further = [key for key in read_list(whole, source) if key not in train]
        return further, [f"{ready}/{key}.png" for key in further], [source]
    for _ in range(2):
        for place in ("", posixpath.dirname(root), root):
            for folder in SBD:
                below = posixpath.join(place, folder)
                if whole.is_folder(f"{below}/cls") or (whole.is_folder(ready) and whole.exists(f"{below}/train.txt")):
                    lists = [
                        f"{below}/train.txt",
                        f"{below}/val.txt",
                        posixpath.join(root, "ImageSets/Segmentation/val.txt"),
                    ]
                    listed = {key for name in lists[:2] for key in read_list(whole, name)}
                    further = sorted(listed - train - set(read_list(whole, lists[2])))
                    if whole.is_folder(ready):
                        return further, [f"{ready}/{key}.png" for key in further], lists
                    return further, [f"{below}/cls/{key}.mat" for key in further], lists
        if not whole.mount_all():
            break
    raise DataError(f"{whole.label(root)}: no labels of SBD for split trainaug", f"expected layout: {layout}")


class ContextOptions(DatasetOptions):
    """``classes``: 59 (background is ignored) or 60 (background is a class)."""

    classes: Literal[59, 60] = 59

    @field_validator("classes", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        return int(value) if isinstance(value, str) and value.isdigit() else value


def pascal_context(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``pascal-context``: VOC 2010 with maps of the 59 most frequent classes, 0 for background; splits train, val."""
    chosen = check_options("pascal-context", ContextOptions, options)
    need_split("pascal-context", split, ("train", "val"))
    source = f"ImageSets/SegmentationContext/{split}.txt"
    layout = f"VOCdevkit/VOC2010: {source}, JPEGImages/*.jpg, SegmentationClassContext/*.png (values 0 to 59)"
    storage = open_storage(data, "pascal-context", layout).rooted(
        [source, "JPEGImages", "SegmentationClassContext"], "pascal-context", layout
    )
    ids = read_list(storage, source)
    names, palette = class_table("pascal-context")
    skip = 60 - chosen.classes
    values = {255: IGNORE, **{index: index - skip if index >= skip else IGNORE for index in range(60)}}
    images = [f"JPEGImages/{key}.jpg" for key in ids]
    masks = [f"SegmentationClassContext/{key}.png" for key in ids]
    table = (names[skip:], palette[skip:])
    return MaskDataset("pascal-context", split, storage, images, masks, table, values, layout, annotations=[source])
