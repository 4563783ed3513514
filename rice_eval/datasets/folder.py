"""``folder``: any semantic segmentation set kept as images, index maps and a file of class names."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from rice_eval.datasets.base import IGNORE, Dataset, DatasetOptions, check_options
from rice_eval.datasets.rasters import IMAGES, colour_map
from rice_eval.datasets.segmentation import MaskDataset, pair
from rice_eval.datasets.storage import Storage, open_storage
from rice_eval.errors import DataError, UsageError

__all__ = ["FolderOptions", "factory"]

LAYOUT = "names.txt (or names.json) beside images/{split}/* and masks/{split}/*.png, or {split}/images and {split}/masks, or images/, masks/ and {split}.txt"


class FolderOptions(DatasetOptions):
    """``ignore``: values of the maps that count nowhere (``255``, or several with commas); ``mask_suffix``: what follows an
    image's stem in the name of its map."""

    ignore: tuple[int, ...] = (255,)
    mask_suffix: str = Field(".png", min_length=4)

    @field_validator("ignore", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return (value,) if isinstance(value, int) else value


def read_names(storage: Storage, split: str) -> tuple[str, dict[int, str]]:
    """The names file and the class name of every value.

    ``names.txt`` has a class a line, the first for value 0. ``names.json`` is a list of names, or an object from values to
    names, which may leave gaps.

    Raises:
        DataError: neither is there, or it is malformed.
    """
    source = next((name for name in ("names.txt", "names.json") if storage.exists(name)), None)
    if source is None:
        raise DataError(
            f"{storage.label('names.txt')}: no such file", f"expected layout: {LAYOUT.replace('{split}', split)}"
        )
    content: Any
    if source == "names.txt":
        content = [line.strip() for _, line in storage.lines(source)]
    else:
        content = storage.json(source)
    try:
        if isinstance(content, str):
            raise TypeError(f"it is the text '{content}'")
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        names = {int(value): name for value, name in pairs}
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{storage.label(source)}: neither a list of names nor an object from values to names ({error})",
            'write it as ["road", "sky"] or {"0": "road", "7": "sky"}',
        ) from error
    if not names or not all(isinstance(name, str) and name for name in names.values()) or min(names) < 0:
        raise DataError(f"{storage.label(source)}: needs one name a class and values of 0 or more", "mend the file")
    if len(set(names.values())) != len(names):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise DataError(f"{storage.label(source)}: two classes are named '{twice}'", "give each class its own name")
    return source, dict(sorted(names.items()))


def factory(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``folder``: options ``ignore=255``, ``mask_suffix=.png``; the split is a folder's name or a list's."""
    chosen = check_options("folder", FolderOptions, options)
    layout = LAYOUT.replace("{split}", split)
    storage = open_storage(data, "folder", layout).rooted([("names.txt", "names.json")], "folder", layout)
    source, names = read_names(storage, split)
    clash = sorted(set(chosen.ignore) & names.keys())
    if clash:
        raise UsageError(
            f"{storage.label(source)}: value {clash[0]} is the class '{names[clash[0]]}' and is to be ignored",
            "set the option ignore to a value that no class has",
        )
    annotations = [source]
    for where, truth in ((f"images/{split}", f"masks/{split}"), (f"{split}/images", f"{split}/masks")):
        if storage.is_folder(where):
            images, masks_in = list(storage.walk(where, IMAGES)), truth
            break
    else:
        where, masks_in, listing = "images", "masks", f"{split}.txt"
        if not storage.exists(listing) or not storage.is_folder(where):
            raise DataError(f"{storage.root}: has no images of split '{split}'", f"expected layout: {layout}")
        annotations.append(listing)
        images = _listed(storage, where, listing)
    suffix = chosen.mask_suffix
    masks = {name[: -len(suffix)]: f"{masks_in}/{name}" for name in storage.walk(masks_in, suffix.lower())}
    if len(annotations) == 2:
        stems = {posixpath.splitext(name)[0] for name in images}
        masks = {stem: name for stem, name in masks.items() if stem in stems}
    paired = pair(storage, where, images, masks, layout)
    values = {**dict.fromkeys(chosen.ignore, IGNORE), **{value: index for index, value in enumerate(names)}}
    classes = (tuple(names.values()), colour_map(len(names)))
    return MaskDataset("folder", split, storage, *paired, classes, values, layout, annotations=annotations)


def _listed(storage: Storage, where: str, listing: str) -> list[str]:
    """Image files, relative to ``where``, of a list with a stem or a file name a line, which may hold spaces; where there is
    no such file, a line's first word counts, as in the image sets of VOC.

    Raises:
        DataError: a line names no image, or one that an earlier line named; or there is no line.
    """
    files = storage.walk(where, IMAGES)
    known = {**{posixpath.splitext(name)[0]: name for name in files}, **{name: name for name in files}}
    found: dict[str, None] = {}
    for _, line in storage.lines(listing):
        key = line.strip()
        name = known.get(key) or known.get(key.split()[0])
        if name is None:
            raise DataError(f"{storage.label(listing)}: lists {key}, which is not in {where}/", "mend the list")
        if name in found:
            raise DataError(f"{storage.label(listing)}: lists {key} twice", "remove the second line")
        found[name] = None
    if not found:
        raise DataError(f"{storage.label(listing)}: lists no image", "fetch the file again")
    return list(found)
