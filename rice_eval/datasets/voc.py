"""Layouts of the Pascal VOC development kit: VOC 2012 segmentation (with SBD), Pascal Context, VOC detection."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
from pydantic import field_validator

from rice_eval.datasets.base import IGNORE, Dataset, DatasetOptions, Instances, Labels, check_options
from rice_eval.datasets.files import FileDataset, need_files, need_split
from rice_eval.datasets.segmentation import MaskDataset, NoOptions, class_table
from rice_eval.datasets.storage import Storage, open_storage
from rice_eval.errors import DataError, MissingExtraError

__all__ = ["VocDetection", "pascal_context", "read_list", "voc2012", "voc_detection"]

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


def _number(value: object) -> object:
    """A number given as text, as a command line does."""
    return int(value) if isinstance(value, str) and value.isdigit() else value


class ContextOptions(DatasetOptions):
    """``classes``: 59 (background is ignored) or 60 (background is a class)."""

    classes: Literal[59, 60] = 59

    _digits = field_validator("classes", mode="before")(_number)


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


class DetectionOptions(DatasetOptions):
    """``year``: which of the releases below VOCdevkit."""

    year: Literal[2007, 2012] = 2007

    _digits = field_validator("year", mode="before")(_number)


class VocDetection(FileDataset):
    """VOC boxes. Corners are 1-based and inclusive in the XML: ``xmin - 1, ymin - 1, xmax, ymax`` here. Objects marked
    difficult are neither targets nor mistakes, which ``crowd`` says."""

    provides = frozenset({"instances"})

    def __init__(self, split: str, storage: Storage, root: str, source: str, layout: str) -> None:
        self.things = class_table("voc2012")[0][1:]
        ids = read_list(storage, source)
        images = [posixpath.join(root, f"JPEGImages/{key}.jpg") for key in ids]
        self.xmls = [posixpath.join(root, f"Annotations/{key}.xml") for key in ids]
        need_files(storage, images, "image", layout)
        need_files(storage, self.xmls, "annotation", layout)
        super().__init__(
            "voc-detection", split, storage, images, annotations=[source], maps=self.xmls, facts={"difficult": "crowd"}
        )

    def instances(self, index: int) -> Instances:
        """See ``Dataset``; ids count objects of the image from 0, areas are of boxes."""
        label = self.storage.label(self.xmls[index])
        rows: list[tuple[float, float, float, float, int, bool]] = []
        try:
            root = ElementTree.fromstring(self.storage.read(self.xmls[index]))
            for thing in root.iter("object"):
                box = [float(thing.findtext(f"bndbox/{key}") or "nan") for key in ("xmin", "ymin", "xmax", "ymax")]
                name = (thing.findtext("name") or "").strip()
                if name not in self.things:
                    raise DataError(f"{label}: an object named '{name}'", f"names are: {', '.join(self.things)}")
                if not (np.isfinite(box).all() and box[0] <= box[2] and box[1] <= box[3]):
                    raise DataError(f"{label}: '{name}' has the corners {box}", "mend the annotation")
                difficult = (thing.findtext("difficult") or "0").strip() == "1"
                rows.append((box[0] - 1, box[1] - 1, box[2], box[3], self.things.index(name), difficult))
        except (ElementTree.ParseError, ValueError) as error:
            raise DataError(f"{label}: not a VOC annotation ({error})", "fetch the file again") from error
        boxes = np.array([row[:4] for row in rows], dtype=np.float64).reshape(-1, 4)
        return Instances(
            boxes=boxes,
            labels=np.array([row[4] for row in rows], dtype=np.int64),
            masks=None,
            crowd=np.array([row[5] for row in rows], dtype=np.bool_),
            area=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
            ids=np.arange(len(rows), dtype=np.int64),
        )


def voc_detection(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``voc-detection``: 20 classes; option ``year=2007|2012``; splits by their list (train, val, trainval, and test of 2007)."""
    chosen = check_options("voc-detection", DetectionOptions, options)
    need_split("voc-detection", split, ("train", "val", "trainval", "test"))
    folder, source = f"VOC{chosen.year}", f"ImageSets/Main/{split}.txt"
    layout = f"VOCdevkit/{folder}: {source}, JPEGImages/*.jpg, Annotations/*.xml"
    storage = open_storage(data, "voc-detection", layout)
    wrapped = posixpath.join(folder, source)
    if data is not None and data.name == folder and storage.exists(source):
        return VocDetection(split, storage, "", source, layout)
    storage = storage.rooted([wrapped], "voc-detection", layout)
    return VocDetection(split, storage, folder, wrapped, layout)
