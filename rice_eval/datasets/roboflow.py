"""Roboflow 100: a hundred detection sets in COCO export, in seven categories.

Layout: ``{set}/{train,valid,test}/_annotations.coco.json`` with the images beside it, one folder a set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from rice_eval.datasets.base import Dataset, check_options
from rice_eval.datasets.detection import CocoDetection, MaskOptions
from rice_eval.datasets.files import need_split
from rice_eval.datasets.storage import open_storage
from rice_eval.errors import DataError, UsageError
from rice_eval.registry import did_you_mean

__all__ = ["SPLITS", "Survey", "categories", "factory", "survey"]

SPLITS = ("train", "valid", "test")
LAYOUT = "SET/{train,valid,test}/_annotations.coco.json with the images beside it, for each of the 100 sets"


def categories() -> dict[str, tuple[str, ...]]:
    """The seven categories and the names of their sets, as the benchmark's own table has them."""
    text = resources.files("rice_eval.datasets").joinpath("classes", "roboflow100.json").read_text(encoding="utf-8")
    return {name: tuple(sets) for name, sets in json.loads(text)["categories"].items()}


class RoboflowOptions(MaskOptions):
    """``set``: which of the hundred."""

    set: str | None = None
    masks: bool = False


def factory(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``roboflow100``: one of the sets (option ``set``); splits train, valid, test. ``survey`` lists what a copy has."""
    chosen = check_options("roboflow100", RoboflowOptions, options)
    need_split("roboflow100", split, SPLITS)
    known = [name for names in categories().values() for name in names]
    if chosen.set is None:
        raise UsageError(
            "dataset 'roboflow100' is a hundred sets", "name one with the option set, e.g. set=aerial-cows"
        )
    if chosen.set not in known:
        raise UsageError(f"roboflow100 has no set '{chosen.set}'", did_you_mean(chosen.set, known))
    where = f"{chosen.set}/{split}"
    source = f"{where}/_annotations.coco.json"
    storage = open_storage(data, "roboflow100", LAYOUT).rooted([source], "roboflow100", LAYOUT)
    content = storage.json(source)
    try:
        paths = [f"{where}/{image['file_name']}" for image in sorted(content["images"], key=lambda i: int(i["id"]))]
        dropped = placeholder(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{storage.label(source)}: not a COCO export ({type(error).__name__}: {error})", "export the set again"
        ) from error
    layout = f"{source}, {where}/*.jpg"
    return CocoDetection("roboflow100", split, storage, source, content, paths, chosen.masks, layout, dropped)


def placeholder(content: Any) -> frozenset[int]:
    """Ids of the category that the exporter adds as everyone's supercategory (id 0) and no annotation uses."""
    rest = [c for c in content["categories"] if int(c["id"]) != 0]
    first = [c for c in content["categories"] if int(c["id"]) == 0]
    used = any(int(a["category_id"]) == 0 for a in content["annotations"])
    if first and rest and not used and all(c.get("supercategory") == first[0]["name"] for c in rest):
        return frozenset({0})
    return frozenset()


@dataclass(frozen=True)
class Survey:
    """What a copy of the benchmark has.

    Attributes:
        usable: sets that can be read in every split asked for, by category.
        broken: what is wrong with each of the others, by name.
    """

    usable: Mapping[str, tuple[str, ...]]
    broken: Mapping[str, DataError]


def survey(data: Path | None, splits: tuple[str, ...] = SPLITS) -> Survey:
    """Try every set of a copy; one that is missing or broken is reported by name and the rest goes on.

    Raises:
        DataError: no ``data``, or none of the sets is usable.
    """
    open_storage(data, "roboflow100", LAYOUT)
    usable: dict[str, tuple[str, ...]] = {}
    broken: dict[str, DataError] = {}
    for category, names in categories().items():
        for name in names:
            try:
                for split in splits:
                    factory(split, data, {"set": name})
            except DataError as error:
                broken[name] = error
            else:
                usable[category] = (*usable.get(category, ()), name)
    if not usable:
        raise DataError(f"{data}: none of the 100 sets of roboflow100 can be read", f"expected layout: {LAYOUT}")
    return Survey(usable, broken)
