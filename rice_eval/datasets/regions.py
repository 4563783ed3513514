"""Regions with text: referring expressions (RefCOCO, +, g), GRIT-style JSON lines, Visual Genome, Flickr30k Entities.

``instances`` gives a row a pair of box and phrase: ``names`` holds the phrases, ``things`` is the one class ``region``
(RefCOCO keeps COCO's categories). A phrase of several boxes, or a box of several phrases, is several rows.
"""

from __future__ import annotations

import json
import math
import pickle
import posixpath
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
from pydantic import Field

from rice_eval.datasets.base import Dataset, DatasetOptions, Instances, check_options
from rice_eval.datasets.coco_panoptic import image_folder
from rice_eval.datasets.detection import CocoDetection, MaskOptions, sorted_images
from rice_eval.datasets.files import FileDataset, need_files, need_split
from rice_eval.datasets.segmentation import NoOptions
from rice_eval.datasets.storage import Storage, open_storage
from rice_eval.datasets.voc import read_list
from rice_eval.errors import DataError

__all__ = ["RefCoco", "RegionText", "flickr30k", "grit", "refcoco", "visual_genome"]

Row = tuple[tuple[float, float, float, float], str, int]
"""A box in xyxy, its phrase, its id."""


class RegionText(FileDataset):
    """Images with boxes and phrases.

    Args:
        name, split, storage, images, layout: as in ``FileDataset``.
        rows: the pairs of each image.
        relative: whether boxes are in fractions of the image's width and height.
    """

    provides = frozenset({"instances"})
    things = ("region",)

    def __init__(
        self,
        name: str,
        split: str,
        storage: Storage,
        images: Sequence[str],
        rows: Sequence[Sequence[Row]],
        layout: str,
        relative: bool = False,
        annotations: Sequence[str] = (),
        maps: Sequence[str] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        need_files(storage, images, "image", layout)
        self._rows = [tuple(pairs) for pairs in rows]
        self._relative = relative
        super().__init__(name, split, storage, images, annotations=annotations, maps=maps, facts=facts or {})

    def instances(self, index: int) -> Instances:
        """See ``Dataset``; areas are of boxes."""
        rows = self._rows[index]
        boxes = np.array([row[0] for row in rows], dtype=np.float64).reshape(-1, 4)
        if self._relative:
            height, width = self.size(index)
            boxes = boxes * np.array([width, height, width, height])
        return Instances(
            boxes=boxes,
            labels=np.zeros(len(rows), dtype=np.int64),
            masks=None,
            crowd=np.zeros(len(rows), dtype=np.bool_),
            area=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
            ids=np.array([row[2] for row in rows], dtype=np.int64),
            names=tuple(row[1] for row in rows),
        )


def checked(box: Sequence[Any], label: str) -> tuple[float, float, float, float]:
    """A box in xyxy. Raises DataError where it is none."""
    values = [float(v) for v in box]
    if len(values) != 4 or not all(map(math.isfinite, values)) or values[2] < values[0] or values[3] < values[1]:
        raise DataError(f"{label}: no box: {list(box)}", "mend the annotation")
    return values[0], values[1], values[2], values[3]


# RefCOCO, RefCOCO+, RefCOCOg.

SPLIT_BY = {"refcoco": ("unc", "google"), "refcoco+": ("unc",), "refcocog": ("umd", "google")}
"""Who made the splits of each set; the first is the usual one."""


class RefOptions(MaskOptions):
    """``set``: which of the three; ``by``: whose splits (``unc``, ``google``, ``umd``), the usual ones by default."""

    set: Literal["refcoco", "refcoco+", "refcocog"] = "refcoco"
    by: Literal["unc", "google", "umd"] | None = None


class _Plain(pickle.Unpickler):
    """Containers, strings and numbers alone: a pickle that names any class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_refs(storage: Storage, source: str) -> list[dict[str, Any]]:
    """The referring expressions of a ``refs(…).p``. Raises DataError where it is damaged or holds more than plain data."""
    try:
        # Written by Python 2: its byte strings are read as Latin-1, which ASCII sentences survive.
        refs = _Plain(BytesIO(storage.read(source)), encoding="latin1").load()
        if not isinstance(refs, list):
            raise pickle.UnpicklingError("not a list")
    except DataError:
        raise
    except Exception as error:  # A damaged pickle raises whatever its opcodes meet.
        raise DataError(
            f"{storage.label(source)}: not a plain pickle of references ({error})", "fetch it again"
        ) from error
    return refs


class RefCoco(CocoDetection):
    """Objects of COCO 2014 with the sentences that refer to them.

    ``instances`` has a row a sentence (``ids`` are sentence ids); ``proposals`` every annotated object of the image.
    """

    def __init__(self, split: str, storage: Storage, folder: str, by: str, masks: bool, layout: str) -> None:
        lists, source = f"{folder}/refs({by}).p", f"{folder}/instances.json"
        refs = read_refs(storage, lists)
        content = storage.json(source)
        try:
            known = sorted({str(ref["split"]) for ref in refs})
            need_split("refcoco", split, known)
            refs = [ref for ref in refs if ref["split"] == split]
            wanted = {int(ref["image_id"]) for ref in refs}
            images = [image for image in sorted_images(content) if int(image["id"]) in wanted]
            objects = [a for a in content["annotations"] if int(a["image_id"]) in wanted]
            names = [str(image["file_name"]) for image in images]
            sentences = [(int(r["ann_id"]), str(s["sent"]), int(s["sent_id"])) for r in refs for s in r["sentences"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{storage.label(folder)}: malformed references or instances ({type(error).__name__}: {error})",
                "fetch both files of one release",
            ) from error
        nested = storage.enter("images/mscoco") if storage.is_folder("images/mscoco/images/train2014") else storage
        where = posixpath.join(nested.prefix, image_folder(nested, "train2014", names, layout))[len(storage.prefix) :]
        paths = [f"{where.lstrip('/')}/{name}" for name in names]
        part = {**content, "images": images, "annotations": objects}
        super().__init__("refcoco", split, storage, source, part, paths, masks, layout)
        self._annotations = (source, lists)
        self._facts |= {"set": posixpath.basename(folder), "by": by}
        row_of = {int(key): row for row, key in enumerate(self._ids)}
        lost = [ann for ann, _, _ in sentences if ann not in row_of]
        if lost:
            raise DataError(
                f"{storage.label(lists)}: refers to object {lost[0]}, which {source} lacks", "fetch both again"
            )
        self._refs: list[list[tuple[int, str, int]]] = [[] for _ in paths]
        for ann, sentence, key in sentences:
            row = row_of[ann]
            image = int(np.searchsorted(self._starts, row, side="right")) - 1
            self._refs[image].append((row - int(self._starts[image]), sentence, key))

    def proposals(self, index: int) -> Instances:
        """Every annotated object of the image: the candidates among which a sentence's object is found."""
        return super().instances(index)

    def instances(self, index: int) -> Instances:
        """See ``Dataset``; a row a sentence."""
        every = super().instances(index)
        refs = self._refs[index]
        rows = np.array([row for row, _, _ in refs], dtype=np.int64)
        return Instances(
            boxes=every.boxes[rows],
            labels=every.labels[rows],
            masks=None if every.masks is None else tuple(every.masks[int(row)] for row in rows),
            crowd=every.crowd[rows],
            area=every.area[rows],
            ids=np.array([key for _, _, key in refs], dtype=np.int64),
            names=tuple(sentence for _, sentence, _ in refs),
        )


def refcoco(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``refcoco``: options ``set=refcoco|refcoco+|refcocog``, ``by=unc|google|umd``, ``masks``; splits as the references name them."""
    chosen = check_options("refcoco", RefOptions, options)
    by = chosen.by or SPLIT_BY[chosen.set][0]
    layout = f"{chosen.set}/refs({by}).p, {chosen.set}/instances.json, train2014/*.jpg (or images/train2014)"
    needed = [f"{chosen.set}/refs({by}).p", f"{chosen.set}/instances.json"]
    storage = open_storage(data, "refcoco", layout).rooted(needed, "refcoco", layout)
    return RefCoco(split, storage, chosen.set, by, chosen.masks, layout)


# GRIT-style JSON lines.


class GritOptions(DatasetOptions):
    """``jsonl``: the annotation file, ``{split}`` standing for the split; ``images``: the folder its names are relative to;
    ``phrases``: noun chunks, or the referring expressions that grow from them; ``min_score``: lowest confidence kept."""

    jsonl: str = "{split}.jsonl"
    images: str = ""
    phrases: Literal["noun_chunks", "ref_exps"] = "ref_exps"
    min_score: float = Field(0.0, ge=0.0, le=1.0)


def grit(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``grit``: lines with ``image`` (or ``key``), ``caption`` and ``[start, end, x1, y1, x2, y2, score]`` a phrase.

    Boxes are fractions of the image; a phrase is ``caption[start:end]``. Images of no phrase are kept.
    """
    chosen = check_options("grit", GritOptions, options)
    source, folder = chosen.jsonl.replace("{split}", split), chosen.images.replace("{split}", split)
    layout = f"{source}, {posixpath.join(folder, '*.jpg')}"
    storage = open_storage(data, "grit", layout).rooted([source], "grit", layout)
    images: list[str] = []
    rows: list[list[Row]] = []
    for number, line in storage.lines(source):
        label = f"{storage.label(source)}:{number}"
        try:
            entry = json.loads(line)
            name = str(entry["image"]) if "image" in entry else f"{entry['key']}.jpg"
            found: list[Row] = []
            for start, end, *box, score in entry[chosen.phrases]:
                if float(score) >= chosen.min_score:
                    phrase = str(entry["caption"])[int(start) : int(end)]
                    found.append((checked(box, label), phrase, len(found)))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{label}: malformed ({type(error).__name__}: {error})", "mend the line") from error
        images.append(posixpath.join(folder, name))
        rows.append(found)
    facts = {"phrases": chosen.phrases, "min_score": chosen.min_score}
    return RegionText("grit", split, storage, images, rows, layout, True, annotations=[source], facts=facts)


# Visual Genome.


def visual_genome(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``visual-genome``: region descriptions; the set has no official split, so that the split is ``all``."""
    check_options("visual-genome", NoOptions, options)
    need_split("visual-genome", split, ("all",))
    source = "region_descriptions.json"
    layout = f"{source}, VG_100K/*.jpg, VG_100K_2/*.jpg"
    storage = open_storage(data, "visual-genome", layout).rooted([source, "VG_100K"], "visual-genome", layout)
    label = storage.label(source)
    images: list[str] = []
    rows: list[list[Row]] = []
    try:
        for entry in sorted(storage.json(source), key=lambda e: int(e["id"])):
            name = f"{int(entry['id'])}.jpg"
            images.append(f"VG_100K{'' if storage.exists(f'VG_100K/{name}') else '_2'}/{name}")
            found = []
            for region in entry["regions"]:
                x, y, w, h = (float(region[key]) for key in ("x", "y", "width", "height"))
                box = checked((x, y, x + w, y + h), f"{label}: region {region['region_id']}")
                found.append((box, str(region["phrase"]), int(region["region_id"])))
            rows.append(found)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{label}: malformed ({type(error).__name__}: {error})", "fetch it again") from error
    return RegionText("visual-genome", split, storage, images, rows, layout, annotations=[source])


# Flickr30k Entities.

PHRASE = re.compile(r"\[/EN#(?P<id>\d+)(?P<kinds>(?:/\w+)+) (?P<text>[^\]]*)\]")
"""``[/EN#283585/people Two people]`` in a sentence of Flickr30k Entities."""


def flickr30k(split: str, data: Path | None, options: Mapping[str, Any]) -> Dataset:
    """``flickr30k-entities``: phrases of captions with their boxes; phrases of no box (scenes, ``notvisual``) have no row."""
    check_options("flickr30k-entities", NoOptions, options)
    need_split("flickr30k-entities", split, ("train", "val", "test"))
    listing = f"{split}.txt"
    layout = f"{listing}, Sentences/*.txt, Annotations/*.xml, flickr30k-images/*.jpg"
    needed = [listing, "Sentences", "Annotations", "flickr30k-images"]
    storage = open_storage(data, "flickr30k-entities", layout).rooted(needed, "flickr30k-entities", layout)
    ids = read_list(storage, listing)
    maps = [f"Annotations/{key}.xml" for key in ids]
    sentences = [f"Sentences/{key}.txt" for key in ids]
    need_files(storage, maps, "annotation", layout)
    need_files(storage, sentences, "file of sentences", layout)
    rows = [_entities(storage, xml, text) for xml, text in zip(maps, sentences)]
    images = [f"flickr30k-images/{key}.jpg" for key in ids]
    annotations = [listing, *sentences]
    return RegionText("flickr30k-entities", split, storage, images, rows, layout, annotations=annotations, maps=maps)


def _entities(storage: Storage, xml: str, text: str) -> list[Row]:
    label = storage.label(xml)
    boxes: dict[str, list[tuple[float, float, float, float]]] = {}
    try:
        for thing in ElementTree.fromstring(storage.read(xml)).iter("object"):
            for corner in thing.iter("bndbox"):
                # Corners are 1-based and inclusive, as in Pascal VOC.
                x1, y1, x2, y2 = (float(corner.findtext(key) or "nan") for key in ("xmin", "ymin", "xmax", "ymax"))
                box = checked((x1 - 1, y1 - 1, x2, y2), label)
                for name in thing.iter("name"):
                    boxes.setdefault((name.text or "").strip(), []).append(box)
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{label}: malformed ({error})", "fetch it again") from error
    rows: list[Row] = []
    for _, sentence in storage.lines(text):
        for match in PHRASE.finditer(sentence):
            rows += [(box, match["text"], len(rows) + k) for k, box in enumerate(boxes.get(match["id"], ()))]
    return rows
