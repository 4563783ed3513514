"""Read a folder that ``rice-eval data make scenes`` wrote; every file is checked against its checksum as it is read."""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pil

from rice_eval.datasets.base import Correspondences, Dataset, Instances, Question, TextLine, decode_image
from rice_eval.datasets.scenes_facts import FORMAT, fingerprint, palette
from rice_eval.errors import DataError, UsageError

__all__ = ["ScenesFolder"]

_REMAKE = "make it again with rice-eval data make scenes --out DIR"


class ScenesFolder(Dataset):
    """One split of a written folder; the same annotations, and the same fingerprint, as ``Scenes`` of its numbers.

    Args:
        root: the folder.
        split: ``train`` or ``val``.
        n: the first n scenes; all by default.
        size, seed: what the folder must have been made with, where given.

    Raises:
        DataError: no such folder, or a file that is missing or altered.
        UsageError: more scenes, another size or another seed than the folder has.
    """

    name = "scenes"
    provides = frozenset({"semantic", "instances", "text", "depth", "points", "questions"})

    def __init__(
        self, root: Path, split: str, n: int | None = None, size: int | None = None, seed: int | None = None
    ) -> None:
        self.root, self.split = Path(root), split
        about = self._about()
        if split not in about["splits"]:
            raise UsageError(f"dataset 'scenes' has no split '{split}'", f"its splits: {', '.join(about['splits'])}")
        held = int(about["splits"][split])
        if n is not None and n > held:
            raise UsageError(
                f"--data {root}: {n} scenes of split '{split}' asked for, {held} there",
                f"pass --option n_{split}={held}, or make more with rice-eval data make scenes --out DIR",
            )
        for key, asked in (("size", size), ("seed", seed)):
            if asked is not None and asked != about[key]:
                raise UsageError(f"--data {root}: made with {key} {about[key]}, not {asked}", f"ask for {about[key]}")
        self.n, self.side, self.seed = n or held, int(about["size"]), int(about["seed"])
        self._made = (int(about["generator"]), str(about["assets"]))
        self._sums: dict[str, str] = about["files"]
        shapes = self._json(f"annotations/instances_{split}.json")
        self.things = tuple(category["name"] for category in shapes["categories"])
        self.classes = ("background", *self.things)
        self.palette = palette()
        self._shapes = self._grouped(shapes)
        self._texts = self._grouped(self._json(f"annotations/text_{split}.json"))
        self._asked = self._grouped(self._json(f"annotations/questions_{split}.json"))
        self._points = self._grouped(self._json(f"annotations/correspondences_{split}.json"))

    def _about(self) -> dict[str, Any]:
        path = self.root / "scenes.json"
        try:
            about = json.loads(path.read_text(encoding="ascii"))
        except OSError as error:
            raise DataError(f"{path}: can't be read ({error.strerror})", _REMAKE) from error
        except ValueError as error:
            raise DataError(f"{path}: not valid JSON ({error})", _REMAKE) from error
        needed = {"dataset", "format", "generator", "assets", "size", "seed", "splits", "files"}
        if not isinstance(about, dict) or not needed <= about.keys() or about["dataset"] != "scenes":
            raise DataError(f"{path}: is not the manifest of a scenes folder", _REMAKE)
        if about["format"] != FORMAT:
            raise DataError(f"{path}: layout version {about['format']}, this version reads {FORMAT}", _REMAKE)
        return about

    def _read(self, name: str) -> bytes:
        path = self.root / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: can't be read ({error.strerror})", _REMAKE) from error
        if self._sums.get(name) != hashlib.sha256(data).hexdigest():
            raise DataError(f"{path}: its checksum is not the one in scenes.json", _REMAKE)
        return data

    def _json(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self._read(name))
        return value

    @staticmethod
    def _grouped(value: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
        groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for entry in value["annotations"]:
            groups[entry["image_id"]].append(entry)
        return dict(groups)

    def __len__(self) -> int:
        return self.n

    @property
    def fingerprint(self) -> str:
        """The same as that of ``Scenes`` made by the same generator from the same assets and numbers."""
        return fingerprint(self.split, self.n, self.side, self.seed, *self._made)

    def image_id(self, index: int) -> str:
        """The file's stem."""
        if not 0 <= index < self.n:
            raise IndexError(f"scene {index} of {self.n}")
        return f"{index:06d}"

    def size(self, index: int) -> tuple[int, int]:
        """Height and width, both the set's side."""
        return self.side, self.side

    def image(self, index: int) -> NDArray[np.uint8]:
        """``(S, S, 3)`` uint8 RGB."""
        name = f"{self.split}/{self.image_id(index)}.png"
        return decode_image(self._read(name), str(self.root / name))

    def _png(self, kind: str, index: int) -> NDArray[np.int64]:
        data = self._read(f"annotations/{kind}_{self.split}/{self.image_id(index)}.png")
        return np.asarray(Pil.open(io.BytesIO(data))).astype(np.int64)

    def semantic(self, index: int) -> NDArray[np.int64]:
        """``(S, S)`` int64 class indices."""
        picture = self._png("panoptic", index)
        owner = (picture[..., 0] + (picture[..., 1] << 8) + (picture[..., 2] << 16)) & 15
        table = np.zeros(16, np.int64)  # 15 is the background
        for entry in self._shapes.get(index, []):
            table[entry["id"] & 15] = entry["category_id"]
        result: NDArray[np.int64] = table[owner]
        return result

    def instances(self, index: int) -> Instances:
        """Visible things and signs, from the farthest to the nearest."""
        self.image_id(index)
        entries = self._shapes.get(index, [])
        boxes = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return Instances(
            boxes=boxes,
            labels=np.array([entry["category_id"] - 1 for entry in entries], np.int64),
            masks=tuple(
                {"size": e["segmentation"]["size"], "counts": e["segmentation"]["counts"].encode("ascii")}
                for e in entries
            ),
            crowd=np.zeros(len(entries), bool),
            area=np.array([entry["area"] for entry in entries], np.float64),
            ids=np.array([entry["id"] for entry in entries], np.int64),
            names=tuple(entry["name"] for entry in entries),
        )

    def text(self, index: int) -> tuple[TextLine, ...]:
        """The words on signs."""
        self.image_id(index)
        return tuple(
            TextLine(np.array(e["polygon"], np.float64).reshape(-1, 2), e["caption"], not e["legible"])
            for e in self._texts.get(index, [])
        )

    def depth(self, index: int) -> NDArray[np.float32]:
        """``(S, S)`` distances: 1 to 3 for objects, 4 for the background."""
        return (self._png("depth", index) / 1000).astype(np.float32)

    def points(self, index: int) -> Correspondences:
        """View b, and points matched to it."""
        name = f"view_b/{self.split}/{self.image_id(index)}.png"
        entry = self._points[index][0]
        here = np.array(entry["here"], np.float64).reshape(-1, 2)
        there = np.array(entry["there"], np.float64).reshape(-1, 2)
        return Correspondences(decode_image(self._read(name), str(self.root / name)), here, there)

    def questions(self, index: int) -> tuple[Question, ...]:
        """Questions with answers."""
        self.image_id(index)
        return tuple(
            Question(e["kind"], e["question"], e["answer"], tuple(e["box"]) if e["box"] else None)
            for e in self._asked.get(index, [])
        )
