"""Union14M-L and Union14M-Benchmarks (Jiang et al., arXiv 2307.08723) as they unpack: crops with MMOCR annotation files."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rice_eval.datasets.base import Dataset, check_options
from rice_eval.datasets.recognition import LabelFile, read_labels
from rice_eval.datasets.segmentation import NoOptions
from rice_eval.datasets.storage import Storage, open_storage
from rice_eval.errors import DataError

__all__ = ["BENCHMARKS", "DIFFICULTIES", "union14m"]

BENCHMARKS = (
    "artistic", "contextless", "curve", "general", "incomplete", "incomplete_ori", "multi_oriented", "multi_words", "salient",
)  # fmt: skip
"""Folders of Union14M-Benchmarks; ``incomplete_ori`` holds the whole words of ``incomplete``."""
DIFFICULTIES = ("train_easy", "train_medium", "train_normal", "train_hard", "train_challenging")
"""Annotation files of the training part, by the authors' voted difficulty; ``train`` is all of them."""
_TRAINING = {"train": DIFFICULTIES, **{name: (name,) for name in DIFFICULTIES}, "val": ("val_annos",)}
_SUFFIXES = (".jsonl", ".json")


def union14m(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``union14m``: a folder of Union14M-Benchmarks (``curve``, ``artistic``…), or ``train``, ``train_easy``…, ``val``.

    Annotations are ``annotation.jsonl`` (MMOCR 0.x) or ``annotation.json`` (MMOCR 1.x) beside ``imgs`` in a benchmark's folder,
    and files named by the difficulty in any folder of ``train_annos``; both forms hold the same words. Paths of images are
    relative to wherever the first of them is found: the top, ``full_images``, the benchmark's folder or its ``imgs``.
    """
    check_options("union14m", NoOptions, options)
    layout = (
        "Union14M-Benchmarks/{artistic,…}/annotation.jsonl and imgs/, train_annos/*/train_{easy,…}.jsonl, full_images/"
    )
    storage = open_storage(data, "union14m", layout)
    known = (*BENCHMARKS, *_TRAINING)
    if split not in known:
        raise DataError(f"dataset 'union14m' has no split '{split}'", f"its splits: {', '.join(known)}")
    if split in BENCHMARKS:
        storage = storage.rooted([("Union14M-Benchmarks", split)], "union14m", layout)
        if storage.is_folder("Union14M-Benchmarks"):
            storage = storage.enter("Union14M-Benchmarks")
        sources = [_annotation(storage, [split], "annotation", layout)]
        places = ["", split, f"{split}/imgs"]
    else:
        storage = storage.rooted(["train_annos", "full_images"], "union14m", layout)
        folders = [f"train_annos/{name}" for name in storage.folders("train_annos")]
        sources = [_annotation(storage, [*folders, "train_annos"], stem, layout) for stem in _TRAINING[split]]
        places = ["", "full_images"]
    rows = [row for source in sources for row in read_labels(storage, source)]
    if not rows:
        raise DataError(f"{storage.label(sources[0])}: lists no image", f"expected layout: {layout}")
    place = _place(storage, places, rows[0][0], layout)
    images = [posixpath.join(place, name) for name, _ in rows]
    return LabelFile("union14m", split, storage, images, [text for _, text in rows], sources, layout)


def _annotation(storage: Storage, folders: Sequence[str], stem: str, layout: str) -> str:
    for folder in folders:
        for suffix in _SUFFIXES:
            if storage.exists(f"{folder}/{stem}{suffix}"):
                return f"{folder}/{stem}{suffix}"
    raise DataError(
        f"{storage.label(folders[0])}: holds no {stem}.jsonl and no {stem}.json", f"expected layout: {layout}"
    )


def _place(storage: Storage, places: Sequence[str], name: str, layout: str) -> str:
    for place in places:
        if storage.exists(posixpath.join(place, name)):
            return place
    looked = ", ".join(storage.label(place) for place in places)
    raise DataError(f"{name}: no such image below {looked}", f"expected layout: {layout}")
