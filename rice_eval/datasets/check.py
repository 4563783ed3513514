"""What is missing or malformed in a user's copy of a dataset."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rice_eval.datasets import load_dataset
from rice_eval.datasets.base import IGNORE, Dataset
from rice_eval.datasets.recognition import LmdbCrops
from rice_eval.errors import DataError, UsageError
from rice_eval.registry import datasets

__all__ = ["SPLITS", "Finding", "check", "check_split"]

SPLITS: Mapping[str, tuple[str, ...]] = {
    "ade20k": ("training", "validation"),
    "cityscapes": ("train", "val"),
    "coco": ("train2017", "val2017"),
    "coco-panoptic": ("train2017", "val2017"),
    "coco-stuff": ("train2017", "val2017"),
    "coco-text": ("train", "val"),
    "flickr30k-entities": ("train", "val", "test"),
    "funsd": ("train", "test"),
    "icdar2015": ("train", "test"),
    "lvis": ("train", "val"),
    "pascal-context": ("train", "val"),
    "roboflow100": ("train", "valid", "test"),
    "scenes": ("train", "val"),
    "sroie": ("train", "val"),
    "textocr": ("train", "val"),
    "totaltext": ("train", "test"),
    "union14m": (
        "artistic",
        "contextless",
        "curve",
        "general",
        "incomplete",
        "multi_oriented",
        "multi_words",
        "salient",
    ),
    "visual-genome": ("all",),
    "voc-detection": ("trainval", "test"),
    "voc2012": ("train", "val"),
}
"""The splits that are checked when none is named."""

SAMPLE = 64
"""Images of a split that are decoded where not all of them are."""
BORDER = 1.0
"""Pixels a box may reach over the border without a note: annotators round."""

LEAST_AREA = 0.5
"""Pixels below which a polygon is none."""

Progress = Callable[[str, int, int], None]
"""Called as ``progress(split, done, total)``."""


@dataclass(frozen=True)
class Finding:
    """Something about a copy.

    Attributes:
        split: where.
        image: id of the image, "" where it concerns the whole split.
        what: what is wrong, naming the file.
        fix: what can be done.
        level: ``problem`` (the run would fail or be wrong) or ``note`` (legal, worth knowing).
    """

    split: str
    image: str
    what: str
    fix: str
    level: Literal["problem", "note"] = "problem"


def check(
    name: str,
    data: Path | None,
    options: Mapping[str, Any] | None = None,
    splits: Sequence[str] = (),
    full: bool = False,
    progress: Progress | None = None,
) -> list[Finding]:
    """Everything that is missing or malformed: every annotation is read, and a sample of the images, or all of them.

    Args:
        name: a name from the dataset registry.
        data: the user's folder, zip or tar.
        options: the reader's options.
        splits: which; the dataset's usual ones where none is named.
        full: decode every image instead of ``SAMPLE`` a split.
        progress: called after each image.

    Raises:
        NotFoundError: no such dataset.
        UsageError: an option the reader does not have, or no split is named and the dataset has no usual ones.
    """
    datasets.get(name)
    if name == "roboflow100" and not (options or {}).get("set"):
        return _check_roboflow(data, options or {}, splits, full, progress)
    splits = tuple(splits) or SPLITS.get(name, ())
    if not splits:
        raise UsageError(f"dataset '{name}' has no usual splits", "name them with --split")
    findings: list[Finding] = []
    seen: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    for split in splits:
        try:
            dataset = load_dataset(name, split, data, options)
        except DataError as error:
            findings.append(Finding(split, "", error.what, error.fix))
            continue
        seen[split] = (dataset.classes, dataset.things)
        findings += check_split(dataset, full, progress)
    if len(set(seen.values())) > 1:
        names = ", ".join(seen)
        findings.append(Finding(names, "", "the splits have different classes", "use annotation files of one release"))
    return findings


def _check_roboflow(
    data: Path | None, options: Mapping[str, Any], splits: Sequence[str], full: bool, progress: Progress | None
) -> list[Finding]:
    """Every one of the hundred sets; the set's name stands before the split's."""
    from rice_eval.datasets.roboflow import categories

    findings: list[Finding] = []
    for key in (key for sets in categories().values() for key in sets):
        for finding in check("roboflow100", data, {**options, "set": key}, splits, full, progress):
            findings.append(replace(finding, split=f"{key}/{finding.split}"))
    return findings


def check_split(dataset: Dataset, full: bool = False, progress: Progress | None = None) -> list[Finding]:
    """Findings of one split that can be opened; see ``check``."""
    total = len(dataset)
    picked = set(range(total)) if full else {k * total // min(SAMPLE, total) for k in range(min(SAMPLE, total))}
    findings: list[Finding] = []
    counts = np.zeros(len(dataset.classes), dtype=np.int64)
    boxes = np.zeros(len(dataset.things), dtype=np.int64)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for done, result in enumerate(pool.map(lambda i: _check_one(dataset, i, i in picked), range(total)), 1):
            findings += result[0]
            counts += result[1]
            boxes += result[2]
            if progress is not None:
                progress(dataset.split, done, total)
    if isinstance(dataset, LmdbCrops):
        for folder in dataset.beyond:
            what = f"{folder}: holds entries after its num-samples"
            findings.append(Finding(dataset.split, "", what, "they are never read; correct num-samples", "note"))
    for what, names, seen in (("pixel", dataset.classes, counts), ("box", dataset.things, boxes)):
        absent = [name for name, count in zip(names, seen) if count == 0]
        if absent and ("semantic" if what == "pixel" else "instances") in dataset.provides:
            listed = ", ".join(absent[:5]) + (", …" if len(absent) > 5 else "")
            text = f"{len(absent)} of {len(names)} classes have no {what}: {listed}"
            findings.append(Finding(dataset.split, "", text, "their scores are undefined on this split", "note"))
    return findings


Counts = NDArray[np.int64]


def _check_one(dataset: Dataset, index: int, decode: bool) -> tuple[list[Finding], Counts, Counts]:
    """Findings of one image; pixels a semantic class; boxes an instance class."""
    key = dataset.image_id(index)
    findings: list[Finding] = []
    counts = np.zeros(len(dataset.classes), dtype=np.int64)
    boxes = np.zeros(len(dataset.things), dtype=np.int64)

    def attempt(read: Callable[[], None]) -> None:
        try:
            read()
        except DataError as error:
            findings.append(Finding(dataset.split, key, error.what, error.fix))

    def note(what: str, fix: str) -> None:
        findings.append(Finding(dataset.split, key, what, fix, "note"))

    def semantic() -> None:
        labels = dataset.semantic(index)
        counts[:] = np.bincount(labels[labels != IGNORE], minlength=len(counts))[: len(counts)]
        if not counts.any():
            note("no pixel is labelled", "it counts nowhere")

    def instances() -> None:
        found = dataset.instances(index)
        boxes[:] = np.bincount(found.labels[~found.crowd], minlength=len(boxes))[: len(boxes)]
        height, width = dataset.size(index)
        flat = (found.boxes[:, 2:] <= found.boxes[:, :2]).any(1)
        over = (found.boxes < -BORDER).any(1) | (found.boxes[:, 2:] > np.array([width, height]) + BORDER).any(1)
        for which, words in ((flat, "has no area"), (over, "reaches over the border")):
            for annotation in found.ids[which]:
                note(f"the box of annotation {annotation} {words}", "remove or mend it if that is not meant")

    def text() -> None:
        for number, line in enumerate(dataset.text(index), 1):
            if not line.text.strip():
                note("a text line has no transcript", "it counts as don't-care")
            (x, y), (after_x, after_y) = line.polygon.T, np.roll(line.polygon, -1, axis=0).T
            if abs(float((x * after_y - after_x * y).sum())) < 2 * LEAST_AREA:
                note(f"the polygon of text line {number} has no area", "it can't be found; remove or mend it")

    def image() -> None:
        shape = dataset.image(index).shape[:2]
        if shape != dataset.size(index):
            raise DataError(f"{key}: decodes to {shape}, not {dataset.size(index)}", "fetch the image again")

    readers: dict[str, Callable[[], None]] = {"semantic": semantic, "instances": instances, "text": text}
    if decode:
        attempt(image)
    # An image that can't be decoded has no size to hold its annotations against: one finding, not one a kind.
    for annotation, read in readers.items() if not findings else ():
        if annotation in dataset.provides:
            attempt(read)
    return findings, counts, boxes
